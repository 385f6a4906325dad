"""Compressed OPT: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.opt.configuration_opt import OPTConfig
from transformers.models.opt.modeling_opt import (
    OPTAttention,
    OPTForCausalLM,
    OPTForSequenceClassification,
    OPTModel,
)

from .modegpt_common import BlockLayout, ModeGPTAttentionMixin, ModeGPTConfigMixin, ModeGPTModelMixin, register


class ModeGPTOPTConfig(ModeGPTConfigMixin, OPTConfig):
    """OPT with the widths of each block in `per_layer_config`."""

    model_type = "modegpt_opt"
    _auto_class = "AutoConfig"
    layout = BlockLayout(
        blocks="decoder.layers",
        mlp_inputs=("fc1",),
        mlp_output="fc2",
        mlp_width="ffn_dim",
        output="self_attn.out_proj",
    )


class ModeGPTOPTAttention(ModeGPTAttentionMixin, OPTAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """OPT's attention with query/key and value heads of widths of their own."""

    output_name = "out_proj"
    rotary = False
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
