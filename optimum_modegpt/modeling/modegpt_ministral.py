"""Compressed Ministral: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.ministral.configuration_ministral import MinistralConfig
from transformers.models.ministral.modeling_ministral import (
    MinistralAttention,
    MinistralForCausalLM,
    MinistralForSequenceClassification,
    MinistralModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family

FAMILY = Family("ministral", attention=Attention(score_arguments=(("sliding_window", "sliding_window"),)))


class ModeGPTMinistralConfig(ModeGPTConfigMixin, MinistralConfig):
    """Ministral with the widths of each block in `per_layer_config`."""


class ModeGPTMinistralAttention(ModeGPTAttentionMixin, MinistralAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Ministral's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTMinistralModel(ModeGPTModelMixin, MinistralModel):
    """Ministral without a head."""


class ModeGPTMinistralForCausalLM(ModeGPTModelMixin, MinistralForCausalLM):
    """Ministral with a language model's head."""


class ModeGPTMinistralForSequenceClassification(ModeGPTModelMixin, MinistralForSequenceClassification):
    """Ministral with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTMinistralConfig,
    ModeGPTMinistralAttention,
    AutoModel=ModeGPTMinistralModel,
    AutoModelForCausalLM=ModeGPTMinistralForCausalLM,
    AutoModelForSequenceClassification=ModeGPTMinistralForSequenceClassification,
)
