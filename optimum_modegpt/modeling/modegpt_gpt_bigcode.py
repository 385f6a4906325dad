"""Compressed GPT-BigCode: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.gpt_bigcode.configuration_gpt_bigcode import GPTBigCodeConfig
from transformers.models.gpt_bigcode.modeling_gpt_bigcode import (
    GPTBigCodeAttention,
    GPTBigCodeForCausalLM,
    GPTBigCodeForSequenceClassification,
    GPTBigCodeModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Family, Head, Norm, Positions, Residual, Storage

FAMILY = Family(
    "gpt_bigcode",
    blocks="h",
    attention=Attention(
        "attn",
        query="attn.q_proj",
        key="attn.k_proj",
        value="attn.v_proj",
        output="attn.c_proj",
        storage=Storage("per group", "attn.c_attn"),
        positions=Positions("none"),
        dropout="attn_dropout",
        output_dropout="attn.resid_dropout",
    ),
    mlp=MLP(inputs=("mlp.c_fc",), output="mlp.c_proj", activation="mlp.act", width="n_inner", width_factor=4),
    norm=Norm(centred=True),
    residual=Residual("ln_1", "ln_2"),
    head=Head("ln_f"),
    refused=("add_cross_attention",),
)


class ModeGPTGPTBigCodeConfig(ModeGPTConfigMixin, GPTBigCodeConfig):
    """GPT-BigCode with the widths of each block in `per_layer_config`."""


class ModeGPTGPTBigCodeAttention(ModeGPTAttentionMixin, GPTBigCodeAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """GPT-BigCode's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTGPTBigCodeModel(ModeGPTModelMixin, GPTBigCodeModel):
    """GPT-BigCode without a head."""


class ModeGPTGPTBigCodeForCausalLM(ModeGPTModelMixin, GPTBigCodeForCausalLM):
    """GPT-BigCode with a language model's head."""


class ModeGPTGPTBigCodeForSequenceClassification(ModeGPTModelMixin, GPTBigCodeForSequenceClassification):
    """GPT-BigCode with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTGPTBigCodeConfig,
    ModeGPTGPTBigCodeAttention,
    AutoModel=ModeGPTGPTBigCodeModel,
    AutoModelForCausalLM=ModeGPTGPTBigCodeForCausalLM,
    AutoModelForSequenceClassification=ModeGPTGPTBigCodeForSequenceClassification,
)
