"""Compressed GLM-4-MoE: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeAttention,
    Glm4MoeForCausalLM,
    Glm4MoeModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Experts, Family, HeadNorms, Positions, SharedExpert

FAMILY = Family(
    "glm4_moe",
    attention=Attention(positions=Positions(partial=True), head_norms=HeadNorms(flag="use_qk_norm")),
    mlp=MLP(
        experts=Experts(
            shared=SharedExpert("mlp.shared_experts", None, "moe_intermediate_size", "n_shared_experts"),
            count="n_routed_experts",
            groups="n_group",
            chosen_groups="topk_group",
            first="first_k_dense_replace",
        )
    ),
    sizes=("n_shared_experts",),
)


class ModeGPTGlm4MoeConfig(ModeGPTConfigMixin, Glm4MoeConfig):
    """GLM-4-MoE with the widths of each block in `per_layer_config`."""


class ModeGPTGlm4MoeAttention(ModeGPTAttentionMixin, Glm4MoeAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """GLM-4-MoE's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTGlm4MoeModel(ModeGPTModelMixin, Glm4MoeModel):
    """GLM-4-MoE without a head."""


class ModeGPTGlm4MoeForCausalLM(ModeGPTModelMixin, Glm4MoeForCausalLM):
    """GLM-4-MoE with a language model's head."""


MODELS = register(
    FAMILY,
    ModeGPTGlm4MoeConfig,
    ModeGPTGlm4MoeAttention,
    AutoModel=ModeGPTGlm4MoeModel,
    AutoModelForCausalLM=ModeGPTGlm4MoeForCausalLM,
)
