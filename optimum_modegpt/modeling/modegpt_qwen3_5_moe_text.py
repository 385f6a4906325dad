"""Compressed text model of Qwen3.5-MoE: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeAttention,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Experts, Family, HeadNorms, Norm, Positions, Storage

FAMILY = Family(
    "qwen3_5_moe_text",
    attention=Attention(
        layers=("full_attention",),
        mixers=("linear_attn",),
        query="self_attn.query_proj",
        gate="self_attn.gate_proj",
        storage=Storage("gated", "self_attn.q_proj"),
        positions=Positions(partial=True),
        head_norms=HeadNorms(),
        values="coordinates",
    ),
    mlp=MLP(width="moe_intermediate_size", experts=Experts()),
    norm=Norm(offset=1.0),
    sizes=(
        "shared_expert_intermediate_size",
        "linear_conv_kernel_dim",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
    ),
)


class ModeGPTQwen3_5MoeTextConfig(ModeGPTConfigMixin, Qwen3_5MoeTextConfig):
    """The text model of Qwen3.5-MoE with the widths of each block in `per_layer_config`."""


class ModeGPTQwen3_5MoeAttention(ModeGPTAttentionMixin, Qwen3_5MoeAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Qwen3.5-MoE's softmax attention with separate widths for query and key heads, and for value heads."""


class ModeGPTQwen3_5MoeTextModel(ModeGPTModelMixin, Qwen3_5MoeTextModel):
    """The text model of Qwen3.5-MoE without a head."""


class ModeGPTQwen3_5MoeForCausalLM(ModeGPTModelMixin, Qwen3_5MoeForCausalLM):
    """The text model of Qwen3.5-MoE with a language model's head."""


MODELS = register(
    FAMILY,
    ModeGPTQwen3_5MoeTextConfig,
    ModeGPTQwen3_5MoeAttention,
    AutoModel=ModeGPTQwen3_5MoeTextModel,
    AutoModelForCausalLM=ModeGPTQwen3_5MoeForCausalLM,
)
