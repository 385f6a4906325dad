"""Compressed GLM-4-0414: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.glm4.configuration_glm4 import Glm4Config
from transformers.models.glm4.modeling_glm4 import (
    Glm4Attention,
    Glm4ForCausalLM,
    Glm4ForSequenceClassification,
    Glm4MLP,
    Glm4Model,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_blocks import ModeGPTMLPMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Family, Positions, Residual, Storage

FAMILY = Family(
    "glm4",
    attention=Attention(positions=Positions("interleaved", partial=True)),
    mlp=MLP(storage=Storage("stacked", "mlp.gate_up_proj"), activation="mlp.activation_fn"),
    residual=Residual(attention_output_norm="post_self_attn_layernorm", mlp_output_norm="post_mlp_layernorm"),
)


class ModeGPTGlm4Config(ModeGPTConfigMixin, Glm4Config):
    """GLM-4-0414 with the widths of each block in `per_layer_config`."""


class ModeGPTGlm4Attention(ModeGPTAttentionMixin, Glm4Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """GLM-4-0414's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTGlm4MLP(ModeGPTMLPMixin, Glm4MLP):
    """GLM-4-0414's MLP with separate gate and up projections."""


class ModeGPTGlm4Model(ModeGPTModelMixin, Glm4Model):
    """GLM-4-0414 without a head."""


class ModeGPTGlm4ForCausalLM(ModeGPTModelMixin, Glm4ForCausalLM):
    """GLM-4-0414 with a language model's head."""


class ModeGPTGlm4ForSequenceClassification(ModeGPTModelMixin, Glm4ForSequenceClassification):
    """GLM-4-0414 with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTGlm4Config,
    ModeGPTGlm4Attention,
    ModeGPTGlm4MLP,
    AutoModel=ModeGPTGlm4Model,
    AutoModelForCausalLM=ModeGPTGlm4ForCausalLM,
    AutoModelForSequenceClassification=ModeGPTGlm4ForSequenceClassification,
)
