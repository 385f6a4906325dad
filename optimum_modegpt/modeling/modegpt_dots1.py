"""Compressed dots.llm1: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.dots1.configuration_dots1 import Dots1Config
from transformers.models.dots1.modeling_dots1 import Dots1Attention, Dots1ForCausalLM, Dots1Model

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family, HeadNorms
from .modegpt_glm4_moe import FAMILY as GLM

FAMILY = Family(
    "dots1",
    attention=Attention(head_norms=HeadNorms(), score_arguments=(("sliding_window", "sliding_window"),)),
    mlp=GLM.mlp,
    sizes=GLM.sizes,
)


class ModeGPTDots1Config(ModeGPTConfigMixin, Dots1Config):
    """dots.llm1 with the widths of each block in `per_layer_config`."""


class ModeGPTDots1Attention(ModeGPTAttentionMixin, Dots1Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The attention of dots.llm1 with separate widths for query and key heads, and for value heads."""


class ModeGPTDots1Model(ModeGPTModelMixin, Dots1Model):
    """dots.llm1 without a head."""


class ModeGPTDots1ForCausalLM(ModeGPTModelMixin, Dots1ForCausalLM):
    """dots.llm1 with a language model's head."""


MODELS = register(
    FAMILY,
    ModeGPTDots1Config,
    ModeGPTDots1Attention,
    AutoModel=ModeGPTDots1Model,
    AutoModelForCausalLM=ModeGPTDots1ForCausalLM,
)
