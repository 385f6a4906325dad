"""Compressed HunYuan dense: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.hunyuan_v1_dense.configuration_hunyuan_v1_dense import HunYuanDenseV1Config
from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import (
    HunYuanDenseV1Attention,
    HunYuanDenseV1ForCausalLM,
    HunYuanDenseV1ForSequenceClassification,
    HunYuanDenseV1Model,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family, HeadNorms

FAMILY = Family(
    "hunyuan_v1_dense",
    attention=Attention(head_norms=HeadNorms("self_attn.query_layernorm", "self_attn.key_layernorm", rotated=True)),
)


class ModeGPTHunYuanDenseV1Config(ModeGPTConfigMixin, HunYuanDenseV1Config):
    """HunYuan dense with the widths of each block in `per_layer_config`."""


class ModeGPTHunYuanDenseV1Attention(ModeGPTAttentionMixin, HunYuanDenseV1Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """HunYuan dense's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTHunYuanDenseV1Model(ModeGPTModelMixin, HunYuanDenseV1Model):
    """HunYuan dense without a head."""


class ModeGPTHunYuanDenseV1ForCausalLM(ModeGPTModelMixin, HunYuanDenseV1ForCausalLM):
    """HunYuan dense with a language model's head."""


class ModeGPTHunYuanDenseV1ForSequenceClassification(ModeGPTModelMixin, HunYuanDenseV1ForSequenceClassification):
    """HunYuan dense with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTHunYuanDenseV1Config,
    ModeGPTHunYuanDenseV1Attention,
    AutoModel=ModeGPTHunYuanDenseV1Model,
    AutoModelForCausalLM=ModeGPTHunYuanDenseV1ForCausalLM,
    AutoModelForSequenceClassification=ModeGPTHunYuanDenseV1ForSequenceClassification,
)
