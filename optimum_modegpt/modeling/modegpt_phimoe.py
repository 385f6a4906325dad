"""Compressed Phi-MoE: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.phimoe.configuration_phimoe import PhimoeConfig
from transformers.models.phimoe.modeling_phimoe import (
    PhimoeAttention,
    PhimoeForCausalLM,
    PhimoeForSequenceClassification,
    PhimoeModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Experts, Family, Norm

FAMILY = Family(
    "phimoe",
    mlp=MLP(experts=Experts(router="mlp.router", width="intermediate_size", count="num_local_experts")),
    norm=Norm(centred=True),
)


class ModeGPTPhimoeConfig(ModeGPTConfigMixin, PhimoeConfig):
    """Phi-MoE with the widths of each block in `per_layer_config`."""


class ModeGPTPhimoeAttention(ModeGPTAttentionMixin, PhimoeAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Phi-MoE's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTPhimoeModel(ModeGPTModelMixin, PhimoeModel):
    """Phi-MoE without a head."""


class ModeGPTPhimoeForCausalLM(ModeGPTModelMixin, PhimoeForCausalLM):
    """Phi-MoE with a language model's head."""


class ModeGPTPhimoeForSequenceClassification(ModeGPTModelMixin, PhimoeForSequenceClassification):
    """Phi-MoE with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTPhimoeConfig,
    ModeGPTPhimoeAttention,
    AutoModel=ModeGPTPhimoeModel,
    AutoModelForCausalLM=ModeGPTPhimoeForCausalLM,
    AutoModelForSequenceClassification=ModeGPTPhimoeForSequenceClassification,
)
