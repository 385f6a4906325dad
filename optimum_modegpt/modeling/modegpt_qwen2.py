"""Compressed Qwen2: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Model,
)

from .modegpt_common import ModeGPTAttentionMixin, ModeGPTConfigMixin, ModeGPTModelMixin, register
from .modegpt_family import Family

FAMILY = Family("qwen2")


class ModeGPTQwen2Config(ModeGPTConfigMixin, Qwen2Config):
    """Qwen2 with the widths of each block in `per_layer_config`."""

    model_type = FAMILY.compressed_type
    _auto_class = "AutoConfig"
    family = FAMILY


class ModeGPTQwen2Attention(ModeGPTAttentionMixin, Qwen2Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Qwen2's attention with query/key and value heads of widths of their own."""

    family = FAMILY


class _Compressed(ModeGPTModelMixin):
    config_class = ModeGPTQwen2Config
    attention_class = ModeGPTQwen2Attention


class ModeGPTQwen2Model(_Compressed, Qwen2Model):
    """Qwen2 without a head."""

    _auto_class = "AutoModel"


class ModeGPTQwen2ForCausalLM(_Compressed, Qwen2ForCausalLM):
    """Qwen2, language model."""

    _auto_class = "AutoModelForCausalLM"


class ModeGPTQwen2ForSequenceClassification(_Compressed, Qwen2ForSequenceClassification):
    """Qwen2 with a classification head."""

    _auto_class = "AutoModelForSequenceClassification"


MODELS = register(ModeGPTQwen2Model, ModeGPTQwen2ForCausalLM, ModeGPTQwen2ForSequenceClassification)
