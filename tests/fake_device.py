"""Simulate an accelerator: its tensors compute on the host, and raise when combined with host tensors.

As a program, compress a tiny model on the simulated device in several cases. Print as JSON, for each, the reported and
the observed location of the residual streams, the result's tensors that are still on the device, and their largest
difference from the host's.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest.mock import patch

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
from optimum_modegpt.methods import input_refit

NAME = "elsewhere"
LACKING: set[torch.dtype] = set()
"""Dtypes that the device does not support."""
COPIES = ("aten::_to_copy", "aten::copy_", "aten::index")
"""Operators that accept tensors of both devices."""


class Elsewhere(torch.Tensor):
    """Wrap a host tensor as a tensor of the simulated device."""

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
    """Let operators create tensors on the simulated device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the host tensors inside, and wrap its result if it is on the simulated device."""
    name, away = function.name(), _device_tensors(function, (args, kwargs))
    wanted = kwargs.get("device")
    on_device = bool(away)
    if wanted is not None:
        on_device = torch.device(wanted).type == NAME
    if name.startswith("aten::copy_"):
        on_device = isinstance(args[0], Elsewhere)
    if wanted is not None and on_device:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = function(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    known = {id(x.inner): x for x in away}

    def outer(value: Any) -> Any:
        if not on_device or not isinstance(value, torch.Tensor):
            return value
        if value.dtype in LACKING:
            raise TypeError(f"{NAME} has no {value.dtype}: float64 is computed on the host")
        return known[id(value)] if id(value) in known else Elsewhere(value)

    return tree_map(outer, result)


def _device_tensors(function: Any, arguments: Any) -> list[Elsewhere]:
    """Return the arguments on the simulated device; raise if there are host tensors too."""
    away, here = [], []
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, Elsewhere):
            away.append(leaf)
        elif isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.numel() and not leaf.is_meta:
            here.append(leaf)
    if away and here and not function.name().startswith(COPIES):
        raise RuntimeError(f"{function}: tensors of two devices, {len(away)} on {NAME} and {len(here)} on the host")
    return away


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value


def compressed(device: str, recipe: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Report]:
    model = dense("llama-gqa-tied", num_hidden_layers=2)
    config = ModeGPTConfig(sparsity=0.3, refit_iterations=1, batch_size=5, **recipe)
    report = compress(model, config, TokenWindows(tokens(8, 24), {}), device=device, progress=False)
    return model.state_dict(), report


def found_on_device(recipe: dict[str, Any], free: int | None, float64: bool) -> dict[str, Any]:
    """Compress on the host and on the device, of which `free` bytes are available. Return the findings."""
    expected, _ = compressed("cpu", recipe)
    kept, original = set(), StreamStorage.keep

    def keep(place: StreamStorage, tensor: torch.Tensor) -> torch.Tensor:
        found = original(place, tensor)
        kept.add(found.device.type)
        return found

    LACKING.update(() if float64 else {torch.float64})
    memory = patch.object(placement, "device_memory", lambda device: free)
    with memory, patch.object(StreamStorage, "keep", keep), Made():
        found, report = compressed(f"{NAME}:0", recipe)
    LACKING.clear()
    left = [name for name, tensor in found.items() if isinstance(tensor, Elsewhere)]
    distance = max(float((_inner(found[name]) - tensor).abs().max()) for name, tensor in expected.items())
    return {"streams": report.streams, "kept": sorted(kept), "left": left, "distance": distance}


if __name__ == "__main__":
    input_refit.TOKENS_PER_ROW = 0
    _setup_privateuseone_for_python_backend(NAME)  # before autograd counts the devices, when it is first used
    print(json.dumps([found_on_device(*case) for case in json.loads(sys.argv[1])]))
