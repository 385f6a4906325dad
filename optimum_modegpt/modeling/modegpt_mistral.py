"""Compressed Mistral: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralForCausalLM,
    MistralForSequenceClassification,
    MistralModel,
)

from .modegpt_common import ModeGPTAttentionMixin, ModeGPTConfigMixin, ModeGPTModelMixin, register
from .modegpt_family import Family

FAMILY = Family("mistral")


class ModeGPTMistralConfig(ModeGPTConfigMixin, MistralConfig):
    """Mistral with the widths of each block in `per_layer_config`."""

    model_type = FAMILY.compressed_type
    _auto_class = "AutoConfig"
    family = FAMILY


class ModeGPTMistralAttention(ModeGPTAttentionMixin, MistralAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Mistral's attention with query/key and value heads of widths of their own."""

    family = FAMILY

    @property
    def attention_window(self) -> int | None:
        """Mistral's window is the same in all blocks."""
        return self.config.sliding_window


class _Compressed(ModeGPTModelMixin):
    config_class = ModeGPTMistralConfig
    attention_class = ModeGPTMistralAttention


class ModeGPTMistralModel(_Compressed, MistralModel):
    """Mistral without a head."""

    _auto_class = "AutoModel"


class ModeGPTMistralForCausalLM(_Compressed, MistralForCausalLM):
    """Mistral, language model."""

    _auto_class = "AutoModelForCausalLM"


class ModeGPTMistralForSequenceClassification(_Compressed, MistralForSequenceClassification):
    """Mistral with a classification head."""

    _auto_class = "AutoModelForSequenceClassification"


MODELS = register(ModeGPTMistralModel, ModeGPTMistralForCausalLM, ModeGPTMistralForSequenceClassification)
