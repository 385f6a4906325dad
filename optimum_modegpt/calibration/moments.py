"""Accumulate sums over tokens: second moments, cross moments, and slopes between two streams."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optimum_modegpt import distributed
from optimum_modegpt.architectures import Block
from optimum_modegpt.architectures.norms import set_gain
from optimum_modegpt.calibration.streams import calls_of
from optimum_modegpt.decompositions.least_squares import LinearMoments
from optimum_modegpt.decompositions.psd import (
    accumulation_dtype,
    at_least_float32,
    cross_matrix,
    gram_matrix,
    row_type,
    to_float64,
)
from optimum_modegpt.modeling.modegpt_family import Norm

WEIGHT_FLOOR = 1e-8
"""Smallest mean square of a residual that a token weight divides by."""

SAMPLE = 2**23
"""Maximum number of entries of the sample of queries before their norm."""

SLOPE_RIDGE = 1e-4
"""Ridge of the norm gains, as a fraction of the mean energy of a channel."""


@dataclass
class LinearMomentSum:
    """Accumulates `LinearMoments`, with products in float32 (in float64 for a float64 model) and sums in float64.

    After weighting, inputs and targets are converted to the inputs' `row_type`. The loss by rounding to 16 bits is of
    the size of the activations' own rounding. Products and energy use the same rounded numbers, so they are consistent.
    """

    ones: bool
    gram: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    energy: Tensor | float = 0.0
    tokens: int = 0

    @classmethod
    def zero(cls, inputs: int, targets: int, device: torch.device, *, ones: bool) -> LinearMomentSum:
        """Return the sum over no tokens, of `inputs` without the constant and of `targets`."""
        empty = to_float64(torch.zeros(0, device=device))
        gram, cross = (empty.new_zeros(inputs + ones, columns) for columns in (inputs + ones, targets))
        return cls(ones, gram, cross, empty.new_zeros(()))

    def add(self, inputs: Tensor, target: Tensor, weight: Tensor | None = None) -> None:
        """Add tokens: `inputs` (…, n), `target` (…, d), `weight` (…)."""
        inputs, target = inputs.flatten(0, -2), target.flatten(0, -2)
        self.tokens += len(inputs)
        rows = row_type(inputs.device, inputs.dtype)
        if self.ones:
            inputs = with_ones(inputs)
        if weight is not None:
            root = weight.flatten().sqrt()[:, None]
            inputs, target = root * inputs, root * target
        inputs, target = inputs.to(rows), target.to(rows)
        self.gram = _added(self.gram, gram_matrix(inputs))
        self.cross = _added(self.cross, cross_matrix(inputs, target))
        self.energy = self.energy + to_float64(at_least_float32(target).square().sum())

    def value(self) -> LinearMoments:
        """Return the moments so far, over the tokens of all ranks."""
        gram = distributed.all_reduce(self.gram)
        cross = distributed.all_reduce(self.cross)
        energy = distributed.all_reduce(self.energy)
        assert isinstance(gram, Tensor), "no tokens were added"
        assert isinstance(cross, Tensor)
        assert isinstance(energy, Tensor)
        return LinearMoments(gram, cross, energy, int(distributed.all_reduce(self.tokens)), self.ones)


def _added(total: Tensor | float, product: Tensor) -> Tensor:
    """Add a product to the float64 sum in place, because a copy would be the largest tensor in memory."""
    if isinstance(total, Tensor):
        return total.add_(product.to(total.device))
    return to_float64(product)


@dataclass
class HeadMomentSum:
    """Accumulates Σ x xᵀ of head vectors, one moment per key-value group: (groups, d, d), float64."""

    groups: int
    moment: Tensor | float = field(default=0.0)

    def add(self, vectors: Tensor) -> None:
        """Add `vectors` (…, heads, d). The heads of a group are contiguous."""
        # (tokens, groups, heads / groups, d)
        grouped = at_least_float32(vectors).flatten(0, -3).unflatten(1, (self.groups, -1))
        rows = grouped.transpose(0, 1).flatten(1, 2)  # (groups, tokens · heads / groups, d)
        self.moment = self.moment + to_float64(rows.mT @ rows)

    def value(self) -> Tensor:
        """Return the moments so far, over the tokens of all ranks."""
        moment = distributed.all_reduce(self.moment)
        assert isinstance(moment, Tensor)
        return moment


def with_ones(inputs: Tensor) -> Tensor:
    """Append the constant 1 to `inputs` (n, d) as the last column."""
    return torch.cat((inputs, inputs.new_ones(len(inputs), 1)), dim=1)


def token_weights(residual: Tensor, norm: Norm) -> Tensor:
    """Compute the token weights: the squared reciprocal of the divisor of the next norm.

    This is 1 / mean square of the residual (…, d_model), or 1 / variance for a centred norm.
    """
    residual = at_least_float32(residual)
    if norm.centred:
        residual = residual - residual.mean(-1, keepdim=True)
    return residual.square().mean(-1).clamp_min(WEIGHT_FLOOR).reciprocal()


def without_gain(norm: Any, kind: Norm) -> nn.Module:
    """Return a copy of a norm with gain 1 and without bias, in the dtype that sums are accumulated in."""
    bare = copy.deepcopy(norm).to(accumulation_dtype(norm.weight.dtype))
    set_gain(bare, kind, torch.ones_like(bare.weight))
    if getattr(bare, "bias", None) is not None:
        with torch.no_grad():
            bare.bias.zero_()
    return bare


@dataclass
class SlopeSum:
    """Accumulates the least-squares slope through the origin of the dense on the compressed stream, per channel.

    Both streams are normalised by `norm` without its gain and bias. `kind` says how it computes.
    """

    norm: nn.Module
    kind: Norm
    product: Tensor | float = 0.0
    square: Tensor | float = 0.0

    def __post_init__(self) -> None:
        self.norm = without_gain(self.norm, self.kind)

    def add(self, dense: Tensor, compressed: Tensor) -> None:
        """Add tokens of both streams, (…, d_model)."""
        target = self.norm(at_least_float32(dense)).flatten(0, -2)
        source = self.norm(at_least_float32(compressed)).flatten(0, -2)
        self.product = self.product + to_float64((source * target).sum(0))
        self.square = self.square + to_float64(source.square().sum(0))

    def value(self) -> Tensor:
        """Return the slopes (d_model,), with a ridge that keeps the slopes of nearly silent channels at 1."""
        product, square = distributed.all_reduce(self.product), distributed.all_reduce(self.square)
        assert isinstance(product, Tensor), "no tokens were added"
        assert isinstance(square, Tensor)
        ridge = (SLOPE_RIDGE * square.mean()).clamp_min(torch.finfo(square.dtype).tiny)
        return (product + ridge) / (square + ridge)


@dataclass(frozen=True)
class QueryKeyMoments:
    """Moments of queries per key-value group, and the metric of their errors: (groups, d, d), float64, before rotation.

    `query` is the second moment of the queries, summed over the group's heads. `metric` is the second moment of the
    gradients at the queries or, in the published method, of the keys. If there are norms, all are those after them, and
    `samples` are vectors before them, as `HeadSamples.value` returns.
    """

    query: Tensor
    metric: Tensor
    samples: dict[str, Tensor] | None = None


@dataclass
class HeadSamples:
    """Runs the norms of queries and keys, and keeps the vectors of some tokens before them.

    Attributes:
        block: a block with norms of queries and keys, of the compressed classes.
        tokens: the number of tokens of this rank.
    """

    block: Block
    tokens: int
    kept: dict[str, list[Tensor]] = field(default_factory=lambda: {"query": [], "key": []})

    def vectors(self, inputs: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return query (batch, length, heads, d) and key (batch, length, kv_heads, d) after their norms."""
        stride = max(1, self.tokens * self.block.heads * self.block.head_dim // SAMPLE)
        with calls_of(self.block.head_norm("query")) as queries, calls_of(self.block.head_norm("key")) as keys:
            self.block.attention.project(inputs, arguments.get("position_embeddings"))
        found = {"query": queries.pop(), "key": keys.pop()}
        for role, (before, _) in found.items():
            self.kept[role].append(self._heads(before)[:, ::stride].flatten(0, 1).transpose(0, 1))
        return self._heads(found["query"][1]), self._heads(found["key"][1])

    def _heads(self, vectors: Tensor) -> Tensor:
        """Return vectors (batch, length, heads, d), of which a norm of all heads takes the last two axes as one."""
        return vectors.reshape(*vectors.shape[:2], -1, self.block.head_dim)

    def value(self) -> dict[str, Tensor]:
        """Return the vectors of this rank's tokens before the norms of "query" and "key", (heads, tokens, d)."""
        block, found = self.block, {}
        for role, heads in (("query", block.heads), ("key", block.kv_heads)):
            none = block.key.weight.new_zeros(heads, 0, block.head_dim)  # a rank may have no tokens
            found[role] = to_float64(torch.cat((none, *self.kept[role]), dim=1))
        return found
