"""Compressed Phi: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.phi.configuration_phi import PhiConfig
from transformers.models.phi.modeling_phi import PhiAttention, PhiForCausalLM, PhiForSequenceClassification, PhiModel

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Family, Head, HeadNorms, Norm, Positions, Residual

FAMILY = Family(
    "phi",
    attention=Attention(
        output="self_attn.dense",
        positions=Positions(partial=True),
        head_norms=HeadNorms("self_attn.q_layernorm", "self_attn.k_layernorm", flag="qk_layernorm"),
    ),
    mlp=MLP(inputs=("mlp.fc1",), output="mlp.fc2", activation="mlp.activation_fn"),
    norm=Norm(centred=True),
    residual=Residual("input_layernorm", "input_layernorm", topology="parallel"),
    head=Head("final_layernorm"),
)


class ModeGPTPhiConfig(ModeGPTConfigMixin, PhiConfig):
    """Phi with the widths of each block in `per_layer_config`."""


class ModeGPTPhiAttention(ModeGPTAttentionMixin, PhiAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Phi's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTPhiModel(ModeGPTModelMixin, PhiModel):
    """Phi without a head."""


class ModeGPTPhiForCausalLM(ModeGPTModelMixin, PhiForCausalLM):
    """Phi with a language model's head."""


class ModeGPTPhiForSequenceClassification(ModeGPTModelMixin, PhiForSequenceClassification):
    """Phi with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTPhiConfig,
    ModeGPTPhiAttention,
    AutoModel=ModeGPTPhiModel,
    AutoModelForCausalLM=ModeGPTPhiForCausalLM,
    AutoModelForSequenceClassification=ModeGPTPhiForSequenceClassification,
)
