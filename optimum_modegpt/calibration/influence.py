"""Compute block influence: how much a block rotates the residual stream (the paper's Eq. 10)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optimum_modegpt import distributed
from optimum_modegpt.decompositions.psd import at_least_float32
from optimum_modegpt.errors import NumericalError


class InfluenceSum:
    """Accumulates s = 1 − E cos(block input, block output) over tokens, on the residual stream itself."""

    def __init__(self) -> None:
        self.total, self.tokens = 0.0, 0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Add tokens, (…, d_model) each."""
        cosine = torch.nn.functional.cosine_similarity(at_least_float32(before), at_least_float32(after), dim=-1)
        self.total += float((1 - cosine).sum())
        self.tokens += cosine.numel()

    def value(self) -> float:
        """Return the influence so far, over the tokens of all ranks. Raise `NumericalError` if it is not finite."""
        lost, tokens = float(distributed.all_reduce(self.total)), int(distributed.all_reduce(self.tokens))
        if not math.isfinite(lost):
            raise NumericalError("the residual stream is not finite on the calibration text; check dtype and weights.")
        return lost / tokens
