"""The compressed classes of a model family."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from optimum_modegpt.modeling.modegpt_attention import ModeGPTAttentionMixin
from optimum_modegpt.modeling.modegpt_family import Family


@dataclass(frozen=True)
class FamilyClasses:
    """A family with its compressed model classes, by the name of transformers' Auto class."""

    family: Family
    models: Mapping[str, Any]

    @property
    def causal_lm(self) -> Any:
        """The compressed language model class."""
        return self.models["AutoModelForCausalLM"]

    @property
    def stock_causal_lm(self) -> Any:
        """The language model class of transformers that the compressed one derives from."""
        return self.causal_lm.__bases__[-1]

    @property
    def config(self) -> Any:
        """The compressed configuration class."""
        return self.causal_lm.config_class

    @property
    def text_type(self) -> str:
        """The `model_type` of the dense text tower, or of the dense model if it is no part of another one."""
        return getattr(self.config, "text_class", self.config).family.model_type

    @property
    def attention_class(self) -> type[ModeGPTAttentionMixin] | None:
        """The compressed attention class, or None if the attention of all blocks stays dense."""
        return self.causal_lm.attention_class

    @property
    def linear_class(self) -> type[nn.Linear]:
        """The class of the dense model's linear layers."""
        name = self.family.linear_class
        return nn.Linear if name is None else getattr(sys.modules[self.stock_causal_lm.__module__], name)
