"""Accumulate sums over tokens: second moments, cross moments, attention curvature, and slopes between two streams."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optimum_modegpt import distributed
from optimum_modegpt.architectures import Block
from optimum_modegpt.architectures.norms import set_gain
from optimum_modegpt.architectures.positions import head_tables
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
from optimum_modegpt.report import count_parameters

WEIGHT_FLOOR = 1e-8
"""Smallest mean square of a residual that a token weight divides by."""

SLOPE_RIDGE = 1e-4
"""Ridge of the norm gains, as a fraction of the mean energy of a channel."""

QUERY_STRIDE = 4
"""Stride of the queries that are used for the attention curvature."""

CURVATURE_BUDGET = 0.25
"""Maximum cost of the attention curvature, as a fraction of the cost of a stream's forward pass."""


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
    """Moments of queries and keys per key-value group: (groups, d, d), float64, before rotation.

    `query` is the second moment of the queries, summed over the group's heads. `key` is the second moment of the keys
    or, with rotary embeddings, the curvature F of the attention distribution.
    """

    query: Tensor
    key: Tensor


def query_key_vectors(block: Block, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the query (batch, length, heads, d) and key (batch, length, kv_heads, d) vectors before rotation.

    Biases are included.
    """
    shape = (-1, block.head_dim)
    return block.query(inputs).unflatten(-1, shape), block.key(inputs).unflatten(-1, shape)


@dataclass
class AttentionCurvatureSum:
    """Accumulates F = Σ_t Σ_s p_ts (z_ts − μ_t)(z_ts − μ_t)ᵀ per key-value group, summed over its heads (ours).

    z_ts is the key at s rotated into the frame of the query at t, p the attention probabilities, and
    μ_t = Σ_s p_ts z_ts. The second-order KL divergence of a softmax row is a quadratic form in F. Queries are
    subsampled by `stride`.
    """

    block: Block
    stride: int = QUERY_STRIDE
    curvature: Tensor | float = 0.0

    def add(self, query: Tensor, key: Tensor, arguments: dict[str, Any]) -> None:
        """Add `query` and `key` from `query_key_vectors`. `arguments` are the block's, for the rotary tables."""
        tables = head_tables(arguments["position_embeddings"], self.block.family, query.shape[-1])
        cos, sin = map(at_least_float32, tables)  # (1, length, d)
        # (batch, heads, length, d)
        query = _rotate(at_least_float32(query).transpose(1, 2), cos[:, None], sin[:, None])
        key = _rotate(at_least_float32(key).transpose(1, 2), cos[:, None], sin[:, None])
        length = query.shape[2]
        positions = torch.arange(length, device=query.device)
        rows = positions[self.stride - 1 :: self.stride] if length >= self.stride else positions[-1:]
        visible = positions <= rows[:, None]
        if (window := self.block.attention.attention_window) is not None:
            visible &= positions > rows[:, None] - window
        moments = []
        for group, heads in enumerate(torch.arange(query.shape[1]).view(key.shape[1], -1)):
            scatter = self._group(query[:, heads][:, :, rows], key[:, group], visible)
            moments.append(_turn_moments(scatter, cos[0, rows], -sin[0, rows]).sum(0))
        self.curvature = self.curvature + to_float64(torch.stack(moments))

    def value(self) -> Tensor:
        """Return F so far, over the tokens of all ranks, (groups, d, d)."""
        curvature = distributed.all_reduce(self.curvature)
        assert isinstance(curvature, Tensor)
        return curvature

    def _group(self, query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
        """Compute the scatter (rows, d, d) of the rotated keys around their mean, summed over batch and heads.

        `query` (batch, heads, rows, d), `key` (batch, length, d), `visible` (rows, length).
        """
        # A common shift changes neither softmax nor scatter, and avoids cancellation of large key biases in float32.
        key = key - key.mean(1, keepdim=True)
        logits = query @ key[:, None].mT * self.block.attention.scaling
        weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)  # (batch, heads, rows, length)
        mean = weights @ key[:, None]  # (batch, heads, rows, d)
        summed = weights.sum(1)  # (batch, rows, length)
        scatter = torch.stack([(w[:, :, None] * k).mT @ k for w, k in zip(summed, key, strict=True)]).sum(0)
        return scatter - torch.einsum("bhta,bhtc->tac", mean, mean)


def curvature_windows(block: Block, windows: int, length: int) -> int:
    """Return the number of windows for the attention curvature, so that its cost stays below `CURVATURE_BUDGET`."""
    parameters = count_parameters(block.module)
    forward = length * parameters + length * length * block.heads * block.head_dim
    return affordable_windows(curvature_work(block.head_dim, block.kv_heads, block.heads, length), forward, windows)


def curvature_work(head_dim: int, kv_heads: int, heads: int, length: int) -> float:
    """Return the multiply-adds of the curvature over one window."""
    return length / QUERY_STRIDE * length * head_dim * (kv_heads * head_dim + 2 * heads)


def affordable_windows(curvature: float, forward: float, windows: int) -> int:
    """Return how many of `windows` the curvature may use, from the multiply-adds of both for one window."""
    return max(1, min(windows, int(CURVATURE_BUDGET * windows * forward / curvature)))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _turn_moments(moments: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute R_t M_t R_tᵀ for moments (rows, d, d) and tables (rows, d)."""
    half = _rotate(moments, cos[:, None], sin[:, None])
    return _rotate(half.mT, cos[:, None], sin[:, None]).mT
