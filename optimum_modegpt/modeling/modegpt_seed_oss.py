"""Compressed Seed-OSS: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.seed_oss.configuration_seed_oss import SeedOssConfig
from transformers.models.seed_oss.modeling_seed_oss import (
    SeedOssAttention,
    SeedOssForCausalLM,
    SeedOssForSequenceClassification,
    SeedOssModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family

FAMILY = Family("seed_oss", attention=Attention(output_dropout="self_attn.residual_dropout"))


class ModeGPTSeedOssConfig(ModeGPTConfigMixin, SeedOssConfig):
    """Seed-OSS with the widths of each block in `per_layer_config`."""


class ModeGPTSeedOssAttention(ModeGPTAttentionMixin, SeedOssAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Seed-OSS's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTSeedOssModel(ModeGPTModelMixin, SeedOssModel):
    """Seed-OSS without a head."""


class ModeGPTSeedOssForCausalLM(ModeGPTModelMixin, SeedOssForCausalLM):
    """Seed-OSS with a language model's head."""


class ModeGPTSeedOssForSequenceClassification(ModeGPTModelMixin, SeedOssForSequenceClassification):
    """Seed-OSS with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTSeedOssConfig,
    ModeGPTSeedOssAttention,
    AutoModel=ModeGPTSeedOssModel,
    AutoModelForCausalLM=ModeGPTSeedOssForCausalLM,
    AutoModelForSequenceClassification=ModeGPTSeedOssForSequenceClassification,
)
