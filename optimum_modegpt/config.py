"""`ModeGPTConfig`, the configuration of a compression for `from_pretrained`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Generator, Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_modegpt.errors import InvalidConfig
from optimum_modegpt.recipe import IN_MEMORY, Recipe, overridden

__all__ = ["IN_MEMORY", "ModeGPTConfig", "as_config"]


class ModeGPTConfig(Recipe, QuantizationConfigMixin):  # pyright: ignore[reportIncompatibleVariableOverride]
    __doc__ = Recipe.__doc__

    def __deepcopy__(self, memo: dict[int, Any]) -> ModeGPTConfig:
        """Return a shallow copy: `from_pretrained` copies its arguments several times, and a dataset may be large."""
        return copy.copy(self)

    def __iter__(self) -> Generator[tuple[str, Any]]:
        yield from self.to_dict().items()


def as_config(config: Any, **fields: Any) -> ModeGPTConfig:
    """Return a `ModeGPTConfig` from one, or from a dict with or without `quant_method`; `fields` override its own.

    Raises:
        InvalidConfig: `config` is of another type, or a field is unknown.
    """
    if isinstance(config, ModeGPTConfig):
        own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        return type(config)(**overridden(own, fields)) if fields else config
    if isinstance(config, Mapping):
        return ModeGPTConfig.from_dict(overridden(config, fields))
    raise InvalidConfig(f"expected a ModeGPTConfig or a dict of its fields, found {type(config).__name__}.")
