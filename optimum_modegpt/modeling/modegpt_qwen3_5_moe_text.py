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
from .modegpt_family import MLP, Experts, Family, SharedExpert
from .modegpt_qwen3_5_text import FAMILY as TEXT

FAMILY = Family(
    "qwen3_5_moe_text",
    attention=TEXT.attention,
    mlp=MLP(width="moe_intermediate_size", experts=Experts(shared=SharedExpert())),
    norm=TEXT.norm,
    sizes=("shared_expert_intermediate_size", *TEXT.sizes),
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
