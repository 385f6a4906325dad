"""`ModeGPTConfig`, the configuration of a compression for `from_pretrained`."""

from __future__ import annotations

import copy
from collections.abc import Generator
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_modegpt.recipe import IN_MEMORY, Recipe

__all__ = ["IN_MEMORY", "ModeGPTConfig"]


class ModeGPTConfig(Recipe, QuantizationConfigMixin):  # pyright: ignore[reportIncompatibleVariableOverride]
    __doc__ = Recipe.__doc__

    def __deepcopy__(self, memo: dict[int, Any]) -> ModeGPTConfig:
        """Return a shallow copy: `from_pretrained` copies its arguments several times, and a dataset may be large."""
        return copy.copy(self)

    def __iter__(self) -> Generator[tuple[str, Any]]:
        yield from self.to_dict().items()
