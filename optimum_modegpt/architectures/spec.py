"""What we must know of a model family, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optimum_modegpt.modeling.modegpt_common import BlockLayout, ModeGPTAttentionMixin


@dataclass(frozen=True)
class Family:
    """One model family. Where the projections stand is in the compressed configuration's layout; here is the rest."""

    config: Any
    """The compressed configuration class."""
    models: dict[str, type]
    """The compressed model classes by the name of transformers' Auto class."""
    attention_norm: str
    """The norm before the attention (or after it, in a post-norm block), from the block."""
    mlp_norm: str
    activation: str
    """The MLP's activation module, from the block."""
    final_norm: str
    """The norm after the last block, from the base model; a model may have none there."""
    projection: str | None = None
    """A projection between the final norm and the head, from the base model; a model may have none there."""
    norm_first_flag: str | None = None
    """Name of the configuration's boolean that says norms come first; None where they always do."""

    @property
    def layout(self) -> BlockLayout:
        """Where blocks and projections stand."""
        return self.config.layout

    @property
    def attention_class(self) -> type[ModeGPTAttentionMixin]:
        """The compressed attention class."""
        return self.models["AutoModelForCausalLM"].attention_class  # pyright: ignore[reportAttributeAccessIssue]
