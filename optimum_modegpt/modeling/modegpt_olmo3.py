"""Compressed OLMo 3: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.olmo3.configuration_olmo3 import Olmo3Config
from transformers.models.olmo3.modeling_olmo3 import (
    Olmo3Attention,
    Olmo3ForCausalLM,
    Olmo3ForSequenceClassification,
    Olmo3Model,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family, HeadNorms, Residual

FAMILY = Family(
    "olmo3",
    attention=Attention(
        head_norms=HeadNorms(over="projection"), score_arguments=(("sliding_window", "sliding_window"),)
    ),
    residual=Residual(
        attention_norm=None,
        mlp_norm=None,
        attention_output_norm="post_attention_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
    ),
)


class ModeGPTOlmo3Config(ModeGPTConfigMixin, Olmo3Config):
    """OLMo 3 with the widths of each block in `per_layer_config`."""


class ModeGPTOlmo3Attention(ModeGPTAttentionMixin, Olmo3Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """OLMo 3's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTOlmo3Model(ModeGPTModelMixin, Olmo3Model):
    """OLMo 3 without a head."""


class ModeGPTOlmo3ForCausalLM(ModeGPTModelMixin, Olmo3ForCausalLM):
    """OLMo 3 with a language model's head."""


class ModeGPTOlmo3ForSequenceClassification(ModeGPTModelMixin, Olmo3ForSequenceClassification):
    """OLMo 3 with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTOlmo3Config,
    ModeGPTOlmo3Attention,
    AutoModel=ModeGPTOlmo3Model,
    AutoModelForCausalLM=ModeGPTOlmo3ForCausalLM,
    AutoModelForSequenceClassification=ModeGPTOlmo3ForSequenceClassification,
)
