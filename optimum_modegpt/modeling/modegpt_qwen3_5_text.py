"""Compressed text model of Qwen3.5: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5Attention,
    Qwen3_5ForCausalLM,
    Qwen3_5TextForSequenceClassification,
    Qwen3_5TextModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family, HeadNorms, Norm, Positions, Storage

FAMILY = Family(
    "qwen3_5_text",
    attention=Attention(
        layers=("full_attention",),
        mixers=("linear_attn",),
        query="self_attn.query_proj",
        gate="self_attn.gate_proj",
        storage=Storage("gated", "self_attn.q_proj"),
        positions=Positions(partial=True),
        head_norms=HeadNorms(),
        values="coordinates",
    ),
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


class ModeGPTQwen3_5Attention(ModeGPTAttentionMixin, Qwen3_5Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Qwen3.5's softmax attention with separate widths for query and key heads, and for value heads."""


class ModeGPTQwen3_5TextModel(ModeGPTModelMixin, Qwen3_5TextModel):
    """The text model of Qwen3.5 without a head."""


class ModeGPTQwen3_5ForCausalLM(ModeGPTModelMixin, Qwen3_5ForCausalLM):
    """The text model of Qwen3.5 with a language model's head."""


class ModeGPTQwen3_5TextForSequenceClassification(ModeGPTModelMixin, Qwen3_5TextForSequenceClassification):
    """The text model of Qwen3.5 with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTQwen3_5TextConfig,
    ModeGPTQwen3_5Attention,
    AutoModel=ModeGPTQwen3_5TextModel,
    AutoModelForCausalLM=ModeGPTQwen3_5ForCausalLM,
    AutoModelForSequenceClassification=ModeGPTQwen3_5TextForSequenceClassification,
)
