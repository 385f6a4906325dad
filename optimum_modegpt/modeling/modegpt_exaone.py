"""Compressed EXAONE 3: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.exaone.configuration_exaone import ExaoneConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaModel

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Family

FAMILY = Family("exaone")


class ModeGPTExaoneConfig(ModeGPTConfigMixin, ExaoneConfig):
    """EXAONE 3 with the widths of each block in `per_layer_config`."""


class ModeGPTExaoneAttention(ModeGPTAttentionMixin, LlamaAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """EXAONE 3's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTExaoneModel(ModeGPTModelMixin, LlamaModel):
    """EXAONE 3 without a head."""


class ModeGPTExaoneForCausalLM(ModeGPTModelMixin, LlamaForCausalLM):
    """EXAONE 3 with a language model's head."""


MODELS = register(
    FAMILY,
    ModeGPTExaoneConfig,
    ModeGPTExaoneAttention,
    AutoModel=ModeGPTExaoneModel,
    AutoModelForCausalLM=ModeGPTExaoneForCausalLM,
)
