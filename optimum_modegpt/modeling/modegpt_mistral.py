"""Compressed Mistral: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralForCausalLM,
    MistralForSequenceClassification,
    MistralModel,
)

from .modegpt_common import BlockLayout, ModeGPTAttentionMixin, ModeGPTConfigMixin, ModeGPTModelMixin, auto_classes


class ModeGPTMistralConfig(ModeGPTConfigMixin, MistralConfig):
    """Mistral with the widths of each block in `per_layer_config`."""

    model_type = "modegpt_mistral"
    _auto_class = "AutoConfig"
    layout = BlockLayout(
        blocks="layers",
        mlp_inputs=("mlp.gate_proj", "mlp.up_proj"),
        mlp_output="mlp.down_proj",
        mlp_width="intermediate_size",
    )


class ModeGPTMistralAttention(ModeGPTAttentionMixin, MistralAttention):
    """Mistral's attention with query/key and value heads of widths of their own."""


class ModeGPTMistralModel(ModeGPTModelMixin, MistralModel):
    """Mistral without a head."""

    config_class = ModeGPTMistralConfig
    attention_class = ModeGPTMistralAttention
    _auto_class = "AutoModel"


class ModeGPTMistralForCausalLM(ModeGPTModelMixin, MistralForCausalLM):
    """Mistral, language model."""

    config_class = ModeGPTMistralConfig
    attention_class = ModeGPTMistralAttention
    _auto_class = "AutoModelForCausalLM"


class ModeGPTMistralForSequenceClassification(ModeGPTModelMixin, MistralForSequenceClassification):
    """Mistral with a classification head."""

    config_class = ModeGPTMistralConfig
    attention_class = ModeGPTMistralAttention
    _auto_class = "AutoModelForSequenceClassification"


MODELS = {
    "AutoModel": ModeGPTMistralModel,
    "AutoModelForCausalLM": ModeGPTMistralForCausalLM,
    "AutoModelForSequenceClassification": ModeGPTMistralForSequenceClassification,
}
ModeGPTMistralConfig.auto_classes = auto_classes(ModeGPTMistralConfig, **MODELS)

AutoConfig.register(ModeGPTMistralConfig.model_type, ModeGPTMistralConfig, exist_ok=True)
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
    auto.register(ModeGPTMistralConfig, MODELS[auto.__name__], exist_ok=True)
