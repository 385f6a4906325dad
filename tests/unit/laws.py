"""Build test inputs: moments of a given rank, condition and scale, explicit data, rotary angles."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from optimum_modegpt.decompositions.least_squares import LinearMoments

MOMENTS: dict[str, dict[str, Any]] = {
    "well-posed": {},
    "singular": {"rank": 5},
    "condition 1e12": {"condition": 1e12},
    "scale 1e-20": {"scale": 1e-20},
    "scale 1e20": {"scale": 1e20, "condition": 1e4},
    "zero": {"rank": 0},
}
"""Arguments of `moment` by situation."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Draw standard normal numbers, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def eye(size: int) -> Tensor:
    """Return the identity matrix, float64."""
    return torch.eye(size, dtype=torch.float64)


def moment(
    width: int = 12, *, rank: int | None = None, condition: float = 10.0, scale: float = 1.0, seed: int = 0
) -> Tensor:
    """Return a second moment (width, width) with `rank` nonzero eigenvalues from `scale` to `scale` / `condition`."""
    rank = width if rank is None else rank
    directions = torch.linalg.qr(normal(width, width, seed=seed)).Q[:, :rank]
    values = scale * torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64)
    result = (directions * values) @ directions.T
    return (result + result.T) / 2


def linear_moments(
    inputs: Tensor, target: Tensor, weight: Tensor | None = None, *, ones: bool = False
) -> LinearMoments:
    """Compute the moments of explicit tokens: `inputs` (tokens, n), `target` (tokens, d), `weight` (tokens,)."""
    weight = inputs.new_ones(len(inputs)) if weight is None else weight
    inputs = torch.cat((inputs, inputs.new_ones(len(inputs), 1)), dim=1) if ones else inputs
    weighted = inputs * weight[:, None]
    energy = (weight[:, None] * target.square()).sum()
    return LinearMoments(weighted.T @ inputs, weighted.T @ target, energy, len(inputs), ones)


def rotary_angles(length: int, head_dim: int) -> Tensor:
    """Return the angles of every position and pair, (length, head_dim / 2)."""
    frequencies = 100.0 ** (-torch.arange(head_dim // 2, dtype=torch.float64) * 2 / head_dim)
    return torch.arange(length, dtype=torch.float64)[:, None] * frequencies


def turned(vectors: Tensor, angles: Tensor) -> Tensor:
    """Rotate every pair (i, i + d/2) of `vectors` (…, d), read as a complex number, by `angles` (…, d/2)."""
    first, second = vectors.chunk(2, dim=-1)
    rotated = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((rotated.real, rotated.imag), dim=-1)


def difference(actual: Tensor, expected: Tensor) -> float:
    """Return the relative difference in the Frobenius norm; absolute if `expected` is zero."""
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).norm() / (expected.norm() or 1.0))


def weighted_error(moment: Tensor, gap: Tensor) -> float:
    """Return tr(gapᵀ moment gap), the squared error of a map whose inputs have this moment."""
    return float((gap * (moment @ gap)).sum())


def subspace_gap(basis: Tensor, other: Tensor) -> float:
    """Return the distance between the projectors onto two column spaces."""
    first, second = (torch.linalg.qr(columns).Q for columns in (basis, other))
    return float((first @ first.T - second @ second.T).norm())
