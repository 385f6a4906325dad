"""Compressed Arcee: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.arcee.configuration_arcee import ArceeConfig
from transformers.models.arcee.modeling_arcee import (
    ArceeAttention,
    ArceeForCausalLM,
    ArceeForSequenceClassification,
    ArceeModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Family

FAMILY = Family("arcee", mlp=MLP(inputs=("mlp.up_proj",)))


class ModeGPTArceeConfig(ModeGPTConfigMixin, ArceeConfig):
    """Arcee with the widths of each block in `per_layer_config`."""


class ModeGPTArceeAttention(ModeGPTAttentionMixin, ArceeAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Arcee's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTArceeModel(ModeGPTModelMixin, ArceeModel):
    """Arcee without a head."""


class ModeGPTArceeForCausalLM(ModeGPTModelMixin, ArceeForCausalLM):
    """Arcee with a language model's head."""


class ModeGPTArceeForSequenceClassification(ModeGPTModelMixin, ArceeForSequenceClassification):
    """Arcee with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTArceeConfig,
    ModeGPTArceeAttention,
    AutoModel=ModeGPTArceeModel,
    AutoModelForCausalLM=ModeGPTArceeForCausalLM,
    AutoModelForSequenceClassification=ModeGPTArceeForSequenceClassification,
)
