"""Compressed Qwen2-MoE: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeAttention,
    Qwen2MoeForCausalLM,
    Qwen2MoeForSequenceClassification,
    Qwen2MoeModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Experts, Family, SharedExpert

FAMILY = Family(
    "qwen2_moe",
    mlp=MLP(experts=Experts(shared=SharedExpert(), dense_layers="mlp_only_layers", period="decoder_sparse_step")),
    sizes=("shared_expert_intermediate_size",),
)


class ModeGPTQwen2MoeConfig(ModeGPTConfigMixin, Qwen2MoeConfig):
    """Qwen2-MoE with the widths of each block in `per_layer_config`."""


class ModeGPTQwen2MoeAttention(ModeGPTAttentionMixin, Qwen2MoeAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Qwen2-MoE's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTQwen2MoeModel(ModeGPTModelMixin, Qwen2MoeModel):
    """Qwen2-MoE without a head."""


class ModeGPTQwen2MoeForCausalLM(ModeGPTModelMixin, Qwen2MoeForCausalLM):
    """Qwen2-MoE with a language model's head."""


class ModeGPTQwen2MoeForSequenceClassification(ModeGPTModelMixin, Qwen2MoeForSequenceClassification):
    """Qwen2-MoE with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTQwen2MoeConfig,
    ModeGPTQwen2MoeAttention,
    AutoModel=ModeGPTQwen2MoeModel,
    AutoModelForCausalLM=ModeGPTQwen2MoeForCausalLM,
    AutoModelForSequenceClassification=ModeGPTQwen2MoeForSequenceClassification,
)
