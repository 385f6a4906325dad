"""Choose the dtype in which a compression computes, by the speed of the device and the free memory."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from optimum_modegpt.budget.placement import Free
from optimum_modegpt.methods.cost import FLOAT32, ByteCounts
from optimum_modegpt.report import count_parameters
from optimum_modegpt.stages import product_rates

SLOW = 2
"""16 bits are slow on a device if their products take more than this many times as long as those of float32."""
LARGEST = 0.5
"""The fraction of free memory that float32 weights may take."""


def compute_dtype(model: PreTrainedModel, device: torch.device, home: torch.device, processes: int = 1) -> torch.dtype:
    """Return float32 if `device` is slow in the 16 bits of `model`, as most CPUs are, else the dtype of `model`.

    The float32 weights are stored on `home`, the device of `model`, and must fit in `LARGEST` of its free memory. All
    `processes` share the memory of the host.
    """
    needed = sum(float32_weights(model).values()) * (processes if home.type == "cpu" else 1)
    if model.dtype.itemsize >= FLOAT32 or needed > LARGEST * _free(home):
        return model.dtype
    own, single = (product_rates(device, dtype)["own"] for dtype in (model.dtype, torch.float32))
    return torch.float32 if single > SLOW * own else model.dtype


def float32_weights(model: PreTrainedModel) -> ByteCounts:
    """Return the bytes of the weights of `model` in float32."""
    return {"weights in float32": FLOAT32 * count_parameters(model)}


def _free(home: torch.device) -> float:
    free = Free.now(home)
    if home.type == "cpu":
        return free.host
    return float("inf") if free.device is None else free.device
