"""Compressed MPT: also remote code, see modegpt_common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.mpt.configuration_mpt import MptConfig
from transformers.models.mpt.modeling_mpt import (
    MptAttention,
    MptForCausalLM,
    MptForSequenceClassification,
    MptModel,
)

from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Family, Head, Norm, Positions, Residual, Storage
from .modegpt_scores import ModeGPTScoresMixin

FAMILY = Family(
    "mpt",
    blocks="blocks",
    attention=Attention(
        "attn",
        query="attn.q_proj",
        key="attn.k_proj",
        value="attn.v_proj",
        output="attn.out_proj",
        storage=Storage("stacked", "attn.Wqkv"),
        positions=Positions("none"),
        dropout="attn_dropout_p",
        clip="attn_config.clip_qkv",
        passed_on=("position_bias",),
    ),
    mlp=MLP("ffn", inputs=("ffn.up_proj",), output="ffn.down_proj", activation="ffn.act", width_factor=4),
    norm=Norm(centred=True),
    residual=Residual("norm_1", "norm_2", added_inside=("mlp",)),
    head=Head("norm_f"),
    sizes=("max_seq_len",),
    returns_tuple=True,
)


class ModeGPTMptConfig(ModeGPTConfigMixin, MptConfig):
    """MPT with the widths of each block in `per_layer_config`."""


class ModeGPTMptAttention(ModeGPTScoresMixin, MptAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """MPT's attention with separate widths for query and key heads, and for value heads."""

    @property
    def scaling(self) -> float:
        """The factor of the scores."""
        return self.softmax_scale

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """Map (batch, length, d_model) to the same shape. `attention_mask` is true where a query sees no key."""
        if attention_mask is not None:
            hidden = torch.finfo(hidden_states.dtype).min
            attention_mask = torch.where(attention_mask, hidden, 0.0).to(hidden_states.dtype)
        return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)

    def score_bias(self, query: Tensor, key: Tensor, **kwargs: Any) -> Tensor:
        """Return the last columns of alibi, (heads, 1, keys)."""
        return kwargs["position_bias"][..., -key.shape[2] :]


class ModeGPTMptModel(ModeGPTModelMixin, MptModel):
    """MPT without a head."""


class ModeGPTMptForCausalLM(ModeGPTModelMixin, MptForCausalLM):
    """MPT with a language model's head."""


class ModeGPTMptForSequenceClassification(ModeGPTModelMixin, MptForSequenceClassification):
    """MPT with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTMptConfig,
    ModeGPTMptAttention,
    AutoModel=ModeGPTMptModel,
    AutoModelForCausalLM=ModeGPTMptForCausalLM,
    AutoModelForSequenceClassification=ModeGPTMptForSequenceClassification,
)
