"""Compressed Mixtral: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    MixtralModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Experts, Family

FAMILY = Family(
    "mixtral",
    attention=Attention(score_arguments=(("sliding_window", "config.sliding_window"),)),
    mlp=MLP(experts=Experts(width="intermediate_size", count="num_local_experts")),
)


class ModeGPTMixtralConfig(ModeGPTConfigMixin, MixtralConfig):
    """Mixtral with the widths of each block in `per_layer_config`."""


class ModeGPTMixtralAttention(ModeGPTAttentionMixin, MixtralAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Mixtral's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTMixtralModel(ModeGPTModelMixin, MixtralModel):
    """Mixtral without a head."""


class ModeGPTMixtralForCausalLM(ModeGPTModelMixin, MixtralForCausalLM):
    """Mixtral with a language model's head."""


class ModeGPTMixtralForSequenceClassification(ModeGPTModelMixin, MixtralForSequenceClassification):
    """Mixtral with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTMixtralConfig,
    ModeGPTMixtralAttention,
    AutoModel=ModeGPTMixtralModel,
    AutoModelForCausalLM=ModeGPTMixtralForCausalLM,
    AutoModelForSequenceClassification=ModeGPTMixtralForSequenceClassification,
)
