"""A device that is not the host: its tensors compute there, but refuse to meet those of the host.

As a program it compresses a tiny model on that device and prints, as JSON, where streams were kept, where they were
found, which tensors of the result were left on the device, and how far they are from what the host computes.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from tiny_models import dense, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from optimum_modegpt import ModeGPTConfig, Report
from optimum_modegpt.budget import placement
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.calibration.streams import StreamStorage
from optimum_modegpt.compress import compress

NAME = "elsewhere"
LACKING: set[torch.dtype] = set()
"""What its tensors cannot be."""
COPIES = ("aten::_to_copy", "aten::copy_", "aten::index")
"""Operators that may see tensors of both."""


class Elsewhere(torch.Tensor):
    """A tensor of the device around one of the host."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Elsewhere:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=f"{NAME}:0"
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __deepcopy__(self, memo: Any) -> Elsewhere:
        return Elsewhere(self.inner.clone())


class Made(TorchDispatchMode):
    """Inside, tensors can be made on the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, leaves = function.name(), [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    away = [x for x in leaves if isinstance(x, Elsewhere)]
    here = [x for x in leaves if not isinstance(x, Elsewhere) and x.ndim and x.numel() and not x.is_meta]
    if away and here and not name.startswith(COPIES):
        raise RuntimeError(f"{function}: tensors of two devices, {len(away)} elsewhere and {len(here)} here")
    wanted = kwargs.get("device")
    there = torch.device(wanted).type == NAME if wanted is not None else bool(away)
    if name.startswith("aten::copy_"):
        there = isinstance(args[0], Elsewhere)
    if wanted is not None and there:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = function(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    known = {id(x.inner): x for x in away}

    def outer(value: Any) -> Any:
        if not there or not isinstance(value, torch.Tensor):
            return value
        if value.dtype in LACKING:
            raise TypeError(f"{NAME} has no {value.dtype}: float64 is computed on the host")
        return known[id(value)] if id(value) in known else Elsewhere(value)

    return tree_map(outer, result)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value


def compressed(device: str, recipe: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Report]:
    model, config = dense("llama-gqa-tied"), ModeGPTConfig(sparsity=0.3, refit_iterations=1, batch_size=5, **recipe)
    report = compress(model, config, TokenWindows(tokens(12, 24), {}), device=device, progress=False)
    return model.state_dict(), report


def main(recipe: dict[str, Any], free: int | None, float64: bool) -> None:
    expected, _ = compressed("cpu", recipe)
    if not float64:
        LACKING.add(torch.float64)
    _setup_privateuseone_for_python_backend(NAME)
    placement.device_memory = lambda device: free
    kept, original = set(), StreamStorage.keep

    def keep(place: StreamStorage, tensor: torch.Tensor) -> torch.Tensor:
        found = original(place, tensor)
        kept.add(found.device.type)
        return found

    StreamStorage.keep = keep
    with Made():
        found, report = compressed(f"{NAME}:0", recipe)
    left = [name for name, tensor in found.items() if isinstance(tensor, Elsewhere)]
    distance = max(float((_inner(found[name]) - tensor).abs().max()) for name, tensor in expected.items())
    print(json.dumps({"streams": report.streams, "kept": sorted(kept), "left": left, "distance": distance}))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
