"""Compressed Llama: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

from .modegpt_common import ModeGPTAttentionMixin, ModeGPTConfigMixin, ModeGPTModelMixin, register
from .modegpt_family import Family

FAMILY = Family("llama")


class ModeGPTLlamaConfig(ModeGPTConfigMixin, LlamaConfig):
    """Llama with the widths of each block in `per_layer_config`."""

    model_type = FAMILY.compressed_type
    _auto_class = "AutoConfig"
    family = FAMILY


class ModeGPTLlamaAttention(ModeGPTAttentionMixin, LlamaAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Llama's attention with query/key and value heads of widths of their own."""

    family = FAMILY


class _Compressed(ModeGPTModelMixin):
    config_class = ModeGPTLlamaConfig
    attention_class = ModeGPTLlamaAttention


class ModeGPTLlamaModel(_Compressed, LlamaModel):
    """Llama without a head."""

    _auto_class = "AutoModel"


class ModeGPTLlamaForCausalLM(_Compressed, LlamaForCausalLM):
    """Llama, language model."""

    _auto_class = "AutoModelForCausalLM"


class ModeGPTLlamaForSequenceClassification(_Compressed, LlamaForSequenceClassification):
    """Llama with a classification head."""

    _auto_class = "AutoModelForSequenceClassification"


MODELS = register(ModeGPTLlamaModel, ModeGPTLlamaForCausalLM, ModeGPTLlamaForSequenceClassification)
