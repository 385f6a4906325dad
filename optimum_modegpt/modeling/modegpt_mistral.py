"""Compressed Mistral: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralForCausalLM,
    MistralForSequenceClassification,
    MistralModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family

FAMILY = Family("mistral", attention=Attention(score_arguments=(("sliding_window", "config.sliding_window"),)))


class ModeGPTMistralConfig(ModeGPTConfigMixin, MistralConfig):
    """Mistral with the widths of each block in `per_layer_config`."""


class ModeGPTMistralAttention(ModeGPTAttentionMixin, MistralAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Mistral's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTMistralModel(ModeGPTModelMixin, MistralModel):
    """Mistral without a head."""


class ModeGPTMistralForCausalLM(ModeGPTModelMixin, MistralForCausalLM):
    """Mistral with a language model's head."""


class ModeGPTMistralForSequenceClassification(ModeGPTModelMixin, MistralForSequenceClassification):
    """Mistral with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTMistralConfig,
    ModeGPTMistralAttention,
    AutoModel=ModeGPTMistralModel,
    AutoModelForCausalLM=ModeGPTMistralForCausalLM,
    AutoModelForSequenceClassification=ModeGPTMistralForSequenceClassification,
)
