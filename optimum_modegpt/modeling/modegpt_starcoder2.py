"""Compressed StarCoder2: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.starcoder2.configuration_starcoder2 import Starcoder2Config
from transformers.models.starcoder2.modeling_starcoder2 import (
    Starcoder2Attention,
    Starcoder2ForCausalLM,
    Starcoder2ForSequenceClassification,
    Starcoder2Model,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Family, Norm

FAMILY = Family(
    "starcoder2",
    attention=Attention(
        score_arguments=(("sliding_window", "config.sliding_window"),), output_dropout="self_attn.residual_dropout"
    ),
    mlp=MLP(inputs=("mlp.c_fc",), output="mlp.c_proj", activation="mlp.act"),
    norm=Norm(centred=True),
)


class ModeGPTStarcoder2Config(ModeGPTConfigMixin, Starcoder2Config):
    """StarCoder2 with the widths of each block in `per_layer_config`."""


class ModeGPTStarcoder2Attention(ModeGPTAttentionMixin, Starcoder2Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """StarCoder2's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTStarcoder2Model(ModeGPTModelMixin, Starcoder2Model):
    """StarCoder2 without a head."""


class ModeGPTStarcoder2ForCausalLM(ModeGPTModelMixin, Starcoder2ForCausalLM):
    """StarCoder2 with a language model's head."""


class ModeGPTStarcoder2ForSequenceClassification(ModeGPTModelMixin, Starcoder2ForSequenceClassification):
    """StarCoder2 with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTStarcoder2Config,
    ModeGPTStarcoder2Attention,
    AutoModel=ModeGPTStarcoder2Model,
    AutoModelForCausalLM=ModeGPTStarcoder2ForCausalLM,
    AutoModelForSequenceClassification=ModeGPTStarcoder2ForSequenceClassification,
)
