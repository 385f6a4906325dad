"""Compressed Qwen2: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Model,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family, StockClass

FAMILY = Family(
    "qwen2",
    attention=Attention(score_arguments=(("sliding_window", "sliding_window"),)),
    stock=StockClass("llama", values=(("attention_bias", True),)),
)


class ModeGPTQwen2Config(ModeGPTConfigMixin, Qwen2Config):
    """Qwen2 with the widths of each block in `per_layer_config`."""


class ModeGPTQwen2Attention(ModeGPTAttentionMixin, Qwen2Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Qwen2's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTQwen2Model(ModeGPTModelMixin, Qwen2Model):
    """Qwen2 without a head."""


class ModeGPTQwen2ForCausalLM(ModeGPTModelMixin, Qwen2ForCausalLM):
    """Qwen2 with a language model's head."""


class ModeGPTQwen2ForSequenceClassification(ModeGPTModelMixin, Qwen2ForSequenceClassification):
    """Qwen2 with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTQwen2Config,
    ModeGPTQwen2Attention,
    AutoModel=ModeGPTQwen2Model,
    AutoModelForCausalLM=ModeGPTQwen2ForCausalLM,
    AutoModelForSequenceClassification=ModeGPTQwen2ForSequenceClassification,
)
