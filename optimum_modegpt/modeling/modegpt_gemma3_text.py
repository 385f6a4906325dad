"""Compressed Gemma 3: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3Attention,
    Gemma3ForCausalLM,
    Gemma3TextForSequenceClassification,
    Gemma3TextModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family, Head, HeadNorms, Norm, Residual

FAMILY = Family(
    "gemma3_text",
    attention=Attention(head_norms=HeadNorms(), score_arguments=(("sliding_window", "sliding_window"),)),
    norm=Norm(offset=1.0),
    residual=Residual(
        mlp_norm="pre_feedforward_layernorm",
        attention_output_norm="post_attention_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
    ),
    head=Head(cap="final_logit_softcapping"),
    refused=("use_bidirectional_attention",),
)


class ModeGPTGemma3TextConfig(ModeGPTConfigMixin, Gemma3TextConfig):
    """Gemma 3 with the widths of each block in `per_layer_config`."""


class ModeGPTGemma3Attention(ModeGPTAttentionMixin, Gemma3Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Gemma 3's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTGemma3TextModel(ModeGPTModelMixin, Gemma3TextModel):
    """Gemma 3 without a head."""


class ModeGPTGemma3ForCausalLM(ModeGPTModelMixin, Gemma3ForCausalLM):
    """Gemma 3 with a language model's head."""


class ModeGPTGemma3TextForSequenceClassification(ModeGPTModelMixin, Gemma3TextForSequenceClassification):
    """Gemma 3 with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTGemma3TextConfig,
    ModeGPTGemma3Attention,
    AutoModel=ModeGPTGemma3TextModel,
    AutoModelForCausalLM=ModeGPTGemma3ForCausalLM,
    AutoModelForSequenceClassification=ModeGPTGemma3TextForSequenceClassification,
)
