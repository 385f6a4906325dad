"""Compressed Qwen2.5-VL with its vision tower: also remote code, see modegpt_common."""

from __future__ import annotations

from dataclasses import replace

from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLAttention,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTCompositeConfigMixin, ModeGPTConfigMixin
from .modegpt_family import Attention, Family, Head

# Before transformers 5.19, the attention chose the rotary angles of text, height and width itself.
TEXT = Family(
    "qwen2_5_vl_text",
    attention=Attention(score_arguments=(("sliding_window", "sliding_window"),), passed_on=("position_ids",)),
    since="5.19.0",
)
FAMILY = replace(TEXT, model_type="qwen2_5_vl", blocks="language_model.layers", head=Head("language_model.norm"))


class ModeGPTQwen2_5_VLTextConfig(ModeGPTConfigMixin, Qwen2_5_VLTextConfig):
    """The text tower of Qwen2.5-VL with the widths of each block in `per_layer_config`."""


class ModeGPTQwen2_5_VLConfig(ModeGPTCompositeConfigMixin, Qwen2_5_VLConfig):
    """Qwen2.5-VL with the widths of each block of its text tower in `text_config`."""

    text_class = ModeGPTQwen2_5_VLTextConfig


class ModeGPTQwen2_5_VLAttention(ModeGPTAttentionMixin, Qwen2_5_VLAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Qwen2.5-VL's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTQwen2_5_VLModel(ModeGPTModelMixin, Qwen2_5_VLModel):
    """Qwen2.5-VL without a head. Its vision tower is dense."""


class ModeGPTQwen2_5_VLForConditionalGeneration(ModeGPTModelMixin, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with a language model's head."""


# The dense model creates its text tower by the dense class, so the tower has no compressed class.
register(TEXT, ModeGPTQwen2_5_VLTextConfig, ModeGPTQwen2_5_VLAttention)
MODELS = register(
    FAMILY,
    ModeGPTQwen2_5_VLConfig,
    ModeGPTQwen2_5_VLAttention,
    AutoModel=ModeGPTQwen2_5_VLModel,
    AutoModelForCausalLM=ModeGPTQwen2_5_VLForConditionalGeneration,
    AutoModelForImageTextToText=ModeGPTQwen2_5_VLForConditionalGeneration,
)
