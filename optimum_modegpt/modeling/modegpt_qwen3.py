"""Compressed Qwen3: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3Model,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family, HeadNorms

FAMILY = Family(
    "qwen3",
    attention=Attention(head_norms=HeadNorms(), score_arguments=(("sliding_window", "sliding_window"),)),
)


class ModeGPTQwen3Config(ModeGPTConfigMixin, Qwen3Config):
    """Qwen3 with the widths of each block in `per_layer_config`."""


class ModeGPTQwen3Attention(ModeGPTAttentionMixin, Qwen3Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Qwen3's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTQwen3Model(ModeGPTModelMixin, Qwen3Model):
    """Qwen3 without a head."""


class ModeGPTQwen3ForCausalLM(ModeGPTModelMixin, Qwen3ForCausalLM):
    """Qwen3 with a language model's head."""


class ModeGPTQwen3ForSequenceClassification(ModeGPTModelMixin, Qwen3ForSequenceClassification):
    """Qwen3 with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTQwen3Config,
    ModeGPTQwen3Attention,
    AutoModel=ModeGPTQwen3Model,
    AutoModelForCausalLM=ModeGPTQwen3ForCausalLM,
    AutoModelForSequenceClassification=ModeGPTQwen3ForSequenceClassification,
)
