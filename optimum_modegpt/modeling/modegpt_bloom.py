"""Compressed BLOOM: also remote code, see modegpt_common."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.bloom.configuration_bloom import BloomConfig
from transformers.models.bloom.modeling_bloom import (
    BloomAttention,
    BloomForCausalLM,
    BloomForSequenceClassification,
    BloomModel,
)

from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Family, Head, Norm, Positions, Residual, Storage
from .modegpt_scores import ModeGPTScoresMixin

FAMILY = Family(
    "bloom",
    blocks="h",
    attention=Attention(
        "self_attention",
        query="self_attention.q_proj",
        key="self_attention.k_proj",
        value="self_attention.v_proj",
        output="self_attention.dense",
        storage=Storage("per head", "self_attention.query_key_value"),
        positions=Positions("none"),
        dropout="attention_dropout.p",
        passed_on=("alibi", "residual"),
        per_sequence="alibi",
    ),
    mlp=MLP(
        inputs=("mlp.dense_h_to_4h",),
        output="mlp.dense_4h_to_h",
        activation="mlp.gelu_impl",
        activation_name="gelu_fast",
        width_factor=4,
    ),
    norm=Norm(centred=True),
    residual=Residual(added_inside=("attention", "mlp")),
    head=Head("ln_f"),
    refused=("apply_residual_connection_post_layernorm", "slow_but_exact"),
    returns_tuple=True,
)


class ModeGPTBloomConfig(ModeGPTConfigMixin, BloomConfig):
    """BLOOM with the widths of each block in `per_layer_config`."""


class ModeGPTBloomAttention(ModeGPTScoresMixin, BloomAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """BLOOM's attention with separate widths for query and key heads, and for value heads."""

    @property
    def scaling(self) -> float:
        """The factor of the scores."""
        return self.inv_norm_factor

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor, residual: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Map (batch, length, d_model) to the same shape, and add the stream as the dense class does."""
        output, weights = super().forward(hidden_states, **kwargs)
        return residual + nn.functional.dropout(output, self.hidden_dropout, self.training), weights

    def score_bias(self, query: Tensor, key: Tensor, **kwargs: Any) -> Tensor:
        """Return alibi (batch · heads, 1, keys) as (batch, heads, 1, keys)."""
        return kwargs["alibi"].view(-1, self.num_heads, 1, key.shape[2])


class ModeGPTBloomModel(ModeGPTModelMixin, BloomModel):
    """BLOOM without a head."""


class ModeGPTBloomForCausalLM(ModeGPTModelMixin, BloomForCausalLM):
    """BLOOM with a language model's head."""


class ModeGPTBloomForSequenceClassification(ModeGPTModelMixin, BloomForSequenceClassification):
    """BLOOM with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTBloomConfig,
    ModeGPTBloomAttention,
    AutoModel=ModeGPTBloomModel,
    AutoModelForCausalLM=ModeGPTBloomForCausalLM,
    AutoModelForSequenceClassification=ModeGPTBloomForSequenceClassification,
)
