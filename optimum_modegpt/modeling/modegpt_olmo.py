"""Compressed OLMo: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.olmo.configuration_olmo import OlmoConfig
from transformers.models.olmo.modeling_olmo import (
    OlmoAttention,
    OlmoForCausalLM,
    OlmoForSequenceClassification,
    OlmoModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family, Norm

FAMILY = Family("olmo", attention=Attention(clip="clip_qkv"), norm=Norm(centred=True))


class ModeGPTOlmoConfig(ModeGPTConfigMixin, OlmoConfig):
    """OLMo with the widths of each block in `per_layer_config`."""


class ModeGPTOlmoAttention(ModeGPTAttentionMixin, OlmoAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """OLMo's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTOlmoModel(ModeGPTModelMixin, OlmoModel):
    """OLMo without a head."""


class ModeGPTOlmoForCausalLM(ModeGPTModelMixin, OlmoForCausalLM):
    """OLMo with a language model's head."""


class ModeGPTOlmoForSequenceClassification(ModeGPTModelMixin, OlmoForSequenceClassification):
    """OLMo with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTOlmoConfig,
    ModeGPTOlmoAttention,
    AutoModel=ModeGPTOlmoModel,
    AutoModelForCausalLM=ModeGPTOlmoForCausalLM,
    AutoModelForSequenceClassification=ModeGPTOlmoForSequenceClassification,
)
