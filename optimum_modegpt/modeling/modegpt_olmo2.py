"""Compressed OLMo 2: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.olmo2.configuration_olmo2 import Olmo2Config
from transformers.models.olmo2.modeling_olmo2 import (
    Olmo2Attention,
    Olmo2ForCausalLM,
    Olmo2ForSequenceClassification,
    Olmo2Model,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family, HeadNorms, Residual

FAMILY = Family(
    "olmo2",
    attention=Attention(head_norms=HeadNorms(over="projection")),
    residual=Residual(
        attention_norm=None,
        mlp_norm=None,
        attention_output_norm="post_attention_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
    ),
)


class ModeGPTOlmo2Config(ModeGPTConfigMixin, Olmo2Config):
    """OLMo 2 with the widths of each block in `per_layer_config`."""


class ModeGPTOlmo2Attention(ModeGPTAttentionMixin, Olmo2Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """OLMo 2's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTOlmo2Model(ModeGPTModelMixin, Olmo2Model):
    """OLMo 2 without a head."""


class ModeGPTOlmo2ForCausalLM(ModeGPTModelMixin, Olmo2ForCausalLM):
    """OLMo 2 with a language model's head."""


class ModeGPTOlmo2ForSequenceClassification(ModeGPTModelMixin, Olmo2ForSequenceClassification):
    """OLMo 2 with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTOlmo2Config,
    ModeGPTOlmo2Attention,
    AutoModel=ModeGPTOlmo2Model,
    AutoModelForCausalLM=ModeGPTOlmo2ForCausalLM,
    AutoModelForSequenceClassification=ModeGPTOlmo2ForSequenceClassification,
)
