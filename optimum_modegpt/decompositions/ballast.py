"""Type II with normalised queries and keys: narrow a head, and keep the divisor of its norm (ours).

A norm divides a head q (d,) by √(‖q‖² / d + ε) and multiplies coordinate i by γ_i. A narrow norm must have the same
divisor, although it only sees the kept coordinates K. It gets some more rows, the ballast, whose gain is 0: it enters
the divisor and never the scores. The ballast consists of the main directions u_j of the removed coordinates R, with
β ≥ 0 such that β₀ ‖q_K‖² + Σ_j β_j (u_jᵀ q_R)² is close to ‖q‖².
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_modegpt.decompositions.nystrom import remaining

BALLAST = 2
"""Coordinates of ballast in a narrow head: one pair, which needs no place in the order of the other pairs."""

LEAST_KEPT = 0.01
"""Smallest β₀. The gains of kept coordinates are divided by its root."""

SWEEPS = 500
"""Sweeps over the coefficients β, of which there are few."""


@dataclass(frozen=True)
class NarrowHeads:
    """The rows of narrow heads as maps (heads, width, d) of the dense ones, and their gains (heads, width)."""

    maps: Tensor
    gains: Tensor


def narrow_heads(
    vectors: Tensor, kept: Tensor, gains: Tensor, *, total: Callable[[Tensor], Tensor] = lambda own: own
) -> NarrowHeads:
    """Narrow heads to the coordinates `kept` (heads, r) and ballast, with the divisor of the dense heads.

    Args:
        vectors: a sample of the heads before the norm, (heads, tokens, d).
        kept: the kept coordinates; the first halves of pairs, then their second halves.
        gains: of the dense norm, (heads, d).
        total: sums a tensor over the ranks of a distributed run.
    """
    heads, _, head_dim = vectors.shape
    width = kept.shape[1] + BALLAST
    vectors = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
    selected = torch.zeros(heads, kept.shape[1], head_dim, dtype=gains.dtype, device=gains.device)
    selected.scatter_(2, kept[..., None], 1.0)
    directions = _main_directions(vectors, remaining(kept, head_dim), total)
    seen = (vectors @ selected.mT).square().sum(-1, keepdim=True)
    shares = torch.cat((seen, (vectors @ directions.mT).square()), dim=-1)  # of ‖q‖², (heads, tokens, 1 + ballast)
    ones = shares.new_ones(*shares.shape[:-1], 1)
    factors = _non_negative_least_squares(total(shares.mT @ shares), total(shares.mT @ ones)[..., 0])
    factors[:, 0].clamp_min_(LEAST_KEPT)
    # The mean over the narrow head is then that over the dense one, so ε has the same effect.
    roots = (factors * width / head_dim).sqrt()[..., None]
    first, second = (roots[:, 1:] * directions).chunk(2, dim=1)
    rows = (roots[:, :1] * selected).chunk(2, dim=1)
    scaled = (gains.gather(1, kept) / roots[:, 0]).chunk(2, dim=1)
    silent = gains.new_zeros(heads, BALLAST // 2)
    return NarrowHeads(
        torch.cat((rows[0], first, rows[1], second), dim=1), torch.cat((scaled[0], silent, scaled[1], silent), dim=1)
    )


def _main_directions(vectors: Tensor, removed: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the main directions (heads, ballast, d) of the coordinates `removed` (heads, n) of `vectors`."""
    index = removed[:, None].expand(-1, vectors.shape[1], -1)
    seen = vectors.gather(2, index)
    main = torch.linalg.eigh(total(seen.mT @ seen)).eigenvectors[..., -BALLAST:].mT
    directions = main.new_zeros(len(main), BALLAST, vectors.shape[2])
    return directions.scatter_(2, removed[:, None].expand_as(main), main)


def _non_negative_least_squares(gram: Tensor, cross: Tensor) -> Tensor:
    """Minimise βᵀ gram β − 2 crossᵀ β over β ≥ 0 by coordinate descent, for (heads, n, n) and (heads, n)."""
    result = torch.zeros_like(cross)
    scale = gram.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(gram.dtype).tiny)
    for _ in range(SWEEPS):
        for i in range(cross.shape[1]):
            slope = cross[:, i] - (gram[:, i] * result).sum(1)
            result[:, i] = (result[:, i] + slope / scale[:, i]).clamp_min(0)
    return result
