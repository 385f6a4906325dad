"""Compressed Cohere2: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.cohere2.configuration_cohere2 import Cohere2Config
from transformers.models.cohere2.modeling_cohere2 import Cohere2Attention, Cohere2ForCausalLM, Cohere2Model

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family, Head, Norm, Positions, Residual

FAMILY = Family(
    "cohere2",
    attention=Attention(
        positions=Positions("interleaved", table="repeated", layer_flag="sliding_window"),
        score_arguments=(("sliding_window", "sliding_window"),),
    ),
    norm=Norm(centred=True),
    residual=Residual("input_layernorm", "input_layernorm", topology="parallel"),
    head=Head(scale="logit_scale"),
)


class ModeGPTCohere2Config(ModeGPTConfigMixin, Cohere2Config):
    """Cohere2 with the widths of each block in `per_layer_config`."""


class ModeGPTCohere2Attention(ModeGPTAttentionMixin, Cohere2Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Cohere2's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTCohere2Model(ModeGPTModelMixin, Cohere2Model):
    """Cohere2 without a head."""


class ModeGPTCohere2ForCausalLM(ModeGPTModelMixin, Cohere2ForCausalLM):
    """Cohere2 with a language model's head."""


MODELS = register(
    FAMILY,
    ModeGPTCohere2Config,
    ModeGPTCohere2Attention,
    AutoModel=ModeGPTCohere2Model,
    AutoModelForCausalLM=ModeGPTCohere2ForCausalLM,
)
