"""Compressed Solar Open: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.solar_open.configuration_solar_open import SolarOpenConfig
from transformers.models.solar_open.modeling_solar_open import (
    SolarOpenAttention,
    SolarOpenForCausalLM,
    SolarOpenModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Experts, Family, SharedExpert

FAMILY = Family(
    "solar_open",
    mlp=MLP(
        width="moe_intermediate_size",
        experts=Experts(
            count="n_routed_experts",
            groups="n_group",
            chosen_groups="topk_group",
            shared=SharedExpert("mlp.shared_experts", None, "moe_intermediate_size", "n_shared_experts"),
        ),
    ),
    sizes=("n_shared_experts",),
)


class ModeGPTSolarOpenConfig(ModeGPTConfigMixin, SolarOpenConfig):
    """Solar Open with the widths of each block in `per_layer_config`."""


class ModeGPTSolarOpenAttention(ModeGPTAttentionMixin, SolarOpenAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Solar Open's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTSolarOpenModel(ModeGPTModelMixin, SolarOpenModel):
    """Solar Open without a head."""


class ModeGPTSolarOpenForCausalLM(ModeGPTModelMixin, SolarOpenForCausalLM):
    """Solar Open with a language model's head."""


MODELS = register(
    FAMILY,
    ModeGPTSolarOpenConfig,
    ModeGPTSolarOpenAttention,
    AutoModel=ModeGPTSolarOpenModel,
    AutoModelForCausalLM=ModeGPTSolarOpenForCausalLM,
)
