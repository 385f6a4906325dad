"""Compressed OPT: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.opt.configuration_opt import OPTConfig
from transformers.models.opt.modeling_opt import (
    OPTAttention,
    OPTForCausalLM,
    OPTForSequenceClassification,
    OPTModel,
)

from .modegpt_common import BlockLayout, ModeGPTAttentionMixin, ModeGPTConfigMixin, ModeGPTModelMixin, auto_classes


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


class ModeGPTOPTAttention(ModeGPTAttentionMixin, OPTAttention):
    """OPT's attention with query/key and value heads of widths of their own."""

    output_name = "out_proj"
    rotary = False
    num_key_value_groups = 1

    @property
    def attention_dropout(self) -> float:
        """The name under which the shared forward pass reads it."""
        return self.dropout



class ModeGPTOPTModel(ModeGPTModelMixin, OPTModel):
    """OPT without a head."""

    config_class = ModeGPTOPTConfig
    attention_class = ModeGPTOPTAttention
    _auto_class = "AutoModel"


class ModeGPTOPTForCausalLM(ModeGPTModelMixin, OPTForCausalLM):
    """OPT, language model."""

    config_class = ModeGPTOPTConfig
    attention_class = ModeGPTOPTAttention
    _auto_class = "AutoModelForCausalLM"


class ModeGPTOPTForSequenceClassification(ModeGPTModelMixin, OPTForSequenceClassification):
    """OPT with a classification head."""

    config_class = ModeGPTOPTConfig
    attention_class = ModeGPTOPTAttention
    _auto_class = "AutoModelForSequenceClassification"


MODELS = {
    "AutoModel": ModeGPTOPTModel,
    "AutoModelForCausalLM": ModeGPTOPTForCausalLM,
    "AutoModelForSequenceClassification": ModeGPTOPTForSequenceClassification,
}
ModeGPTOPTConfig.auto_classes = auto_classes(ModeGPTOPTConfig, **MODELS)

AutoConfig.register(ModeGPTOPTConfig.model_type, ModeGPTOPTConfig, exist_ok=True)
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
    auto.register(ModeGPTOPTConfig, MODELS[auto.__name__], exist_ok=True)
