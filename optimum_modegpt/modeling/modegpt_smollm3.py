"""Compressed SmolLM3: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.smollm3.configuration_smollm3 import SmolLM3Config
from transformers.models.smollm3.modeling_smollm3 import (
    SmolLM3Attention,
    SmolLM3ForCausalLM,
    SmolLM3ForSequenceClassification,
    SmolLM3Model,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family, Positions

FAMILY = Family(
    "smollm3",
    attention=Attention(
        positions=Positions(layer_flag="use_rope"), score_arguments=(("sliding_window", "sliding_window"),)
    ),
)


class ModeGPTSmolLM3Config(ModeGPTConfigMixin, SmolLM3Config):
    """SmolLM3 with the widths of each block in `per_layer_config`."""


class ModeGPTSmolLM3Attention(ModeGPTAttentionMixin, SmolLM3Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """SmolLM3's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTSmolLM3Model(ModeGPTModelMixin, SmolLM3Model):
    """SmolLM3 without a head."""


class ModeGPTSmolLM3ForCausalLM(ModeGPTModelMixin, SmolLM3ForCausalLM):
    """SmolLM3 with a language model's head."""


class ModeGPTSmolLM3ForSequenceClassification(ModeGPTModelMixin, SmolLM3ForSequenceClassification):
    """SmolLM3 with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTSmolLM3Config,
    ModeGPTSmolLM3Attention,
    AutoModel=ModeGPTSmolLM3Model,
    AutoModelForCausalLM=ModeGPTSmolLM3ForCausalLM,
    AutoModelForSequenceClassification=ModeGPTSmolLM3ForSequenceClassification,
)
