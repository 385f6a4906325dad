"""Compressed Llama: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Family

FAMILY = Family("llama")


class ModeGPTLlamaConfig(ModeGPTConfigMixin, LlamaConfig):
    """Llama with the widths of each block in `per_layer_config`."""


class ModeGPTLlamaAttention(ModeGPTAttentionMixin, LlamaAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Llama's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTLlamaModel(ModeGPTModelMixin, LlamaModel):
    """Llama without a head."""


class ModeGPTLlamaForCausalLM(ModeGPTModelMixin, LlamaForCausalLM):
    """Llama with a language model's head."""


class ModeGPTLlamaForSequenceClassification(ModeGPTModelMixin, LlamaForSequenceClassification):
    """Llama with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTLlamaConfig,
    ModeGPTLlamaAttention,
    AutoModel=ModeGPTLlamaModel,
    AutoModelForCausalLM=ModeGPTLlamaForCausalLM,
    AutoModelForSequenceClassification=ModeGPTLlamaForSequenceClassification,
)
