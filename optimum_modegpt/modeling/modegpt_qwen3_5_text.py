"""Compressed text model of Qwen3.5: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5ForCausalLM,
    Qwen3_5TextForSequenceClassification,
    Qwen3_5TextModel,
)

from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family, Norm

FAMILY = Family(
    "qwen3_5_text",
    attention=Attention(layers=(), mixers=("linear_attn", "self_attn")),
    norm=Norm(offset=1.0),
    sizes=(
        "linear_conv_kernel_dim",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
    ),
)


class ModeGPTQwen3_5TextConfig(ModeGPTConfigMixin, Qwen3_5TextConfig):
    """The text model of Qwen3.5 with the widths of each block in `per_layer_config`."""


class ModeGPTQwen3_5TextModel(ModeGPTModelMixin, Qwen3_5TextModel):
    """The text model of Qwen3.5 without a head."""


class ModeGPTQwen3_5ForCausalLM(ModeGPTModelMixin, Qwen3_5ForCausalLM):
    """The text model of Qwen3.5 with a language model's head."""


class ModeGPTQwen3_5TextForSequenceClassification(ModeGPTModelMixin, Qwen3_5TextForSequenceClassification):
    """The text model of Qwen3.5 with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTQwen3_5TextConfig,
    AutoModel=ModeGPTQwen3_5TextModel,
    AutoModelForCausalLM=ModeGPTQwen3_5ForCausalLM,
    AutoModelForSequenceClassification=ModeGPTQwen3_5TextForSequenceClassification,
)
