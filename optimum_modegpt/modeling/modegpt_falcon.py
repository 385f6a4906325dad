"""Compressed Falcon: also remote code, see modegpt_common."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.falcon.configuration_falcon import FalconConfig
from transformers.models.falcon.modeling_falcon import (
    FalconAttention,
    FalconForCausalLM,
    FalconForSequenceClassification,
    FalconModel,
)

from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Family, Head, Norm, Positions, Residual, Storage
from .modegpt_scores import ModeGPTScoresMixin

FAMILY = Family(
    "falcon",
    blocks="h",
    attention=Attention(
        "self_attention",
        query="self_attention.q_proj",
        key="self_attention.k_proj",
        value="self_attention.v_proj",
        output="self_attention.dense",
        storage=Storage("per group", "self_attention.query_key_value"),
        positions=Positions(layer_flag="config.rotary"),
        kv_heads="num_kv_heads",
        dropout="weights_dropout",
        passed_on=("alibi", "position_ids"),
        per_sequence="alibi",
    ),
    mlp=MLP(inputs=("mlp.dense_h_to_4h",), output="mlp.dense_4h_to_h", activation="mlp.act", width="ffn_hidden_size"),
    norm=Norm(centred=True),
    residual=Residual(
        ("ln_attn", "input_layernorm"),
        ("ln_mlp", "post_attention_layernorm", "input_layernorm"),
        topology="parallel",
        flag="parallel_attn",
    ),
    head=Head("ln_f"),
    sizes=("num_kv_heads",),
    returns_tuple=True,
    linear_class="FalconLinear",
)


class ModeGPTFalconConfig(ModeGPTConfigMixin, FalconConfig):
    """Falcon with the widths of each block in `per_layer_config`."""

    # In the dense class a property, which cannot be set for a block.
    head_dim = None  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self, **kwargs: Any) -> None:
        """Initialise as usual, without a number of key-value heads under the name that the dense class ignores."""
        kwargs.pop("num_key_value_heads", None)
        super().__post_init__(**kwargs)

    @property
    def num_key_value_heads(self) -> int | None:
        """The number of key-value heads."""
        return 1 if self.multi_query and not self.new_decoder_architecture else self.num_kv_heads


class ModeGPTFalconAttention(ModeGPTScoresMixin, FalconAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Falcon's attention with separate widths for query and key heads, and for value heads."""

    @property
    def scaling(self) -> float:
        """The factor of the scores."""
        return self.inv_norm_factor

    @property
    def num_key_value_groups(self) -> int:
        """The number of heads that share a key."""
        return self.num_heads // self.num_kv_heads

    @property
    def weights_dropout(self) -> float:
        """The dropout of the attention weights, which the dense class has only with alibi."""
        return 0.0 if self.rotates else self.attention_dropout.p

    @classmethod
    def adds_to_scores(cls, config: Any) -> bool:
        """Return whether the model adds alibi."""
        return config.alibi

    def score_bias(self, query: Tensor, key: Tensor, **kwargs: Any) -> Tensor | None:
        """Return the bias of eager attention. The mask contains alibi too, as in the dense class."""
        alibi = kwargs["alibi"]
        return None if alibi is None else alibi.view(-1, self.num_heads, 1, key.shape[2]) * self.scaling


class ModeGPTFalconModel(ModeGPTModelMixin, FalconModel):
    """Falcon without a head."""


class ModeGPTFalconForCausalLM(ModeGPTModelMixin, FalconForCausalLM):
    """Falcon with a language model's head."""


class ModeGPTFalconForSequenceClassification(ModeGPTModelMixin, FalconForSequenceClassification):
    """Falcon with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTFalconConfig,
    ModeGPTFalconAttention,
    AutoModel=ModeGPTFalconModel,
    AutoModelForCausalLM=ModeGPTFalconForCausalLM,
    AutoModelForSequenceClassification=ModeGPTFalconForSequenceClassification,
)
