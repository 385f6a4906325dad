"""The results of decompositions: the arguments of `Block.install_*`, and the relative errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class QueryKeyFactors:
    """Rows (heads, rank, in [+ 1]) of query and key, and the pairs (kv_heads, rank / 2); None without rotation.

    `gains` (heads, rank) are those of the norms of "query" and "key"; None if there are none, or they do not change.
    """

    query: Tensor
    key: Tensor
    pairs: Tensor | None
    relative_error: float
    gains: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class ValueOutputFactors:
    """Rows (kv_heads, rank, in [+ 1]) of value, and output (heads · rank [+ 1], d_model).

    `bases` (kv_heads, head_dim, rank) map a head's dense output to its narrow one. They are None if they are not known
    or nothing was cut.
    """

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
