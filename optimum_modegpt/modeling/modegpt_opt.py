"""Compressed OPT: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.opt.configuration_opt import OPTConfig
from transformers.models.opt.modeling_opt import (
    OPTAttention,
    OPTForCausalLM,
    OPTForSequenceClassification,
    OPTModel,
)

from .modegpt_common import ModeGPTAttentionMixin, ModeGPTConfigMixin, ModeGPTModelMixin, register
from .modegpt_family import MLP, Attention, Family, Head, Residual

FAMILY = Family(
    "opt",
    blocks="decoder.layers",
    attention=Attention(output="self_attn.out_proj", rotary=False),
    mlp=MLP(inputs=("fc1",), output="fc2", activation="activation_fn", width="ffn_dim"),
    residual=Residual("self_attn_layer_norm", "final_layer_norm", norm_first_flag="do_layer_norm_before"),
    head=Head("decoder.final_layer_norm", projection="decoder.project_out"),
)


class ModeGPTOPTConfig(ModeGPTConfigMixin, OPTConfig):
    """OPT with the widths of each block in `per_layer_config`."""

    model_type = FAMILY.compressed_type
    _auto_class = "AutoConfig"
    family = FAMILY


class ModeGPTOPTAttention(ModeGPTAttentionMixin, OPTAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """OPT's attention with query/key and value heads of widths of their own."""

    family = FAMILY
    num_key_value_groups = 1

    @property
    def attention_dropout(self) -> float:
        """The name under which the shared forward pass reads it."""
        return self.dropout


class _Compressed(ModeGPTModelMixin):
    config_class = ModeGPTOPTConfig
    attention_class = ModeGPTOPTAttention


class ModeGPTOPTModel(_Compressed, OPTModel):
    """OPT without a head."""

    _auto_class = "AutoModel"


class ModeGPTOPTForCausalLM(_Compressed, OPTForCausalLM):
    """OPT, language model."""

    _auto_class = "AutoModelForCausalLM"


class ModeGPTOPTForSequenceClassification(_Compressed, OPTForSequenceClassification):
    """OPT with a classification head."""

    _auto_class = "AutoModelForSequenceClassification"


MODELS = register(ModeGPTOPTModel, ModeGPTOPTForCausalLM, ModeGPTOPTForSequenceClassification)
