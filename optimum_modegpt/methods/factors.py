"""The result of a decomposition, part by part: what `Block.install_*` takes, and the error it leaves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class QueryKeyFactors:
    """Rows (heads, rank, in [+ 1]) of query and key; the rotary pairs (kv_heads, rank / 2), None without rotation."""

    query: Tensor
    key: Tensor
    pairs: Tensor | None
    relative_error: float


@dataclass(frozen=True)
class ValueOutputFactors:
    """Rows (kv_heads, rank, in [+ 1]) of value, output (heads · rank [+ 1], d_model), and bases (kv_heads, head_dim,
    rank) that map a head's dense output to its narrow one; None where they are not known or nothing was cut."""

    value: Tensor
    output: Tensor
    relative_error: float
    bases: Tensor | None = None


@dataclass(frozen=True)
class MLPFactors:
    """Input rows (rank, d_model [+ 1]) each, in the order of the family's layout, and down (rank [+ 1], d_model)."""

    rows: tuple[Tensor, ...]
    down: Tensor
    relative_error: float
