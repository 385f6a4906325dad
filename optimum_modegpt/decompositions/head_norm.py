"""Type II with normalised queries and keys: keep the divisor of a head's norm in a narrow head (ours).

A norm divides a head q (d,) by √(‖q‖² / d + ε). A narrow head has the rows r_j = t_j (A q)_j, and should be divided by
the same number. Its factors t_j = √(β_j · width / d) therefore follow from β ≥ 0 with Σ_j β_j (A q)_j² close to ‖q‖².
The gain of a row is divided by t_j. The mean over fewer coordinates then has the same relation to ε.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_modegpt.decompositions.least_squares import Total
from optimum_modegpt.decompositions.psd import add_diagonal, mean_diagonal

RIDGE = 1e-3
"""Damping of β towards one value for all rows, as a fraction of the mean diagonal."""

SMALLEST = 1e-2
"""Smallest β_j, as a fraction of that value: the gain of a row is divided by the root of its β_j."""


def row_factors(
    vectors: Tensor, maps: Tensor, total: Total, *, rotated: bool, joint: bool, shared: bool = False
) -> Tensor:
    """Compute t (heads, width) from a sample of the dense heads before their norm, (heads, tokens, d).

    Args:
        vectors: the sample.
        maps: A of every head, (heads, width, d).
        total: sums a tensor over the ranks of a distributed run.
        rotated: whether the norm comes after the rotation. Both coordinates of a pair then have the same factor.
        joint: whether one norm divides all heads by the same number. All rows of a head then have the same factor.
        shared: whether row j has the same factor in all heads.
    """
    heads, width, head_dim = maps.shape
    lengths = vectors.norm(dim=(0, -1) if joint else -1, keepdim=True)
    vectors = vectors / lengths.clamp_min(torch.finfo(vectors.dtype).tiny)
    shares = (vectors @ maps.mT).square()  # of ‖q‖², (heads, tokens, width)
    if joint:
        shares = shares.sum(-1).T[None]  # (1, tokens, heads)
    elif rotated:
        shares = shares.unflatten(-1, (2, -1)).sum(-2)
    if shared:
        shares = shares.flatten(0, 1)[None]  # (1, heads · tokens, width)
    coefficients = _positive_least_squares(total(shares.mT @ shares), total(shares.sum(1)))
    if joint:
        coefficients = coefficients.T.expand(heads, width)
    elif rotated:
        coefficients = coefficients.repeat(1, 2)
    return (coefficients * width / head_dim).sqrt().expand(heads, width)


def _positive_least_squares(gram: Tensor, cross: Tensor) -> Tensor:
    """Minimise βᵀ gram β − 2 crossᵀ β approximately over β ≥ `SMALLEST` of their common value.

    Those that would be smaller are set to it, and the others are solved again.
    """
    common = (cross.sum(1) / gram.sum((1, 2)).clamp_min(torch.finfo(gram.dtype).tiny))[:, None]
    least, ridge = SMALLEST * common, RIDGE * mean_diagonal(gram)
    damped, wanted = add_diagonal(gram, ridge), cross + ridge[:, None] * common
    result, free = common.expand_as(cross), torch.ones_like(cross, dtype=torch.bool)
    for _ in range(cross.shape[1]):
        fixed = least.expand_as(cross).masked_fill(free, 0)
        matrix = damped.where(free[:, :, None] & free[:, None, :], torch.diag_embed((~free).to(damped)))
        right = (wanted - (damped @ fixed[..., None])[..., 0]).where(free, fixed)
        result = torch.linalg.solve(matrix, right)
        small = free & (result < least)
        if not small.any():
            break
        free = free & ~small
    return torch.maximum(result, least)
