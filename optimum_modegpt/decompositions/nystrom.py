"""Type I, the MLP pair: which hidden channels to keep, and the map that makes up for the others (Algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_modegpt.decompositions.psd import add_diagonal, damp, inverse, mean_diagonal, solve

NYSTROM_RIDGE = 1e-8
"""Damping of the paper's refit, which has none: keeps (SᵀCS)⁻¹ defined for dead channels."""


def ridge_leverage(moment: Tensor, ridge: float) -> Tensor:
    """s_i = [C (C + λI)⁻¹]_ii = 1 − λ [(C + λI)⁻¹]_ii, in [0, 1]; λ = `ridge` · mean diagonal. (n, n) to (n,)."""
    damping = ridge * mean_diagonal(moment)
    return 1 - damping * inverse(add_diagonal(moment, damping)).diagonal()


def select_by_leverage(moment: Tensor, rank: int, *, ridge: float) -> Tensor:
    """The `rank` channels of largest ridge leverage, increasing (Algorithm 1, steps 1 and 2)."""
    return ridge_leverage(moment, ridge).topk(rank).indices.sort().values


def nystrom_refit(moment: Tensor, kept: Tensor, down: Tensor) -> Tensor:
    """W_D ← (SᵀCS)⁻¹ SᵀC W_D (Algorithm 1, step 4); `down` (n, d) to (rank, d)."""
    return solve(damp(moment[kept][:, kept], NYSTROM_RIDGE), moment[kept] @ down)


def eliminate(hessian: Tensor, weight: Tensor, rank: int, *, protected: int = 0, rounds: int = 64) -> Tensor:
    """The `rank` rows that are left, increasing, when all others have gone in their `elimination_order`."""
    width = len(hessian) - protected
    return remaining(elimination_order(hessian, weight, width - rank, protected=protected, rounds=rounds), width)


def elimination_order(hessian: Tensor, weight: Tensor, count: int, *, protected: int = 0, rounds: int = 64) -> Tensor:
    """The `count` rows that backward elimination removes, first one first (optimal brain surgeon; ours for this pair).

    `weight` (n, d) solves the least squares with the damped moment `hessian` H (n, n). Removing row i and solving again
    costs ‖w_i‖² / [H⁻¹]_ii; rows go in order of this cost, and H⁻¹ and `weight` are downdated as they go. Rows leave
    in about `rounds` chunks: inside a chunk of candidates they are chosen one by one with exact downdates, so of twins
    only one goes. The last `protected` rows are never removed and not counted.
    """
    inverse_hessian, left = inverse(hessian), torch.arange(len(hessian), device=hessian.device)
    chunk, order = max(1, count // rounds), left[:0]
    while (excess := count - len(order)) > 0:
        cost = _removal_cost(inverse_hessian, weight)[: len(left) - protected]
        candidates = cost.topk(min(4 * chunk, len(cost)), largest=False).indices
        removed = _eliminate_one_by_one(inverse_hessian, weight, candidates, min(chunk, excess))
        kept = remaining(removed, len(left))
        columns = inverse_hessian[kept][:, removed]
        update = solve(inverse_hessian[removed][:, removed], torch.cat((weight[removed], columns.T), dim=1))
        weight = weight[kept] - columns @ update[:, : weight.shape[1]]
        inverse_hessian = inverse_hessian[kept][:, kept] - columns @ update[:, weight.shape[1] :]
        order, left = torch.cat((order, left[removed])), left[kept]
    return order


def remaining(removed: Tensor, width: int) -> Tensor:
    """The indices below `width` that are not among `removed` (…, n), increasing; (…, width − n)."""
    kept = torch.ones(*removed.shape[:-1], width, dtype=torch.bool, device=removed.device).scatter(-1, removed, False)
    return kept.nonzero()[:, -1].view(*removed.shape[:-1], -1)


def _removal_cost(inverse_hessian: Tensor, weight: Tensor) -> Tensor:
    return weight.square().sum(1) / inverse_hessian.diagonal()


def _eliminate_one_by_one(inverse_hessian: Tensor, weight: Tensor, candidates: Tensor, count: int) -> Tensor:
    """The `count` of the `candidates` that go first when each removal is followed by a rank-one downdate."""
    if count == 1:
        return candidates[:1]
    block, rows = inverse_hessian[candidates][:, candidates], weight[candidates]
    removed: list[int] = []
    for _ in range(count):
        cost = _removal_cost(block, rows)
        cost[removed] = torch.inf
        worst = int(cost.argmin())
        removed.append(worst)
        column = block[:, worst] / block[worst, worst]
        rows = rows - torch.outer(column, rows[worst])
        block = block - torch.outer(column, block[worst])
    return candidates[torch.tensor(removed, device=candidates.device)]
