"""Compressed ERNIE-4.5-MoE: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.ernie4_5_moe.configuration_ernie4_5_moe import Ernie4_5_MoeConfig
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import (
    Ernie4_5_MoeAttention,
    Ernie4_5_MoeForCausalLM,
    Ernie4_5_MoeModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Experts, Family, Positions, SharedExpert

FAMILY = Family(
    "ernie4_5_moe",
    attention=Attention(positions=Positions(pairs="interleaved")),
    mlp=MLP(
        experts=Experts(
            shared=SharedExpert("mlp.shared_experts", None, "moe_intermediate_size", "moe_num_shared_experts"),
            count="moe_num_experts",
            period="moe_layer_interval",
            first="moe_layer_start_index",
            last="moe_layer_end_index",
        )
    ),
)


class ModeGPTErnie4_5_MoeConfig(ModeGPTConfigMixin, Ernie4_5_MoeConfig):
    """ERNIE-4.5-MoE with the widths of each block in `per_layer_config`."""


class ModeGPTErnie4_5_MoeAttention(ModeGPTAttentionMixin, Ernie4_5_MoeAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """ERNIE-4.5-MoE's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTErnie4_5_MoeModel(ModeGPTModelMixin, Ernie4_5_MoeModel):
    """ERNIE-4.5-MoE without a head."""


class ModeGPTErnie4_5_MoeForCausalLM(ModeGPTModelMixin, Ernie4_5_MoeForCausalLM):
    """ERNIE-4.5-MoE with a language model's head."""


MODELS = register(
    FAMILY,
    ModeGPTErnie4_5_MoeConfig,
    ModeGPTErnie4_5_MoeAttention,
    AutoModel=ModeGPTErnie4_5_MoeModel,
    AutoModelForCausalLM=ModeGPTErnie4_5_MoeForCausalLM,
)
