"""Compressed Ministral 3: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.ministral3.configuration_ministral3 import Ministral3Config
from transformers.models.ministral3.modeling_ministral3 import (
    Ministral3Attention,
    Ministral3ForCausalLM,
    Ministral3ForSequenceClassification,
    Ministral3Model,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family, Positions

FAMILY = Family(
    "ministral3",
    attention=Attention(
        positions=Positions(query_factor=True),
        score_arguments=(("sliding_window", "config.sliding_window"),),
        passed_on=("position_ids",),
    ),
)


class ModeGPTMinistral3Config(ModeGPTConfigMixin, Ministral3Config):
    """Ministral 3 with the widths of each block in `per_layer_config`."""


class ModeGPTMinistral3Attention(ModeGPTAttentionMixin, Ministral3Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Ministral 3's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTMinistral3Model(ModeGPTModelMixin, Ministral3Model):
    """Ministral 3 without a head."""


class ModeGPTMinistral3ForCausalLM(ModeGPTModelMixin, Ministral3ForCausalLM):
    """Ministral 3 with a language model's head."""


class ModeGPTMinistral3ForSequenceClassification(ModeGPTModelMixin, Ministral3ForSequenceClassification):
    """Ministral 3 with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTMinistral3Config,
    ModeGPTMinistral3Attention,
    AutoModel=ModeGPTMinistral3Model,
    AutoModelForCausalLM=ModeGPTMinistral3ForCausalLM,
    AutoModelForSequenceClassification=ModeGPTMinistral3ForSequenceClassification,
)
