"""Compressed Granite: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.granite.configuration_granite import GraniteConfig
from transformers.models.granite.modeling_granite import GraniteAttention, GraniteForCausalLM, GraniteModel

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Family, Head, Residual

FAMILY = Family("granite", residual=Residual(multiplier="residual_multiplier"), head=Head(divisor="logits_scaling"))


class ModeGPTGraniteConfig(ModeGPTConfigMixin, GraniteConfig):
    """Granite with the widths of each block in `per_layer_config`."""


class ModeGPTGraniteAttention(ModeGPTAttentionMixin, GraniteAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Granite's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTGraniteModel(ModeGPTModelMixin, GraniteModel):
    """Granite without a head."""


class ModeGPTGraniteForCausalLM(ModeGPTModelMixin, GraniteForCausalLM):
    """Granite with a language model's head."""


MODELS = register(
    FAMILY,
    ModeGPTGraniteConfig,
    ModeGPTGraniteAttention,
    AutoModel=ModeGPTGraniteModel,
    AutoModelForCausalLM=ModeGPTGraniteForCausalLM,
)
