"""Define the allowed widths of a part, the weights that each width removes, and the plan of kept widths."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from optimum_modegpt.modeling.modegpt_family import Widths

TINY_HEAD_DIM, LARGE_HEAD_DIM = 32, 128
TINY_MLP_WIDTH = 512
EXPERT_STEP = 8
"""Widths of experts are multiples of this, because the fast kernels read rows of a multiple of 16 bytes."""
QUANTIZED_ROW = 32
"""Formats such as q4_0 of llama.cpp quantize this many values of a row together, and store other rows in 16 bits."""
MLP_STEPS = (128, 64, 32, 16, 8)
COARSEST_STEP = 0.04
"""The largest share of an MLP width that one rounding step may be."""


@dataclass(frozen=True)
class PartSize:
    """Dense width, weights per unit of width and grid of allowed widths of one part of one block."""

    dense: int
    weights_per_unit: int
    step: int
    floor: int
    """The smallest allowed width, on the grid."""

    @property
    def weights(self) -> int:
        """Return the number of weights of the dense part."""
        return self.dense * self.weights_per_unit

    def widths(self) -> list[int]:
        """Return all allowed widths, from the dense one down to the floor."""
        grid = range((self.dense - 1) // self.step * self.step, self.floor - 1, -self.step)
        return [self.dense, *grid]

    def nearest(self, width: float) -> int:
        """Return the allowed width nearest to `width`, the larger of two."""
        below = max(self.floor, int(min(width, self.dense) // self.step) * self.step)
        near = [allowed for allowed in (self.dense, below + self.step, below) if allowed <= self.dense]
        return min(near, key=lambda allowed: abs(allowed - width))


Sizes = Sequence[Mapping[str, PartSize]]
"""One mapping part -> size per block."""


@dataclass(frozen=True)
class Plan:
    """The widths that every block keeps."""

    widths: tuple[Widths, ...]

    @classmethod
    def from_list(cls, blocks: Iterable[Mapping[str, int]]) -> Plan:
        """Create a plan from one mapping part -> kept width per block."""
        return cls(tuple(Widths(**block) for block in blocks))

    @classmethod
    def dense(cls, sizes: Sizes) -> Plan:
        """Return the plan that removes nothing."""
        return cls.from_list({part: size.dense for part, size in block.items()} for block in sizes)

    def to_list(self) -> list[dict[str, int]]:
        """Return one mapping part -> kept width per block, safe for JSON, with the parts that a block has."""
        return [{part: width for part, width in vars(widths).items() if width} for widths in self.widths]


def part_size(dense: int, weights_per_unit: int, step: int, max_sparsity: float) -> PartSize:
    """Return the size of a part. Its floor is the smallest multiple of `step` that keeps ≥ 1 − `max_sparsity`."""
    floor = max(1, math.ceil(dense * (1 - max_sparsity) / step - 1e-9)) * step
    return PartSize(dense, weights_per_unit, step, min(floor, dense))


def head_step(head_dim: int, round_to: int | str, *, pairs: bool) -> int:
    """Return the grid step of a query/key or value head dim. Rotary `pairs` need even widths."""
    unit = 2 if pairs else 1
    if round_to == "auto":
        return 8 if head_dim >= TINY_HEAD_DIM else unit
    return math.lcm(int(round_to), unit)


def stock_head_step(head_dim: int, heads: int, round_to: int | str) -> int:
    """Return the grid step of the head dim of a checkpoint with one head dim for all blocks.

    Steps of large heads are those that attention kernels of all engines have. Rows of the output projection, which
    have `heads` × head dim values, stay multiples of `QUANTIZED_ROW` if they are.
    """
    step = head_step(head_dim, round_to, pairs=True)
    if round_to != "auto" or head_dim < TINY_HEAD_DIM:
        return step
    if head_dim >= LARGE_HEAD_DIM:
        step = 16
    if heads * head_dim % QUANTIZED_ROW == 0:
        step = math.lcm(step, QUANTIZED_ROW // math.gcd(heads, QUANTIZED_ROW))
    return step


def mlp_step(width: int, round_to: int | str) -> int:
    """Return the grid step of an MLP width: `round_to`, or the largest of 128, 64, 32, 16, 8 up to 4 % of the width."""
    if round_to != "auto":
        return int(round_to)
    if width < TINY_MLP_WIDTH:
        return 1
    for step in MLP_STEPS:
        if step <= COARSEST_STEP * width:
            return step
    return MLP_STEPS[-1]


def expert_step(width: int, round_to: int | str) -> int:
    """Return the grid step of the width of experts, a multiple of `EXPERT_STEP`."""
    return math.lcm(mlp_step(width, round_to), EXPERT_STEP)


def total_weights(sizes: Sizes) -> int:
    """Return the number of weights of all compressible projections of the dense model."""
    return sum(size.weights for block in sizes for size in block.values())


def plan_sparsity(plan: Plan, sizes: Sizes) -> float:
    """Compute 1 − Σ new / Σ dense over the weights of the compressed projections of all blocks."""
    kept = 0
    for widths, block in zip(plan.widths, sizes, strict=True):
        for part, size in block.items():
            kept += size.weights_per_unit * getattr(widths, part)
    return 1 - kept / total_weights(sizes)


def largest_sparsity(sizes: Sizes) -> float:
    """Return the sparsity with every part at its floor."""
    kept = sum(size.floor * size.weights_per_unit for block in sizes for size in block.values())
    return 1 - kept / total_weights(sizes)
