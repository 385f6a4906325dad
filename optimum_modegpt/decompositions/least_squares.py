"""Centred ridge regression on moments: the refit that every output projection gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimum_modegpt.decompositions.psd import add_diagonal, mean_diagonal, solve

Total = Callable[[Any], Any]
"""Completes a sum over the tokens at hand, a tensor or a number, by what other processes have."""


def complete(own: Any) -> Any:
    """The `Total` of a process that has all tokens."""
    return own


def relative(lost: Tensor, total: Tensor) -> float:
    """(lost / total)^½ of two energies; 0 where there is none, and where rounding made the loss negative."""
    return float((lost.clamp_min(0) / total.clamp_min(torch.finfo(total.dtype).tiny)).sqrt())


@dataclass(frozen=True)
class LinearMoments:
    """Weighted moments of a linear map's input z with its target t, sums over tokens; float64.

    gram Σ w z zᵀ (n, n), cross Σ w z tᵀ (n, d), energy Σ w ‖t‖². With `ones` the last input is the constant 1, which
    carries the bias: it takes part in every solve and is never removed.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    ones: bool

    @property
    def width(self) -> int:
        """Number of inputs without the constant."""
        return len(self.gram) - self.ones

    def ridge(self, relative: float) -> Tensor:
        """λ = `relative` · mean diagonal of the gram, the constant left out."""
        return relative * mean_diagonal(self.gram[: self.width, : self.width])

    def mapped(self, mapping: Tensor) -> LinearMoments:
        """The moments of mappingᵀ z; `mapping` (n, m) must pass the constant through where there is one."""
        return LinearMoments(mapping.T @ self.gram @ mapping, mapping.T @ self.cross, self.energy, self.ones)

    def kept(self, index: Tensor) -> LinearMoments:
        """The moments of the inputs `index` (k,) alone, and of the constant."""
        index = self.with_constant(index)
        return LinearMoments(self.gram[index][:, index], self.cross[index], self.energy, self.ones)

    def with_constant(self, index: Tensor) -> Tensor:
        """`index` extended by that of the constant, where there is one."""
        return torch.cat((index, index.new_tensor([self.width]))) if self.ones else index

    def relative_error(self, weight: Tensor) -> float:
        """‖t − zᵀ weight‖ / ‖t‖ over the tokens of the moments; `weight` (n, d)."""
        residual = self.energy - 2 * (self.cross * weight).sum() + (weight * (self.gram @ weight)).sum()
        return relative(residual, self.energy)


def centred_refit(moments: LinearMoments, dense: Tensor, ridge: Tensor) -> Tensor:
    """W = (G + λI)⁻¹ (R + λ W₀): the least squares that stays at the dense weights where the tokens say nothing (ours).

    `dense` W₀ (n, d), with the bias as last row where the moments have the constant; `ridge` λ, absolute.
    """
    return solve(add_diagonal(moments.gram, ridge), moments.cross + ridge * dense)
