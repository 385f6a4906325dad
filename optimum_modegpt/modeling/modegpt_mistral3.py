"""Compressed Mistral 3 with its vision tower: also remote code, see modegpt_common."""

from __future__ import annotations

from dataclasses import replace

from transformers.models.mistral3.configuration_mistral3 import Mistral3Config
from transformers.models.mistral3.modeling_mistral3 import Mistral3ForConditionalGeneration, Mistral3Model

from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTCompositeConfigMixin
from .modegpt_family import Head
from .modegpt_mistral import FAMILY as TEXT
from .modegpt_mistral import ModeGPTMistralAttention, ModeGPTMistralConfig

FAMILY = replace(TEXT, model_type="mistral3", blocks="language_model.layers", head=Head("language_model.norm"))


class ModeGPTMistral3Config(ModeGPTCompositeConfigMixin, Mistral3Config):
    """Mistral 3 with the widths of each block of its text tower in `text_config`."""

    text_class = ModeGPTMistralConfig


class ModeGPTMistral3Model(ModeGPTModelMixin, Mistral3Model):
    """Mistral 3 without a head. Its vision tower and projector are dense."""


class ModeGPTMistral3ForConditionalGeneration(ModeGPTModelMixin, Mistral3ForConditionalGeneration):
    """Mistral 3 with a language model's head."""


MODELS = register(
    FAMILY,
    ModeGPTMistral3Config,
    ModeGPTMistralAttention,
    AutoModel=ModeGPTMistral3Model,
    AutoModelForCausalLM=ModeGPTMistral3ForConditionalGeneration,
    AutoModelForImageTextToText=ModeGPTMistral3ForConditionalGeneration,
)
