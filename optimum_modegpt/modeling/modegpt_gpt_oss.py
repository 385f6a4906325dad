"""Compressed gpt-oss: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssAttention,
    GptOssForCausalLM,
    GptOssForSequenceClassification,
    GptOssModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Experts, Family, Positions

FAMILY = Family(
    "gpt_oss",
    attention=Attention(
        positions=Positions(table="single"),
        score_arguments=(("sliding_window", "sliding_window"), ("s_aux", "sinks")),
    ),
    mlp=MLP(experts=Experts(router="mlp.router", width="intermediate_size", count="num_local_experts")),
)


class ModeGPTGptOssConfig(ModeGPTConfigMixin, GptOssConfig):
    """gpt-oss with the widths of each block in `per_layer_config`."""


class ModeGPTGptOssAttention(ModeGPTAttentionMixin, GptOssAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """gpt-oss's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTGptOssModel(ModeGPTModelMixin, GptOssModel):
    """gpt-oss without a head."""


class ModeGPTGptOssForCausalLM(ModeGPTModelMixin, GptOssForCausalLM):
    """gpt-oss with a language model's head."""


class ModeGPTGptOssForSequenceClassification(ModeGPTModelMixin, GptOssForSequenceClassification):
    """gpt-oss with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTGptOssConfig,
    ModeGPTGptOssAttention,
    AutoModel=ModeGPTGptOssModel,
    AutoModelForCausalLM=ModeGPTGptOssForCausalLM,
    AutoModelForSequenceClassification=ModeGPTGptOssForSequenceClassification,
)
