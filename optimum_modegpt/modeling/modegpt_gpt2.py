"""Compressed GPT-2: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import (
    GPT2Attention,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Family, Head, Norm, Positions, Residual, Storage

FAMILY = Family(
    "gpt2",
    blocks="h",
    attention=Attention(
        "attn",
        query="attn.q_proj",
        key="attn.k_proj",
        value="attn.v_proj",
        output="attn.c_proj",
        storage=Storage("stacked", "attn.c_attn", transposed=True),
        positions=Positions("none"),
        dropout="attn_dropout.p",
        output_dropout="attn.resid_dropout",
    ),
    mlp=MLP(
        inputs=("mlp.c_fc",),
        output="mlp.c_proj",
        storage=Storage(transposed=True),
        activation="mlp.act",
        width="n_inner",
        width_factor=4,
    ),
    norm=Norm(centred=True),
    residual=Residual("ln_1", "ln_2"),
    head=Head("ln_f"),
    refused=("add_cross_attention",),
)


class ModeGPTGPT2Config(ModeGPTConfigMixin, GPT2Config):
    """GPT-2 with the widths of each block in `per_layer_config`."""


class ModeGPTGPT2Attention(ModeGPTAttentionMixin, GPT2Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """GPT-2's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTGPT2Model(ModeGPTModelMixin, GPT2Model):
    """GPT-2 without a head."""


class ModeGPTGPT2LMHeadModel(ModeGPTModelMixin, GPT2LMHeadModel):
    """GPT-2 with a language model's head."""


class ModeGPTGPT2ForSequenceClassification(ModeGPTModelMixin, GPT2ForSequenceClassification):
    """GPT-2 with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTGPT2Config,
    ModeGPTGPT2Attention,
    AutoModel=ModeGPTGPT2Model,
    AutoModelForCausalLM=ModeGPTGPT2LMHeadModel,
    AutoModelForSequenceClassification=ModeGPTGPT2ForSequenceClassification,
)
