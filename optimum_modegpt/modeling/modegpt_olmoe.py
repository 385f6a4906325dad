"""Compressed OLMoE: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import (
    OlmoeAttention,
    OlmoeForCausalLM,
    OlmoeModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Experts, Family, HeadNorms

FAMILY = Family(
    "olmoe",
    attention=Attention(head_norms=HeadNorms(over="projection")),
    mlp=MLP(experts=Experts(width="intermediate_size")),
    refused=("clip_qkv",),
)


class ModeGPTOlmoeConfig(ModeGPTConfigMixin, OlmoeConfig):
    """OLMoE with the widths of each block in `per_layer_config`."""


class ModeGPTOlmoeAttention(ModeGPTAttentionMixin, OlmoeAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """OLMoE's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTOlmoeModel(ModeGPTModelMixin, OlmoeModel):
    """OLMoE without a head."""


class ModeGPTOlmoeForCausalLM(ModeGPTModelMixin, OlmoeForCausalLM):
    """OLMoE with a language model's head."""


MODELS = register(
    FAMILY,
    ModeGPTOlmoeConfig,
    ModeGPTOlmoeAttention,
    AutoModel=ModeGPTOlmoeModel,
    AutoModelForCausalLM=ModeGPTOlmoeForCausalLM,
)
