"""Compressed Gemma: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.gemma.configuration_gemma import GemmaConfig
from transformers.models.gemma.modeling_gemma import (
    GemmaAttention,
    GemmaForCausalLM,
    GemmaForSequenceClassification,
    GemmaModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Family, Norm

FAMILY = Family("gemma", norm=Norm(offset=1.0))


class ModeGPTGemmaConfig(ModeGPTConfigMixin, GemmaConfig):
    """Gemma with the widths of each block in `per_layer_config`."""


class ModeGPTGemmaAttention(ModeGPTAttentionMixin, GemmaAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Gemma's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTGemmaModel(ModeGPTModelMixin, GemmaModel):
    """Gemma without a head."""


class ModeGPTGemmaForCausalLM(ModeGPTModelMixin, GemmaForCausalLM):
    """Gemma with a language model's head."""


class ModeGPTGemmaForSequenceClassification(ModeGPTModelMixin, GemmaForSequenceClassification):
    """Gemma with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTGemmaConfig,
    ModeGPTGemmaAttention,
    AutoModel=ModeGPTGemmaModel,
    AutoModelForCausalLM=ModeGPTGemmaForCausalLM,
    AutoModelForSequenceClassification=ModeGPTGemmaForSequenceClassification,
)
