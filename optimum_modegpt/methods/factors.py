"""The results of decompositions: the arguments of `Block.install_*`, and the relative errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from optimum_modegpt.architectures import Block
from optimum_modegpt.architectures.block import Channels


@dataclass(frozen=True)
class QueryKeyFactors:
    """Rows (heads, rank, in [+ 1]) of query and key, and the pairs (kv_heads, rank / 2); None without rotation.

    `gains` (heads, rank) are those of the norms of "query" and "key". None leaves their gains, if there are norms.
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
    or nothing was cut. `gate` are the rows (heads, rank, in [+ 1]) of the gate; None if there is none, or nothing was
    cut.
    """

    value: Tensor
    output: Tensor
    relative_error: float
    bases: Tensor | None = None
    gate: Tensor | None = None


@dataclass(frozen=True)
class ExpertsFactors:
    """Gate and up (rank, d_model [+ 1]) each, and down (rank [+ 1], d_model), of every expert."""

    rows: list[tuple[Tensor, Tensor]]
    downs: list[Tensor]
    relative_error: float

    def install(self, block: Block) -> None:
        """Replace the experts of a block."""
        assert block.experts is not None
        block.experts.install(self.rows, self.downs)


@dataclass(frozen=True)
class MLPFactors:
    """The channels of an MLP without experts, or of a shared expert."""

    channels: Channels
    relative_error: float

    def install(self, block: Block) -> None:
        """Replace the MLP of a block without experts."""
        block.install_mlp(self.channels)
