"""Compressed StableLM: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.stablelm.configuration_stablelm import StableLmConfig
from transformers.models.stablelm.modeling_stablelm import (
    StableLmAttention,
    StableLmForCausalLM,
    StableLmForSequenceClassification,
    StableLmModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family, HeadNorms, Norm, Positions, Residual

FAMILY = Family(
    "stablelm",
    attention=Attention(
        positions=Positions(partial=True),
        head_norms=HeadNorms("self_attn.q_layernorm", "self_attn.k_layernorm", over="each head", flag="qk_layernorm"),
        passed_on=("position_ids",),
    ),
    norm=Norm(centred=True),
    residual=Residual(topology="parallel", flag="use_parallel_residual", topology_without_flag="sequential"),
)


class ModeGPTStableLmConfig(ModeGPTConfigMixin, StableLmConfig):
    """StableLM with the widths of each block in `per_layer_config`."""


class ModeGPTStableLmAttention(ModeGPTAttentionMixin, StableLmAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """StableLM's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTStableLmModel(ModeGPTModelMixin, StableLmModel):
    """StableLM without a head."""


class ModeGPTStableLmForCausalLM(ModeGPTModelMixin, StableLmForCausalLM):
    """StableLM with a language model's head."""


class ModeGPTStableLmForSequenceClassification(ModeGPTModelMixin, StableLmForSequenceClassification):
    """StableLM with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTStableLmConfig,
    ModeGPTStableLmAttention,
    AutoModel=ModeGPTStableLmModel,
    AutoModelForCausalLM=ModeGPTStableLmForCausalLM,
    AutoModelForSequenceClassification=ModeGPTStableLmForSequenceClassification,
)
