"""Choose the dtype in which a compression computes, by the speed of the device and the free memory."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from optimum_modegpt.budget.placement import Free
from optimum_modegpt.methods.cost import FLOAT32, ByteCounts
from optimum_modegpt.report import count_parameters
from optimum_modegpt.stages import product_rates

SLOW = 2
"""A device is slow in 16 bits if products take more than this many times as long as in float32."""
LARGEST = 0.5
"""The largest fraction of the free memory for weights in float32."""


def compute_dtype(model: PreTrainedModel, device: torch.device, home: torch.device, processes: int = 1) -> torch.dtype:
    """Return float32 if `device` is slow in the 16 bits of `model`, as most CPUs are, else the dtype of `model`.

    The float32 weights are stored on `home`, the device of `model`. If they need more than `LARGEST` of its free
    memory, the dtype is that of `model`. All `processes` share the memory of the host.
    """
    needed = sum(float32_weights(model).values()) * (processes if home.type == "cpu" else 1)
    fits = needed <= LARGEST * _free(home)
    return torch.float32 if fits and slowdown(device, model.dtype) > SLOW else model.dtype


def slowdown(device: torch.device, dtype: torch.dtype) -> float:
    """Return the time of products in a 16-bit `dtype` on `device`, relative to float32; 1 for wider types."""
    if dtype.itemsize >= FLOAT32:
        return 1.0
    return product_rates(device, torch.float32)["own"] / product_rates(device, dtype)["own"]


def float32_weights(model: PreTrainedModel) -> ByteCounts:
    """Return the bytes of the weights of `model` in float32."""
    return {"weights in float32": FLOAT32 * count_parameters(model)}


def _free(home: torch.device) -> float:
    free = Free.now(home)
    if home.type == "cpu":
        return free.host
    return float("inf") if free.device is None else free.device
