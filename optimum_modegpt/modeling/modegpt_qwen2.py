"""Compressed Qwen2: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Model,
)

from .modegpt_common import BlockLayout, ModeGPTAttentionMixin, ModeGPTConfigMixin, ModeGPTModelMixin, auto_classes


class ModeGPTQwen2Config(ModeGPTConfigMixin, Qwen2Config):
    """Qwen2 with the widths of each block in `per_layer_config`."""

    model_type = "modegpt_qwen2"
    _auto_class = "AutoConfig"
    layout = BlockLayout(
        blocks="layers",
        mlp_inputs=("mlp.gate_proj", "mlp.up_proj"),
        mlp_output="mlp.down_proj",
        mlp_width="intermediate_size",
    )


class ModeGPTQwen2Attention(ModeGPTAttentionMixin, Qwen2Attention):
    """Qwen2's attention with query/key and value heads of widths of their own."""


class ModeGPTQwen2Model(ModeGPTModelMixin, Qwen2Model):
    """Qwen2 without a head."""

    config_class = ModeGPTQwen2Config
    attention_class = ModeGPTQwen2Attention
    _auto_class = "AutoModel"


class ModeGPTQwen2ForCausalLM(ModeGPTModelMixin, Qwen2ForCausalLM):
    """Qwen2, language model."""

    config_class = ModeGPTQwen2Config
    attention_class = ModeGPTQwen2Attention
    _auto_class = "AutoModelForCausalLM"


class ModeGPTQwen2ForSequenceClassification(ModeGPTModelMixin, Qwen2ForSequenceClassification):
    """Qwen2 with a classification head."""

    config_class = ModeGPTQwen2Config
    attention_class = ModeGPTQwen2Attention
    _auto_class = "AutoModelForSequenceClassification"


MODELS = {
    "AutoModel": ModeGPTQwen2Model,
    "AutoModelForCausalLM": ModeGPTQwen2ForCausalLM,
    "AutoModelForSequenceClassification": ModeGPTQwen2ForSequenceClassification,
}
ModeGPTQwen2Config.auto_classes = auto_classes(ModeGPTQwen2Config, **MODELS)

AutoConfig.register(ModeGPTQwen2Config.model_type, ModeGPTQwen2Config, exist_ok=True)
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
    auto.register(ModeGPTQwen2Config, MODELS[auto.__name__], exist_ok=True)
