"""Compressed Nemotron: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.nemotron.configuration_nemotron import NemotronConfig
from transformers.models.nemotron.modeling_nemotron import (
    NemotronAttention,
    NemotronForCausalLM,
    NemotronForSequenceClassification,
    NemotronModel,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import MLP, Attention, Family, Norm, Positions

FAMILY = Family(
    "nemotron",
    attention=Attention(positions=Positions(partial=True)),
    mlp=MLP(inputs=("mlp.up_proj",)),
    norm=Norm(offset=1.0, centred=True),
)


class ModeGPTNemotronConfig(ModeGPTConfigMixin, NemotronConfig):
    """Nemotron with the widths of each block in `per_layer_config`."""


class ModeGPTNemotronAttention(ModeGPTAttentionMixin, NemotronAttention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Nemotron's attention with separate widths for query and key heads, and for value heads."""


class ModeGPTNemotronModel(ModeGPTModelMixin, NemotronModel):
    """Nemotron without a head."""


class ModeGPTNemotronForCausalLM(ModeGPTModelMixin, NemotronForCausalLM):
    """Nemotron with a language model's head."""


class ModeGPTNemotronForSequenceClassification(ModeGPTModelMixin, NemotronForSequenceClassification):
    """Nemotron with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTNemotronConfig,
    ModeGPTNemotronAttention,
    AutoModel=ModeGPTNemotronModel,
    AutoModelForCausalLM=ModeGPTNemotronForCausalLM,
    AutoModelForSequenceClassification=ModeGPTNemotronForSequenceClassification,
)
