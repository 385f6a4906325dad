"""Compressed Helium: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.helium.configuration_helium import HeliumConfig
from transformers.models.helium.modeling_helium import (
    HeliumAttention,
    HeliumForCausalLM,
    HeliumForSequenceClassification,
    HeliumModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family, Positions

FAMILY = Family("helium", attention=Attention(positions=Positions("interleaved")))


class ModeGPTHeliumConfig(ModeGPTConfigMixin, HeliumConfig):
    """Helium with the widths of each block in `per_layer_config`."""


class ModeGPTHeliumAttention(ModeGPTAttentionMixin, HeliumAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Helium's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTHeliumModel(ModeGPTModelMixin, HeliumModel):
    """Helium without a head."""


class ModeGPTHeliumForCausalLM(ModeGPTModelMixin, HeliumForCausalLM):
    """Helium with a language model's head."""


class ModeGPTHeliumForSequenceClassification(ModeGPTModelMixin, HeliumForSequenceClassification):
    """Helium with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTHeliumConfig,
    ModeGPTHeliumAttention,
    AutoModel=ModeGPTHeliumModel,
    AutoModelForCausalLM=ModeGPTHeliumForCausalLM,
    AutoModelForSequenceClassification=ModeGPTHeliumForSequenceClassification,
)
