"""Type II with rotary embeddings: which coordinate pairs of a head to keep, and a query that makes up for the others.

A rotary pair is (i, i + d/2): both coordinates turn by one angle, so they stay or go together. Moments are per
key-value group, (groups, d, d); with GQA the query's are summed over the group's heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_modegpt.decompositions.psd import ROOT_RIDGE, damp, solve


def pair_indices(pairs: Tensor, head_dim: int) -> Tensor:
    """Coordinates of rotary `pairs` (…, p): first halves, then second halves, (…, 2p)."""
    return torch.cat((pairs, pairs + head_dim // 2), dim=-1)


def select_pairs(query: Tensor, key: Tensor, count: int) -> Tensor:
    """CR selection (Algorithm 2): pairs of largest sqrt((Q_ii + Q_jj)(K_ii + K_jj)), increasing; (groups, count).

    `query`, `key` (groups, d, d) are second moments of the heads; the score is the same before and after rotation.
    """
    energies = [_pair_sums(moment.diagonal(dim1=-2, dim2=-1)) for moment in (query, key)]
    return (energies[0] * energies[1]).topk(count).indices.sort().values


def select_coordinates(query: Tensor, key: Tensor, count: int) -> Tensor:
    """CR selection without rotation: coordinates of largest sqrt(Q_ii K_ii), increasing; (groups, count)."""
    score = query.diagonal(dim1=-2, dim2=-1) * key.diagonal(dim1=-2, dim2=-1)
    return score.topk(count).indices.sort().values


def eliminate_pairs(attention: Tensor, query: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Pairs to keep (groups, count), increasing, and the error of keeping them (groups,) (ours).

    `attention` F (groups, d, d) is the curvature of the attention distribution in the logits' key directions, `query`
    C_Q the second moment of the queries. With the query refitted, keeping k and pruning p costs
    tr(C_Q,pp (F_pp − F_pk F_kk⁻¹ F_kp)); pairs are removed one at a time, each time the cheapest.
    """
    attention = damp(attention, ROOT_RIDGE)
    kept, errors = [], []
    for curvature, moment in zip(attention, query, strict=True):
        pairs = list(range(curvature.shape[-1] // 2))
        error = curvature.new_zeros(())
        while len(pairs) > count:
            trials = torch.tensor([[p for p in pairs if p != gone] for gone in pairs], device=curvature.device)
            costs = _pruning_error(curvature, moment, trials)
            worst = int(costs.argmin())
            error = costs[worst]
            pairs.pop(worst)
        kept.append(torch.tensor(pairs, device=curvature.device))
        errors.append(error)
    return torch.stack(kept), torch.stack(errors)


def query_refit(attention: Tensor, pairs: Tensor, *, ridge: float) -> Tensor:
    """The map (groups, 2·count, d) from dense to kept query coordinates: W_Q,kept + F_kk⁻¹ F_kp W_Q,pruned (ours).

    Acts on the rows of a head's query weight and bias alike. Damped by `ridge` · mean diagonal of F_kk.
    """
    head_dim = attention.shape[-1]
    maps = []
    for curvature, kept in zip(attention, pair_indices(pairs, head_dim), strict=True):
        pruned = _complement(kept, head_dim)
        mapping = curvature.new_zeros(len(kept), head_dim)
        mapping[torch.arange(len(kept)), kept] = 1
        if len(pruned):
            mapping[:, pruned] = solve(damp(curvature[kept][:, kept], ridge), curvature[kept][:, pruned])
        maps.append(mapping)
    return torch.stack(maps)


def _pair_sums(energies: Tensor) -> Tensor:
    first, second = energies.chunk(2, dim=-1)
    return first + second


def _complement(index: Tensor, size: int) -> Tensor:
    mask = torch.ones(size, dtype=torch.bool, device=index.device)
    mask[index] = False
    return mask.nonzero()[:, 0]


def _pruning_error(curvature: Tensor, moment: Tensor, trials: Tensor) -> Tensor:
    """tr(C_pp (F_pp − F_pk F_kk⁻¹ F_kp)) for every trial set of kept pairs (trials, pairs); (trials,)."""
    head_dim = curvature.shape[-1]
    kept = pair_indices(trials, head_dim)  # (trials, k)
    pruned = torch.stack([_complement(index, head_dim) for index in kept])  # (trials, p)
    if kept.shape[1]:
        within = curvature[kept[:, :, None], kept[:, None, :]]
        across = curvature[kept[:, :, None], pruned[:, None, :]]
        explained = across.mT @ solve(within, across)
    else:
        explained = 0
    left = curvature[pruned[:, :, None], pruned[:, None, :]] - explained
    return (left * moment[pruned[:, :, None], pruned[:, None, :]]).sum((-2, -1))
