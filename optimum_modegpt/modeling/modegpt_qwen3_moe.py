"""Compressed Qwen3-MoE: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeForCausalLM,
    Qwen3MoeForSequenceClassification,
    Qwen3MoeModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Experts, Family, HeadNorms

FAMILY = Family(
    "qwen3_moe",
    attention=Attention(head_norms=HeadNorms(), score_arguments=(("sliding_window", "sliding_window"),)),
    mlp=MLP(experts=Experts(dense_layers="mlp_only_layers", period="decoder_sparse_step")),
)


class ModeGPTQwen3MoeConfig(ModeGPTConfigMixin, Qwen3MoeConfig):
    """Qwen3-MoE with the widths of each block in `per_layer_config`."""


class ModeGPTQwen3MoeAttention(ModeGPTAttentionMixin, Qwen3MoeAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Qwen3-MoE's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTQwen3MoeModel(ModeGPTModelMixin, Qwen3MoeModel):
    """Qwen3-MoE without a head."""


class ModeGPTQwen3MoeForCausalLM(ModeGPTModelMixin, Qwen3MoeForCausalLM):
    """Qwen3-MoE with a language model's head."""


class ModeGPTQwen3MoeForSequenceClassification(ModeGPTModelMixin, Qwen3MoeForSequenceClassification):
    """Qwen3-MoE with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTQwen3MoeConfig,
    ModeGPTQwen3MoeAttention,
    AutoModel=ModeGPTQwen3MoeModel,
    AutoModelForCausalLM=ModeGPTQwen3MoeForCausalLM,
    AutoModelForSequenceClassification=ModeGPTQwen3MoeForSequenceClassification,
)
