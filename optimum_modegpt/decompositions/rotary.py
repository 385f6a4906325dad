"""Type II with rotary embeddings: select the coordinate pairs of a head to keep, and refit the query to compensate.

A rotary pair is (i, i + d/2). Both coordinates rotate by the same angle, so they are kept or removed together. Moments
are per key-value group, (groups, d, d). With GQA, the query moments are summed over the group's heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_modegpt.decompositions.nystrom import remaining
from optimum_modegpt.decompositions.psd import ROOT_RIDGE, add_diagonal, damp, inverse, solve


def pair_indices(pairs: Tensor, head_dim: int) -> Tensor:
    """Return the coordinates (…, 2p) of rotary `pairs` (…, p): first halves, then second halves."""
    return torch.cat((pairs, pairs + head_dim // 2), dim=-1)


def select_pairs(query: Tensor, key: Tensor, count: int) -> Tensor:
    """Select the pairs (groups, count) of largest sqrt((Q_ii + Q_jj)(K_ii + K_jj)): CR selection (Algorithm 2).

    The pairs are in increasing order. `query` and `key` (groups, d, d) are second moments of the heads. The score is
    the same before and after rotation.
    """
    return (_pair_energies(query) * _pair_energies(key)).topk(count).indices.sort().values


def shared_order(query: Tensor, key: Tensor) -> Tensor:
    """Return the pairs (head_dim / 2,) of all groups by the sum of their squared scores of `select_pairs`, increasing.

    The scores of a group are relative to their sum.
    """
    scores = _pair_energies(query) * _pair_energies(key)
    return (scores / scores.sum(1, keepdim=True)).sum(0).argsort()


def select_coordinates(query: Tensor, key: Tensor, count: int) -> Tensor:
    """Select the coordinates (groups, count) of largest sqrt(Q_ii K_ii), increasing: CR selection without rotation."""
    score = query.diagonal(dim1=-2, dim2=-1) * key.diagonal(dim1=-2, dim2=-1)
    return score.topk(count).indices.sort().values


@dataclass(frozen=True)
class PairElimination:
    """Result of a backward elimination of rotary pairs: the removed pair and its cost per step, (groups, steps)."""

    order: Tensor
    costs: Tensor
    pairs: int

    def after(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the last `count` pairs (groups, count), increasing, and the error (groups,) of keeping only them."""
        gone = self.pairs - count
        return remaining(self.order[:, :gone], self.pairs), self.costs[:, :gone].sum(1)


def eliminate_pairs(
    metric: Tensor, query: Tensor, count: int, *, shared: bool = False, order: Tensor | None = None
) -> PairElimination:
    """Remove the cheapest pair, one at a time, until `count` pairs remain in every group (ours).

    `metric` F (groups, d, d) measures the errors δ of a query, as δᵀ F δ.
    `query` C_Q is the second moment of the queries. With the query refitted, keeping k and pruning p costs
    tr(C_Q,pp (F_pp − F_pk F_kk⁻¹ F_kp)). Removing pair i from the refitted query M q adds
    tr(([F⁻¹]_ii)⁻¹ [M C_Q Mᵀ]_ii) to this cost. F⁻¹ and M are downdated after each removal.

    If `shared`, all groups remove the same pair, the one of least total cost. If `order` (groups, steps) is given, its
    pairs are removed instead of the cheapest ones.
    """
    groups, head_dim, _ = metric.shape
    pairs = head_dim // 2
    blocks = pair_indices(torch.arange(pairs, device=metric.device)[:, None], head_dim)  # (pairs, 2)
    inverse_metric = inverse(damp(metric, ROOT_RIDGE))
    mapping = torch.eye(head_dim, dtype=metric.dtype, device=metric.device).expand_as(metric)
    every, gone = torch.arange(groups, device=metric.device), metric.new_zeros(groups, pairs, dtype=torch.bool)
    removed, costs = [every.new_zeros(groups, 0)], [metric.new_zeros(groups, 0)]
    for step in range(pairs - count):
        lost = _diagonal_blocks(mapping @ query @ mapping.mT, blocks)
        own = add_diagonal(_diagonal_blocks(inverse_metric, blocks), gone)  # removed ones are zero
        cost = (own.inverse() * lost).sum((-2, -1)).masked_fill(gone, torch.inf)
        worst = _cheapest(cost, shared) if order is None else order[:, step]
        columns = inverse_metric[every[:, None], :, blocks[worst]].mT  # (groups, d, 2)
        rows = torch.cat((mapping[every[:, None], blocks[worst]], columns.mT), dim=2)
        update = columns @ own[every, worst].inverse() @ rows
        mapping, inverse_metric = mapping - update[..., :head_dim], inverse_metric - update[..., head_dim:]
        gone[every, worst] = True
        removed.append(worst[:, None])
        costs.append(cost[every, worst][:, None])
    return PairElimination(torch.cat(removed, dim=1), torch.cat(costs, dim=1), pairs)


def eliminate_pairs_alone(
    metric: Tensor, query: Tensor, count: int, *, shared: bool = False, order: Tensor | None = None
) -> PairElimination:
    """Remove the cheapest pair, one at a time, without a refit of the query; see `eliminate_pairs`.

    Pruning p costs tr(C_Q,pp F_pp), which depends on all removed pairs together.
    """
    groups, head_dim, _ = metric.shape
    products = (metric * query).view(groups, 2, head_dim // 2, 2, head_dim // 2).sum((1, 3))
    cost = products.diagonal(dim1=1, dim2=2)
    every, gone = torch.arange(groups, device=metric.device), torch.zeros_like(cost, dtype=torch.bool)
    removed, costs = [every.new_zeros(groups, 0)], [metric.new_zeros(groups, 0)]
    for step in range(head_dim // 2 - count):
        worst = _cheapest(cost.masked_fill(gone, torch.inf), shared) if order is None else order[:, step]
        removed.append(worst[:, None])
        costs.append(cost[every, worst][:, None])
        cost = cost + 2 * products[every, worst]
        gone[every, worst] = True
    return PairElimination(torch.cat(removed, dim=1), torch.cat(costs, dim=1), head_dim // 2)


def query_refit(metric: Tensor, pairs: Tensor, *, ridge: float) -> Tensor:
    """Compute the map (groups, 2·count, d) from dense to kept query coordinates (ours).

    The map gives W_Q,kept + F_kk⁻¹ F_kp W_Q,pruned. It applies to the rows of a head's query weight and bias. F_kk is
    damped by `ridge` · its mean diagonal.
    """
    head_dim = metric.shape[-1]
    maps = []
    for own, kept in zip(metric, pair_indices(pairs, head_dim), strict=True):
        pruned = remaining(kept, head_dim)
        mapping = own.new_zeros(len(kept), head_dim)
        mapping[torch.arange(len(kept)), kept] = 1
        if len(pruned):
            mapping[:, pruned] = solve(damp(own[kept][:, kept], ridge), own[kept][:, pruned])
        maps.append(mapping)
    return torch.stack(maps)


def _cheapest(cost: Tensor, shared: bool) -> Tensor:
    """Return the pair (groups,) of least cost (groups, pairs) in every group, or in total for all groups."""
    return cost.sum(0).argmin().expand(len(cost)) if shared else cost.argmin(1)


def _pair_energies(moment: Tensor) -> Tensor:
    first, second = moment.diagonal(dim1=-2, dim2=-1).chunk(2, dim=-1)
    return first + second


def _diagonal_blocks(matrix: Tensor, blocks: Tensor) -> Tensor:
    """Return the 2 × 2 blocks (groups, pairs, 2, 2) of the pairs from matrices (groups, d, d)."""
    return matrix[:, blocks[:, :, None], blocks[:, None, :]]
