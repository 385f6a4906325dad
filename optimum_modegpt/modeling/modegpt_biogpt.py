"""Compressed BioGPT: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.biogpt.configuration_biogpt import BioGptConfig
from transformers.models.biogpt.modeling_biogpt import (
    BioGptAttention,
    BioGptForCausalLM,
    BioGptForSequenceClassification,
    BioGptModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Family, Head, Norm, Positions, Residual

FAMILY = Family(
    "biogpt",
    attention=Attention(output="self_attn.out_proj", positions=Positions("none"), dropout="dropout"),
    mlp=MLP(module=None, inputs=("fc1",), output="fc2", activation="activation_fn"),
    norm=Norm(centred=True),
    residual=Residual("self_attn_layer_norm", "final_layer_norm"),
    head=Head("layer_norm", output="output_projection"),
)


class ModeGPTBioGptConfig(ModeGPTConfigMixin, BioGptConfig):
    """BioGPT with the widths of each block in `per_layer_config`."""


class ModeGPTBioGptAttention(ModeGPTAttentionMixin, BioGptAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """BioGPT's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTBioGptModel(ModeGPTModelMixin, BioGptModel):
    """BioGPT without a head."""


class ModeGPTBioGptForCausalLM(ModeGPTModelMixin, BioGptForCausalLM):
    """BioGPT with a language model's head."""


class ModeGPTBioGptForSequenceClassification(ModeGPTModelMixin, BioGptForSequenceClassification):
    """BioGPT with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTBioGptConfig,
    ModeGPTBioGptAttention,
    AutoModel=ModeGPTBioGptModel,
    AutoModelForCausalLM=ModeGPTBioGptForCausalLM,
    AutoModelForSequenceClassification=ModeGPTBioGptForSequenceClassification,
)
