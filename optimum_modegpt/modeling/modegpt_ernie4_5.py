"""Compressed ERNIE 4.5: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.ernie4_5.configuration_ernie4_5 import Ernie4_5Config
from transformers.models.ernie4_5.modeling_ernie4_5 import Ernie4_5Attention, Ernie4_5ForCausalLM, Ernie4_5Model

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family, Positions

FAMILY = Family("ernie4_5", attention=Attention(positions=Positions("interleaved")))


class ModeGPTErnie4_5Config(ModeGPTConfigMixin, Ernie4_5Config):
    """ERNIE 4.5 with the widths of each block in `per_layer_config`."""


class ModeGPTErnie4_5Attention(ModeGPTAttentionMixin, Ernie4_5Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """ERNIE 4.5's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTErnie4_5Model(ModeGPTModelMixin, Ernie4_5Model):
    """ERNIE 4.5 without a head."""


class ModeGPTErnie4_5ForCausalLM(ModeGPTModelMixin, Ernie4_5ForCausalLM):
    """ERNIE 4.5 with a language model's head."""


MODELS = register(
    FAMILY,
    ModeGPTErnie4_5Config,
    ModeGPTErnie4_5Attention,
    AutoModel=ModeGPTErnie4_5Model,
    AutoModelForCausalLM=ModeGPTErnie4_5ForCausalLM,
)
