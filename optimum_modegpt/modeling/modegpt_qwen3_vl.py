"""Compressed Qwen3-VL with its vision tower: also remote code, see modegpt_common."""

from __future__ import annotations

from dataclasses import replace

from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig, Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLTextAttention,
    Qwen3VLTextModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTCompositeConfigMixin, ModeGPTConfigMixin
from .modegpt_family import Attention, Family, Head, HeadNorms

TEXT = Family("qwen3_vl_text", attention=Attention(head_norms=HeadNorms()))
FAMILY = replace(TEXT, model_type="qwen3_vl", blocks="language_model.layers", head=Head("language_model.norm"))


class ModeGPTQwen3VLTextConfig(ModeGPTConfigMixin, Qwen3VLTextConfig):
    """The text tower of Qwen3-VL with the widths of each block in `per_layer_config`."""


class ModeGPTQwen3VLConfig(ModeGPTCompositeConfigMixin, Qwen3VLConfig):
    """Qwen3-VL with the widths of each block of its text tower in `text_config`."""

    text_class = ModeGPTQwen3VLTextConfig


class ModeGPTQwen3VLTextAttention(ModeGPTAttentionMixin, Qwen3VLTextAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Qwen3-VL's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTQwen3VLTextModel(ModeGPTModelMixin, Qwen3VLTextModel):
    """The text tower of Qwen3-VL. Image features are added to the stream after its first blocks, not inside them."""


class ModeGPTQwen3VLModel(ModeGPTModelMixin, Qwen3VLModel):
    """Qwen3-VL without a head. Its vision tower is dense."""


class ModeGPTQwen3VLForConditionalGeneration(ModeGPTModelMixin, Qwen3VLForConditionalGeneration):
    """Qwen3-VL with a language model's head."""


register(TEXT, ModeGPTQwen3VLTextConfig, ModeGPTQwen3VLTextAttention, AutoModel=ModeGPTQwen3VLTextModel)
MODELS = register(
    FAMILY,
    ModeGPTQwen3VLConfig,
    ModeGPTQwen3VLTextAttention,
    AutoModel=ModeGPTQwen3VLModel,
    AutoModelForCausalLM=ModeGPTQwen3VLForConditionalGeneration,
    AutoModelForImageTextToText=ModeGPTQwen3VLForConditionalGeneration,
)
