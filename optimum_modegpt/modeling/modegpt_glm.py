"""Compressed GLM: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.glm.configuration_glm import GlmConfig
from transformers.models.glm.modeling_glm import (
    GlmAttention,
    GlmForCausalLM,
    GlmForSequenceClassification,
    GlmMLP,
    GlmModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_blocks import ModeGPTMLPMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Family, Positions, Storage

FAMILY = Family(
    "glm",
    attention=Attention(positions=Positions("interleaved", partial=True)),
    mlp=MLP(storage=Storage("stacked", "mlp.gate_up_proj"), activation="mlp.activation_fn"),
)


class ModeGPTGlmConfig(ModeGPTConfigMixin, GlmConfig):
    """GLM with the widths of each block in `per_layer_config`."""


class ModeGPTGlmAttention(ModeGPTAttentionMixin, GlmAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """GLM's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTGlmMLP(ModeGPTMLPMixin, GlmMLP):
    """GLM's MLP with separate gate and up projections."""


class ModeGPTGlmModel(ModeGPTModelMixin, GlmModel):
    """GLM without a head."""


class ModeGPTGlmForCausalLM(ModeGPTModelMixin, GlmForCausalLM):
    """GLM with a language model's head."""


class ModeGPTGlmForSequenceClassification(ModeGPTModelMixin, GlmForSequenceClassification):
    """GLM with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTGlmConfig,
    ModeGPTGlmAttention,
    ModeGPTGlmMLP,
    AutoModel=ModeGPTGlmModel,
    AutoModelForCausalLM=ModeGPTGlmForCausalLM,
    AutoModelForSequenceClassification=ModeGPTGlmForSequenceClassification,
)
