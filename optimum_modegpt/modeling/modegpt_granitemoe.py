"""Compressed Granite-MoE: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.granitemoe.configuration_granitemoe import GraniteMoeConfig
from transformers.models.granitemoe.modeling_granitemoe import (
    GraniteMoeAttention,
    GraniteMoeForCausalLM,
    GraniteMoeModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Experts, Family, Head, Residual

FAMILY = Family(
    "granitemoe",
    mlp=MLP(
        experts=Experts(
            "block_sparse_moe",
            "block_sparse_moe.experts",
            "block_sparse_moe.router",
            width="intermediate_size",
            count="num_local_experts",
        )
    ),
    residual=Residual(multiplier="residual_multiplier"),
    head=Head(divisor="logits_scaling"),
)


class ModeGPTGraniteMoeConfig(ModeGPTConfigMixin, GraniteMoeConfig):
    """Granite-MoE with the widths of each block in `per_layer_config`."""


class ModeGPTGraniteMoeAttention(ModeGPTAttentionMixin, GraniteMoeAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Granite-MoE's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTGraniteMoeModel(ModeGPTModelMixin, GraniteMoeModel):
    """Granite-MoE without a head."""


class ModeGPTGraniteMoeForCausalLM(ModeGPTModelMixin, GraniteMoeForCausalLM):
    """Granite-MoE with a language model's head."""


MODELS = register(
    FAMILY,
    ModeGPTGraniteMoeConfig,
    ModeGPTGraniteMoeAttention,
    AutoModel=ModeGPTGraniteMoeModel,
    AutoModelForCausalLM=ModeGPTGraniteMoeForCausalLM,
)
