"""Rotary tables of some coordinate pairs, in the configuration of a stock class.

A stock class computes the frequencies of its pairs from `rope_theta` and the width of a head. LongRoPE divides each of
them by a factor of its own, so it can express the frequencies of any pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

FIXED_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary types whose frequencies do not depend on the length of the text."""


def rotary_modules(model: nn.Module) -> list[str]:
    """Return the paths of the modules that compute rotary tables."""
    return [path for path, module in model.named_modules() if dict(_frequencies(module))]


def refusal_of_tables(model: nn.Module, config: Any) -> str | None:
    """Return the reason why a configuration cannot name the frequencies of some pairs, or None if it can."""
    if len(rotary_modules(model)) != 1:
        return f"{type(model).__name__} has no single module that computes its rotary table"
    for rope in _by_layer_type(config.rope_parameters).values():
        if rope["rope_type"] not in FIXED_TYPES:
            return f"the rotary type {rope['rope_type']} has frequencies that follow the length of the text"
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            return "only a part of a head rotates"
        if "mrope_section" in rope:
            return "the pairs of a head rotate by positions of several axes"
    return None


def kept_rope_parameters(model: nn.Module, config: Any, pairs: Sequence[int]) -> dict[str, Any]:
    """Return the `rope_parameters` of a model whose heads keep only these pairs.

    Factor j of a table is θ^(−2j/d) / ω_j, with the width d of the narrow head and the frequency ω_j of its pair j.

    Args:
        model: the dense model.
        config: its configuration.
        pairs: the kept pairs, increasing.
    """
    (path,) = rotary_modules(model)
    module, width = model.get_submodule(path), 2 * len(pairs)

    def parameters(rope: Mapping[str, Any], layer_type: str | None) -> Mapping[str, Any]:
        prefix = "" if layer_type is None else f"{layer_type}_"
        if not hasattr(module, f"{prefix}inv_freq"):  # no layer has this type
            return rope
        kept: Tensor = getattr(module, f"{prefix}inv_freq").double().cpu()[list(pairs)]
        regular = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        scaling = float(getattr(module, f"{prefix}attention_scaling"))
        return _longrope(rope, (regular / kept).tolist(), scaling, config.max_position_embeddings)

    return _for_layer_types(config.rope_parameters, parameters)


def narrow_rope_parameters(config: Any, factors: list[float]) -> dict[str, Any]:
    """Return the `rope_parameters` of a model with as many pairs as `factors`, to try whether a class takes them."""
    return _for_layer_types(
        config.rope_parameters,
        lambda rope, _: _longrope(rope, factors, 1.0, config.max_position_embeddings),
    )


def _longrope(dense: Mapping[str, Any], factors: list[float], scaling: float, length: int) -> dict[str, Any]:
    """Return LongRoPE parameters with the same `factors` for all lengths of the text.

    The θ of the `dense` parameters stays. Some classes rotate a part of a head unless `partial_rotary_factor` is there.

    `scaling` multiplies the table. transformers reads it from `attention_factor`, engines from `short_mscale` and
    `long_mscale`, which are 1 if they are missing.
    """
    return {
        "rope_type": "longrope",
        **{name: dense[name] for name in ("rope_theta", "partial_rotary_factor") if name in dense},
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": scaling,
        "original_max_position_embeddings": length,
        **({} if scaling == 1 else {"short_mscale": scaling, "long_mscale": scaling}),
    }


def _for_layer_types(
    parameters: Mapping[str, Any], function: Callable[[Mapping[str, Any], str | None], Mapping[str, Any]]
) -> dict[str, Any]:
    """Apply a function to the rotary parameters of each layer type, or to those of all layers."""
    own = _by_layer_type(parameters)
    if None in own:
        return dict(function(parameters, None))
    return {str(layer_type): function(rope, layer_type) for layer_type, rope in own.items()}


def _by_layer_type(parameters: Mapping[str, Any]) -> dict[str | None, Mapping[str, Any]]:
    """Return the rotary parameters of each layer type, or those of all layers under None.

    transformers 5.16 adds a `rope_type` and an empty `rope_theta` to those of each layer type in a text tower.
    """
    own: dict[str | None, Mapping[str, Any]] = {
        layer_type: rope for layer_type, rope in parameters.items() if isinstance(rope, Mapping)
    }
    return own or {None: parameters}


def _frequencies(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in module.named_buffers(recurse=False):
        if name.endswith("inv_freq"):
            yield name, buffer
