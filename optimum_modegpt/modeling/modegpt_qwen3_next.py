"""Compressed Qwen3-Next: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextAttention,
    Qwen3NextForCausalLM,
    Qwen3NextForSequenceClassification,
    Qwen3NextModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Experts, Family, SharedExpert
from .modegpt_qwen3_5_text import FAMILY as TEXT

FAMILY = Family(
    "qwen3_next",
    attention=TEXT.attention,
    mlp=MLP(experts=Experts(shared=SharedExpert(), dense_layers="mlp_only_layers", period="decoder_sparse_step")),
    norm=TEXT.norm,
    sizes=("shared_expert_intermediate_size", *TEXT.sizes),
)


class ModeGPTQwen3NextConfig(ModeGPTConfigMixin, Qwen3NextConfig):
    """Qwen3-Next with the widths of each block in `per_layer_config`."""


class ModeGPTQwen3NextAttention(ModeGPTAttentionMixin, Qwen3NextAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Qwen3-Next's softmax attention with separate widths for query and key heads, and for value heads."""


class ModeGPTQwen3NextModel(ModeGPTModelMixin, Qwen3NextModel):
    """Qwen3-Next without a head."""


class ModeGPTQwen3NextForCausalLM(ModeGPTModelMixin, Qwen3NextForCausalLM):
    """Qwen3-Next with a language model's head."""


class ModeGPTQwen3NextForSequenceClassification(ModeGPTModelMixin, Qwen3NextForSequenceClassification):
    """Qwen3-Next with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTQwen3NextConfig,
    ModeGPTQwen3NextAttention,
    AutoModel=ModeGPTQwen3NextModel,
    AutoModelForCausalLM=ModeGPTQwen3NextForCausalLM,
    AutoModelForSequenceClassification=ModeGPTQwen3NextForSequenceClassification,
)
