"""Compressed Gemma 3 with its vision tower: also remote code, see modegpt_common."""

from __future__ import annotations

from dataclasses import replace

from transformers.models.gemma3.configuration_gemma3 import Gemma3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForConditionalGeneration, Gemma3Model

from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTCompositeConfigMixin
from .modegpt_family import Head
from .modegpt_gemma3_text import FAMILY as TEXT
from .modegpt_gemma3_text import ModeGPTGemma3Attention, ModeGPTGemma3TextConfig

FAMILY = replace(TEXT, model_type="gemma3", blocks="language_model.layers", head=Head("language_model.norm"))


class ModeGPTGemma3Config(ModeGPTCompositeConfigMixin, Gemma3Config):
    """Gemma 3 with the widths of each block of its text tower in `text_config`."""

    text_class = ModeGPTGemma3TextConfig


class ModeGPTGemma3Model(ModeGPTModelMixin, Gemma3Model):
    """Gemma 3 without a head. Its vision tower and projector are dense."""


class ModeGPTGemma3ForConditionalGeneration(ModeGPTModelMixin, Gemma3ForConditionalGeneration):
    """Gemma 3 with a language model's head."""


MODELS = register(
    FAMILY,
    ModeGPTGemma3Config,
    ModeGPTGemma3Attention,
    AutoModel=ModeGPTGemma3Model,
    AutoModelForCausalLM=ModeGPTGemma3ForConditionalGeneration,
    AutoModelForImageTextToText=ModeGPTGemma3ForConditionalGeneration,
)
