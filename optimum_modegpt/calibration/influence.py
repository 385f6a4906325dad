"""Block influence: how much a block turns the residual stream (the paper's Eq. 10)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optimum_modegpt import processes
from optimum_modegpt.decompositions.psd import raised
from optimum_modegpt.errors import NumericalError


class InfluenceSum:
    """Accumulates s = 1 − E cos(block input, block output) over tokens, on the residual stream itself."""

    def __init__(self) -> None:
        self.total, self.tokens = 0.0, 0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Adds tokens, (…, d_model) each."""
        cosine = torch.nn.functional.cosine_similarity(raised(before), raised(after), dim=-1)
        self.total += float((1 - cosine).sum())
        self.tokens += cosine.numel()

    def value(self) -> float:
        """The influence so far, over the tokens of all processes.

        Raises:
            NumericalError: where the stream was not finite.
        """
        lost, tokens = float(processes.total(self.total)), int(processes.total(self.tokens))
        if not math.isfinite(lost):
            raise NumericalError("the residual stream is not finite on the calibration text; check dtype and weights.")
        return lost / tokens
