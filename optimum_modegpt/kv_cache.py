"""The key-value cache of any causal language model: its argument's name, the cache in an output, its size."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from optimum_modegpt.modeling.modegpt_contract import CACHE_NAMES, cache_field


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name of the cache in a model's `forward`; that of outputs if a wrapper hides the arguments."""
    declared = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in declared), cache_field())


def cache_of(output: Any) -> Any:
    """Return the cache in the output of a forward pass or of `generate`, or None if it has none."""
    return getattr(output, cache_field(), None)


def cache_bytes(cache: Any) -> float | None:
    """Return the bytes that a cache stores for one position of the whole batch, or None for another kind of cache.

    Each block counts by its own length, because a sliding window stores fewer tokens.
    """
    sizes = [
        tensor.numel() * tensor.element_size() / tensor.shape[-2]
        for layer in getattr(cache, "layers", ())
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(tensor, Tensor) and tensor.ndim == 4
    ]
    return sum(sizes) if sizes else None
