"""Compressed EXAONE 4: also remote code, see modegpt_common."""

from __future__ import annotations

from transformers.models.exaone4.configuration_exaone4 import Exaone4Config
from transformers.models.exaone4.modeling_exaone4 import (
    Exaone4Attention,
    Exaone4ForCausalLM,
    Exaone4ForSequenceClassification,
    Exaone4Model,
)

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_common import ModeGPTModelMixin, register
from .modegpt_config import ModeGPTConfigMixin
from .modegpt_family import Attention, Family, HeadNorms, Positions, Residual

FAMILY = Family(
    "exaone4",
    attention=Attention(
        positions=Positions(layer_flag="is_sliding", flag_needs="sliding_window"),
        head_norms=HeadNorms(),
        score_arguments=(("sliding_window", "own_window"),),
    ),
    residual=Residual(
        attention_norm=None,
        mlp_norm=None,
        attention_output_norm="post_attention_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
    ),
)


class ModeGPTExaone4Config(ModeGPTConfigMixin, Exaone4Config):
    """EXAONE 4 with the widths of each block in `per_layer_config`."""


class ModeGPTExaone4Attention(ModeGPTAttentionMixin, Exaone4Attention):  # pyright: ignore[reportIncompatibleMethodOverride]
    """EXAONE 4's attention with separate widths for query and key heads, and for value heads."""

    @property
    def own_window(self) -> int | None:
        """The window of this layer, or None if it attends to all tokens. `sliding_window` is that of the model."""
        return self.sliding_window if self.is_sliding else None


class ModeGPTExaone4Model(ModeGPTModelMixin, Exaone4Model):
    """EXAONE 4 without a head."""


class ModeGPTExaone4ForCausalLM(ModeGPTModelMixin, Exaone4ForCausalLM):
    """EXAONE 4 with a language model's head."""


class ModeGPTExaone4ForSequenceClassification(ModeGPTModelMixin, Exaone4ForSequenceClassification):
    """EXAONE 4 with a classification head."""


MODELS = register(
    FAMILY,
    ModeGPTExaone4Config,
    ModeGPTExaone4Attention,
    AutoModel=ModeGPTExaone4Model,
    AutoModelForCausalLM=ModeGPTExaone4ForCausalLM,
    AutoModelForSequenceClassification=ModeGPTExaone4ForSequenceClassification,
)
