"""Compressed Phi-3: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.phi3.configuration_phi3 import Phi3Config
from transformers.models.phi3.modeling_phi3 import (
    Phi3Attention,
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
    Phi3MLP,
    Phi3Model,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_blocks import ModeGPTMLPMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Family, Positions, StockClass, Storage

FAMILY = Family(
    "phi3",
    attention=Attention(
        storage=Storage("stacked", "self_attn.qkv_proj"),
        positions=Positions(partial=True),
        score_arguments=(("sliding_window", "config.sliding_window"),),
    ),
    mlp=MLP(storage=Storage("stacked", "mlp.gate_up_proj"), activation="mlp.activation_fn"),
    stock=StockClass("llama"),
)


class ModeGPTPhi3Config(ModeGPTConfigMixin, Phi3Config):
    """Phi-3 with the widths of each block in `per_layer_config`."""


class ModeGPTPhi3Attention(ModeGPTAttentionMixin, Phi3Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Phi-3's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTPhi3MLP(ModeGPTMLPMixin, Phi3MLP):
    """Phi-3's MLP with separate gate and up projections."""


class ModeGPTPhi3Model(ModeGPTModelMixin, Phi3Model):
    """Phi-3 without a head."""


class ModeGPTPhi3ForCausalLM(ModeGPTModelMixin, Phi3ForCausalLM):
    """Phi-3 with a language model's head."""


class ModeGPTPhi3ForSequenceClassification(ModeGPTModelMixin, Phi3ForSequenceClassification):
    """Phi-3 with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTPhi3Config,
    ModeGPTPhi3Attention,
    ModeGPTPhi3MLP,
    AutoModel=ModeGPTPhi3Model,
    AutoModelForCausalLM=ModeGPTPhi3ForCausalLM,
    AutoModelForSequenceClassification=ModeGPTPhi3ForSequenceClassification,
)
