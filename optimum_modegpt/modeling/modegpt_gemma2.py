"""Compressed Gemma 2: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2Attention,
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    Gemma2Model,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family, Head, Norm, Residual

FAMILY = Family(
    "gemma2",
    attention=Attention(
        score_arguments=(("sliding_window", "sliding_window"), ("softcap", "attn_logit_softcapping")),
    ),
    norm=Norm(offset=1.0),
    residual=Residual(
        mlp_norm="pre_feedforward_layernorm",
        attention_output_norm="post_attention_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
    ),
    head=Head(cap="final_logit_softcapping"),
)


class ModeGPTGemma2Config(ModeGPTConfigMixin, Gemma2Config):
    """Gemma 2 with the widths of each block in `per_layer_config`."""


class ModeGPTGemma2Attention(ModeGPTAttentionMixin, Gemma2Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Gemma 2's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTGemma2Model(ModeGPTModelMixin, Gemma2Model):
    """Gemma 2 without a head."""


class ModeGPTGemma2ForCausalLM(ModeGPTModelMixin, Gemma2ForCausalLM):
    """Gemma 2 with a language model's head."""


class ModeGPTGemma2ForSequenceClassification(ModeGPTModelMixin, Gemma2ForSequenceClassification):
    """Gemma 2 with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTGemma2Config,
    ModeGPTGemma2Attention,
    AutoModel=ModeGPTGemma2Model,
    AutoModelForCausalLM=ModeGPTGemma2ForCausalLM,
    AutoModelForSequenceClassification=ModeGPTGemma2ForSequenceClassification,
)
