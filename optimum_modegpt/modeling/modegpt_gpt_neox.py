"""Compressed GPT-NeoX: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.gpt_neox.configuration_gpt_neox import GPTNeoXConfig
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXAttention,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    GPTNeoXModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Family, Head, Norm, Positions, Residual, Storage

FAMILY = Family(
    "gpt_neox",
    attention=Attention(
        "attention",
        query="attention.q_proj",
        key="attention.k_proj",
        value="attention.v_proj",
        output="attention.dense",
        storage=Storage("per head", "attention.query_key_value"),
        positions=Positions(partial=True),
        head_dim="head_size",
    ),
    mlp=MLP(inputs=("mlp.dense_h_to_4h",), output="mlp.dense_4h_to_h", activation="mlp.act"),
    norm=Norm(centred=True),
    residual=Residual(topology="parallel", flag="use_parallel_residual", topology_without_flag="sequential"),
    head=Head("final_layer_norm"),
)


class ModeGPTGPTNeoXConfig(ModeGPTConfigMixin, GPTNeoXConfig):
    """GPT-NeoX with the widths of each block in `per_layer_config`."""


class ModeGPTGPTNeoXAttention(ModeGPTAttentionMixin, GPTNeoXAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """GPT-NeoX's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTGPTNeoXModel(ModeGPTModelMixin, GPTNeoXModel):
    """GPT-NeoX without a head."""


class ModeGPTGPTNeoXForCausalLM(ModeGPTModelMixin, GPTNeoXForCausalLM):
    """GPT-NeoX with a language model's head."""


class ModeGPTGPTNeoXForSequenceClassification(ModeGPTModelMixin, GPTNeoXForSequenceClassification):
    """GPT-NeoX with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTGPTNeoXConfig,
    ModeGPTGPTNeoXAttention,
    AutoModel=ModeGPTGPTNeoXModel,
    AutoModelForCausalLM=ModeGPTGPTNeoXForCausalLM,
    AutoModelForSequenceClassification=ModeGPTGPTNeoXForSequenceClassification,
)
