"""Compressed OPT: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.opt.configuration_opt import OPTConfig
from transformers.models.opt.modeling_opt import (
    OPTAttention,
    OPTForCausalLM,
    OPTForSequenceClassification,
    OPTModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Family, Head, Norm, Positions, Residual

FAMILY = Family(
    "opt",
    blocks="decoder.layers",
    attention=Attention(output="self_attn.out_proj", positions=Positions("none"), dropout="dropout"),
    mlp=MLP(module=None, inputs=("fc1",), output="fc2", activation="activation_fn", width="ffn_dim"),
    norm=Norm(centred=True),
    residual=Residual(
        "self_attn_layer_norm",
        "final_layer_norm",
        flag="do_layer_norm_before",
        topology_without_flag="post-LN",
    ),
    head=Head("decoder.final_layer_norm", projection="decoder.project_out"),
    sizes=("word_embed_proj_dim",),
)


class ModeGPTOPTConfig(ModeGPTConfigMixin, OPTConfig):
    """OPT with the widths of each block in `per_layer_config`."""


class ModeGPTOPTAttention(ModeGPTAttentionMixin, OPTAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """OPT's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTOPTModel(ModeGPTModelMixin, OPTModel):
    """OPT without a head."""


class ModeGPTOPTForCausalLM(ModeGPTModelMixin, OPTForCausalLM):
    """OPT with a language model's head."""


class ModeGPTOPTForSequenceClassification(ModeGPTModelMixin, OPTForSequenceClassification):
    """OPT with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTOPTConfig,
    ModeGPTOPTAttention,
    AutoModel=ModeGPTOPTModel,
    AutoModelForCausalLM=ModeGPTOPTForCausalLM,
    AutoModelForSequenceClassification=ModeGPTOPTForSequenceClassification,
)
