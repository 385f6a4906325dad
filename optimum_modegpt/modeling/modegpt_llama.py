"""Compressed Llama: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

from .modegpt_common import BlockLayout, ModeGPTAttentionMixin, ModeGPTConfigMixin, ModeGPTModelMixin, auto_classes


class ModeGPTLlamaConfig(ModeGPTConfigMixin, LlamaConfig):
    """Llama with the widths of each block in `per_layer_config`."""

    model_type = "modegpt_llama"
    _auto_class = "AutoConfig"
    layout = BlockLayout(
        blocks="layers",
        mlp_inputs=("mlp.gate_proj", "mlp.up_proj"),
        mlp_output="mlp.down_proj",
        mlp_width="intermediate_size",
    )


class ModeGPTLlamaAttention(ModeGPTAttentionMixin, LlamaAttention):
    """Llama's attention with query/key and value heads of widths of their own."""


class ModeGPTLlamaModel(ModeGPTModelMixin, LlamaModel):
    """Llama without a head."""

    config_class = ModeGPTLlamaConfig
    attention_class = ModeGPTLlamaAttention
    _auto_class = "AutoModel"


class ModeGPTLlamaForCausalLM(ModeGPTModelMixin, LlamaForCausalLM):
    """Llama, language model."""

    config_class = ModeGPTLlamaConfig
    attention_class = ModeGPTLlamaAttention
    _auto_class = "AutoModelForCausalLM"


class ModeGPTLlamaForSequenceClassification(ModeGPTModelMixin, LlamaForSequenceClassification):
    """Llama with a classification head."""

    config_class = ModeGPTLlamaConfig
    attention_class = ModeGPTLlamaAttention
    _auto_class = "AutoModelForSequenceClassification"


MODELS = {
    "AutoModel": ModeGPTLlamaModel,
    "AutoModelForCausalLM": ModeGPTLlamaForCausalLM,
    "AutoModelForSequenceClassification": ModeGPTLlamaForSequenceClassification,
}
ModeGPTLlamaConfig.auto_classes = auto_classes(ModeGPTLlamaConfig, **MODELS)

AutoConfig.register(ModeGPTLlamaConfig.model_type, ModeGPTLlamaConfig, exist_ok=True)
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
    auto.register(ModeGPTLlamaConfig, MODELS[auto.__name__], exist_ok=True)
