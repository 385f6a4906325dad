"""Type I, the MLP pair: select the hidden channels to keep, and compensate for the removed ones (Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_modegpt.decompositions.psd import add_diagonal, damp, inverse, mean_diagonal, solve

NYSTROM_RIDGE = 1e-8
"""Damping of the refit, which keeps (SᵀCS)⁻¹ defined for dead channels. The paper has none."""

SHRINK = 0.75
"""Removed rows are dropped from the downdated matrix once less than this share of its rows remains. Dropping them more
often would cost more, because each time copies the matrix."""


def ridge_leverage(moment: Tensor, ridge: float) -> Tensor:
    """Compute s_i = [C (C + λI)⁻¹]_ii = 1 − λ [(C + λI)⁻¹]_ii, in [0, 1], from (n, n) to (n,).

    λ = `ridge` · mean diagonal.
    """
    damping = ridge * mean_diagonal(moment)
    return 1 - damping * inverse(add_diagonal(moment, damping)).diagonal()


def select_by_leverage(moment: Tensor, rank: int, *, ridge: float) -> Tensor:
    """Select the `rank` channels of largest ridge leverage, in increasing order (Algorithm 1, steps 1 and 2)."""
    return ridge_leverage(moment, ridge).topk(rank).indices.sort().values


def nystrom_refit(moment: Tensor, kept: Tensor, down: Tensor) -> Tensor:
    """Compute W_D ← (SᵀCS)⁻¹ SᵀC W_D (Algorithm 1, step 4), from `down` (n, d) to (rank, d)."""
    return solve(damp(moment[kept][:, kept], NYSTROM_RIDGE), moment[kept] @ down)


@dataclass(frozen=True)
class Elimination:
    """Result of a backward elimination of rows: the removed rows in order, and the cost of each removal, (steps,)."""

    order: Tensor
    costs: Tensor


def eliminate_rows(
    inverse_hessian: Tensor, weight: Tensor, count: int, *, protected: int = 0, rounds: int = 64
) -> Elimination:
    """Remove `count` rows by backward elimination (optimal brain surgeon; ours for this pair).

    `weight` (n, d) solves the least squares with the damped moment H, and `inverse_hessian` (n, n) is H⁻¹. Removing row
    i and solving again costs ‖w_i‖² / [H⁻¹]_ii. Rows are removed in order of this cost, and both matrices are
    downdated in place. Rows are removed in about `rounds` chunks. Inside a chunk of candidates, they are chosen one by
    one with exact downdates, so only one of two equal rows is removed. The last `protected` rows are never removed and
    not counted.
    """
    size = len(inverse_hessian)
    names = torch.arange(size, device=inverse_hessian.device)
    gone, chunk, order = torch.zeros_like(names, dtype=torch.bool), max(1, count // rounds), names[:0]
    costs = [weight.new_zeros(0)]
    while (excess := count - len(order)) > 0:
        cost = (weight.square().sum(1) / inverse_hessian.diagonal()).masked_fill(gone, torch.inf)
        left = size - protected - len(order)
        candidates = cost[: len(cost) - protected].topk(min(4 * chunk, left), largest=False).indices
        removed, lost = _eliminate_one_by_one(inverse_hessian, weight, candidates, min(chunk, excess))
        costs.append(lost)
        columns = inverse_hessian[:, removed]
        update = solve(columns[removed], torch.cat((weight[removed], columns.T), dim=1))
        weight.addmm_(columns, update[:, : weight.shape[1]], alpha=-1)
        inverse_hessian.addmm_(columns, update[:, weight.shape[1] :], alpha=-1)
        gone, order = gone.index_fill(0, removed, True), torch.cat((order, names[removed]))
        if left + protected < SHRINK * len(names):
            kept = (~gone).nonzero()[:, 0]
            inverse_hessian, weight, names = inverse_hessian[kept][:, kept], weight[kept], names[kept]
            gone = gone[kept]
    return Elimination(order, torch.cat(costs))


def remaining(removed: Tensor, width: int) -> Tensor:
    """Return the indices below `width` that are not in `removed` (…, n), in increasing order, (…, width − n)."""
    kept = torch.ones(*removed.shape[:-1], width, dtype=torch.bool, device=removed.device).scatter(-1, removed, False)
    return kept.nonzero()[:, -1].view(*removed.shape[:-1], -1)


def _eliminate_one_by_one(
    inverse_hessian: Tensor, weight: Tensor, candidates: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Return the first `count` of the `candidates` to remove, and their costs, with a downdate after each removal."""
    block, rows = inverse_hessian[candidates][:, candidates], weight[candidates]
    gram, alive = rows @ rows.T, torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    removed, costs = [], []
    for _ in range(count):  # without a transfer to the host
        cost = (gram.diagonal() / block.diagonal()).masked_fill(~alive, torch.inf)
        worst = cost.argmin().view(1)
        removed.append(worst)
        costs.append(cost.index_select(0, worst))
        alive = alive.index_fill(0, worst, False)
        pivot, products = block.index_select(0, worst), gram.index_select(0, worst)
        share = (pivot / pivot.index_select(1, worst)).T  # share of the removed row that each other row takes over
        left = products - products.index_select(1, worst) * share.T / 2
        gram = gram - share @ left - (share @ left).T
        block = block - share @ pivot
    return candidates[torch.cat(removed)], torch.cat(costs)
