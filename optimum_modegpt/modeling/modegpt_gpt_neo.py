"""Compressed GPT-Neo: also remote code, see modegpt_common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.gpt_neo.configuration_gpt_neo import GPTNeoConfig
from transformers.models.gpt_neo.modeling_gpt_neo import (
    GPTNeoForCausalLM,
    GPTNeoForSequenceClassification,
    GPTNeoModel,
    GPTNeoSelfAttention,
)

from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Family, Head, Norm, Positions, Residual
from .modegpt_scores import ModeGPTScoresMixin

FAMILY = Family(
    "gpt_neo",
    blocks="h",
    attention=Attention(
        "attn.attention",
        query="attn.attention.q_proj",
        key="attn.attention.k_proj",
        value="attn.attention.v_proj",
        output="attn.attention.out_proj",
        positions=Positions("none"),
        dropout="attn_dropout.p",
        output_dropout="attn.attention.resid_dropout",
    ),
    mlp=MLP(inputs=("mlp.c_fc",), output="mlp.c_proj", activation="mlp.act", width_factor=4),
    norm=Norm(centred=True),
    residual=Residual("ln_1", "ln_2"),
    head=Head("ln_f"),
    returns_tuple=True,
)


class ModeGPTGPTNeoConfig(ModeGPTConfigMixin, GPTNeoConfig):
    """GPT-Neo with the widths of each block in `per_layer_config`."""


class ModeGPTGPTNeoSelfAttention(ModeGPTScoresMixin, GPTNeoSelfAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """GPT-Neo's attention with separate widths for query and key heads, and for value heads."""

    scaling = 1.0
    float32_scores = True

    @property
    def layer_idx(self) -> int:
        """The index of the block."""
        return self.layer_id

    def score_bias(self, query: Tensor, key: Tensor, **kwargs: Any) -> Tensor:
        """Return a bias that hides later tokens, and those before the window of a local layer."""
        queries, keys = query.shape[2], key.shape[2]
        seen = self.bias[:, :, keys - queries : keys, :keys]
        return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


class ModeGPTGPTNeoModel(ModeGPTModelMixin, GPTNeoModel):
    """GPT-Neo without a head."""


class ModeGPTGPTNeoForCausalLM(ModeGPTModelMixin, GPTNeoForCausalLM):
    """GPT-Neo with a language model's head."""


class ModeGPTGPTNeoForSequenceClassification(ModeGPTModelMixin, GPTNeoForSequenceClassification):
    """GPT-Neo with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTGPTNeoConfig,
    ModeGPTGPTNeoSelfAttention,
    AutoModel=ModeGPTGPTNeoModel,
    AutoModelForCausalLM=ModeGPTGPTNeoForCausalLM,
    AutoModelForSequenceClassification=ModeGPTGPTNeoForSequenceClassification,
)
