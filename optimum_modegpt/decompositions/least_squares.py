"""Centred ridge regression on moments, the refit of every output projection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimum_modegpt.decompositions.psd import add_diagonal, mean_diagonal, solve

Total = Callable[[Any], Any]
"""Completes a sum over this rank's tokens, a tensor or a number, with the sums of the other ranks."""


NOISE_RIDGE = 4.0
"""Part of the ridge of a refit that falls with the number of tokens per input. Chosen on held-out text, with the first
four to six blocks of SmolLM2-135M cut on 16,384 tokens."""


def complete(own: Any) -> Any:
    """Return the sum unchanged: the `Total` of a process that has all tokens."""
    return own


def relative(lost: Tensor, total: Tensor) -> float:
    """Compute (lost / total)^½ of two energies. Return 0 if both are 0, or if rounding made the loss negative."""
    return float((lost.clamp_min(0) / total.clamp_min(torch.finfo(total.dtype).tiny)).sqrt())


@dataclass(frozen=True)
class LinearMoments:
    """Weighted moments of the input z and the target t of a linear map, summed over `tokens` in float64.

    gram Σ w z zᵀ (n, n), cross Σ w z tᵀ (n, d), energy Σ w ‖t‖². With `ones`, the last input is the constant 1 of the
    bias. It takes part in every solve and is never removed.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    tokens: int
    ones: bool

    @property
    def width(self) -> int:
        """Return the number of inputs without the constant."""
        return len(self.gram) - self.ones

    def ridge(self, relative: float) -> Tensor:
        """Compute λ = `relative` · mean diagonal of the gram, without the constant."""
        return relative * mean_diagonal(self.gram[: self.width, : self.width])

    def refit_ridge(self, relative: float) -> Tensor:
        """Compute the ridge of a refit, which grows as the tokens per input become fewer.

        λ = (`relative` + `NOISE_RIDGE` · width / tokens) · mean diagonal of the gram, without the constant. The second
        term is `NOISE_RIDGE` times the mean of w ‖z‖², and prevents a fit to the noise of few tokens.
        """
        return self.ridge(relative + NOISE_RIDGE * self.width / max(1, self.tokens))

    def mapped(self, mapping: Tensor) -> LinearMoments:
        """Return the moments of mappingᵀ z. `mapping` (n, m) must pass the constant through, if `ones`."""
        return LinearMoments(
            mapping.T @ self.gram @ mapping, mapping.T @ self.cross, self.energy, self.tokens, self.ones
        )

    def kept(self, index: Tensor) -> LinearMoments:
        """Return the moments of the inputs `index` (k,) and of the constant, if `ones`."""
        index = self.with_constant(index)
        return LinearMoments(self.gram[index][:, index], self.cross[index], self.energy, self.tokens, self.ones)

    def joined(self, other: LinearMoments) -> LinearMoments:
        """Return the moments over the tokens of both."""
        return LinearMoments(
            self.gram + other.gram,
            self.cross + other.cross,
            self.energy + other.energy,
            self.tokens + other.tokens,
            self.ones,
        )

    def without(self, part: LinearMoments) -> LinearMoments:
        """Return the moments over the tokens that are not in `part`, which are some of the tokens of these moments."""
        return self.joined(LinearMoments(-part.gram, -part.cross, -part.energy, -part.tokens, part.ones))

    def with_constant(self, index: Tensor) -> Tensor:
        """Return `index` extended by the index of the constant, if `ones`."""
        return torch.cat((index, index.new_tensor([self.width]))) if self.ones else index

    def relative_error(self, weight: Tensor) -> float:
        """Compute ‖t − zᵀ weight‖ / ‖t‖ over the tokens of the moments. `weight` is (n, d)."""
        residual = self.energy - 2 * (self.cross * weight).sum() + (weight * (self.gram @ weight)).sum()
        return relative(residual, self.energy)


def centred_refit(moments: LinearMoments, dense: Tensor, ridge: Tensor) -> Tensor:
    """Compute W = (G + λI)⁻¹ (R + λ W₀), least squares that keeps the dense weights in unobserved directions (ours).

    `dense` is W₀ (n, d), with the bias as last row if the moments have the constant. `ridge` is λ, absolute.
    """
    return solve(add_diagonal(moments.gram, ridge), moments.cross + ridge * dense)
