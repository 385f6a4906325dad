"""Compressed GPT-J: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.gptj.configuration_gptj import GPTJConfig
from transformers.models.gptj.modeling_gptj import (
    GPTJAttention,
    GPTJForCausalLM,
    GPTJForSequenceClassification,
    GPTJModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Family, Head, Norm, Positions, Residual

FAMILY = Family(
    "gptj",
    blocks="h",
    attention=Attention(
        "attn",
        query="attn.q_proj",
        key="attn.k_proj",
        value="attn.v_proj",
        output="attn.out_proj",
        positions=Positions("interleaved", width="rotary_dim", table="single", sine_first=True),
        output_dropout="attn.resid_dropout",
    ),
    mlp=MLP(inputs=("mlp.fc_in",), output="mlp.fc_out", activation="mlp.act", width="n_inner", width_factor=4),
    norm=Norm(centred=True),
    residual=Residual("ln_1", "ln_1", topology="parallel"),
    head=Head("ln_f"),
    since="5.24.0",
)


class ModeGPTGPTJConfig(ModeGPTConfigMixin, GPTJConfig):
    """GPT-J with the widths of each block in `per_layer_config`."""


class ModeGPTGPTJAttention(ModeGPTAttentionMixin, GPTJAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """GPT-J's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTGPTJModel(ModeGPTModelMixin, GPTJModel):
    """GPT-J without a head."""


class ModeGPTGPTJForCausalLM(ModeGPTModelMixin, GPTJForCausalLM):
    """GPT-J with a language model's head."""


class ModeGPTGPTJForSequenceClassification(ModeGPTModelMixin, GPTJForSequenceClassification):
    """GPT-J with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTGPTJConfig,
    ModeGPTGPTJAttention,
    AutoModel=ModeGPTGPTJModel,
    AutoModelForCausalLM=ModeGPTGPTJForCausalLM,
    AutoModelForSequenceClassification=ModeGPTGPTJForSequenceClassification,
)
