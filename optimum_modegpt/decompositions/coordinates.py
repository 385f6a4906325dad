"""Type III, the value/output pair, if something acts on single coordinates of the values: select coordinates to keep.

The heads of a key-value group read the same values, so they keep the same coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_modegpt.decompositions.nystrom import remaining
from optimum_modegpt.decompositions.psd import ROOT_RIDGE, damp, inverse


@dataclass(frozen=True)
class CoordinateElimination:
    """Result of a backward elimination of coordinates: the removed one and its cost per step, (groups, steps)."""

    order: Tensor
    costs: Tensor
    width: int

    def kept(self, count: int) -> Tensor:
        """Return the last `count` coordinates (groups, count), in increasing order."""
        return remaining(self.order[:, : self.width - count], self.width)


def eliminate_coordinates(moments: Tensor, output: Tensor, count: int) -> CoordinateElimination:
    """Remove the cheapest coordinate, one at a time, until `count` are left in every group (ours).

    `moments` C (groups, heads, d, d) are the second moments of the outputs of a group's heads. `output` W (groups,
    heads, d, m) are the rows of the output projection that read them. Removing coordinate i and solving each head's
    least squares again costs Σ ‖w_i‖² / [C⁻¹]_ii over the heads, as in `eliminate_rows`. C⁻¹ and W are downdated after
    each removal.
    """
    groups, _, width, _ = moments.shape
    inverses = inverse(damp(moments.flatten(0, 1), ROOT_RIDGE)).view_as(moments)
    every, gone = torch.arange(groups, device=moments.device), moments.new_zeros(groups, width, dtype=torch.bool)
    order, costs = [every.new_zeros(groups, 0)], [moments.new_zeros(groups, 0)]
    for _ in range(width - count):
        lost = output.square().sum(-1) / inverses.diagonal(dim1=-2, dim2=-1)  # (groups, heads, d)
        cost = lost.sum(1).masked_fill(gone, torch.inf)
        worst = cost.argmin(1)
        column, row = inverses[every, :, :, worst], output[every, :, worst]  # (groups, heads, d), (groups, heads, m)
        share = (column / column[every, :, worst][..., None])[..., None]
        output, inverses = output - share * row[..., None, :], inverses - share * column[..., None, :]
        gone[every, worst] = True
        order.append(worst[:, None])
        costs.append(cost[every, worst][:, None])
    return CoordinateElimination(torch.cat(order, dim=1), torch.cat(costs, dim=1), width)


def selection(kept: Tensor, width: int) -> Tensor:
    """Return the bases (groups, width, count) that select the coordinates `kept` (groups, count), in float64."""
    return torch.nn.functional.one_hot(kept, width).mT.to(torch.float64)
