"""Compressed Cohere: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.cohere.configuration_cohere import CohereConfig
from transformers.models.cohere.modeling_cohere import CohereAttention, CohereForCausalLM, CohereModel

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family, Head, HeadNorms, Norm, Positions, Residual

FAMILY = Family(
    "cohere",
    attention=Attention(positions=Positions("interleaved", table="repeated"), head_norms=HeadNorms(flag="use_qk_norm")),
    norm=Norm(centred=True),
    residual=Residual("input_layernorm", "input_layernorm", topology="parallel"),
    head=Head(scale="logit_scale"),
)


class ModeGPTCohereConfig(ModeGPTConfigMixin, CohereConfig):
    """Cohere with the widths of each block in `per_layer_config`."""


class ModeGPTCohereAttention(ModeGPTAttentionMixin, CohereAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Cohere's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTCohereModel(ModeGPTModelMixin, CohereModel):
    """Cohere without a head."""


class ModeGPTCohereForCausalLM(ModeGPTModelMixin, CohereForCausalLM):
    """Cohere with a language model's head."""


MODELS = register(
    FAMILY,
    ModeGPTCohereConfig,
    ModeGPTCohereAttention,
    AutoModel=ModeGPTCohereModel,
    AutoModelForCausalLM=ModeGPTCohereForCausalLM,
)
