"""Compressed Apertus: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.apertus.configuration_apertus import ApertusConfig
from transformers.models.apertus.modeling_apertus import ApertusAttention, ApertusForCausalLM, ApertusModel

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Family, HeadNorms, Residual

FAMILY = Family(
    "apertus",
    attention=Attention(head_norms=HeadNorms()),
    mlp=MLP(inputs=("mlp.up_proj",)),
    residual=Residual("attention_layernorm", "feedforward_layernorm"),
)


class ModeGPTApertusConfig(ModeGPTConfigMixin, ApertusConfig):
    """Apertus with the widths of each block in `per_layer_config`."""


class ModeGPTApertusAttention(ModeGPTAttentionMixin, ApertusAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Apertus's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTApertusModel(ModeGPTModelMixin, ApertusModel):
    """Apertus without a head."""


class ModeGPTApertusForCausalLM(ModeGPTModelMixin, ApertusForCausalLM):
    """Apertus with a language model's head."""


MODELS = register(
    FAMILY,
    ModeGPTApertusConfig,
    ModeGPTApertusAttention,
    AutoModel=ModeGPTApertusModel,
    AutoModelForCausalLM=ModeGPTApertusForCausalLM,
)
