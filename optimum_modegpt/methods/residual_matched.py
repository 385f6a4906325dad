"""`method="default"`: residual-matched MoDeGPT (ours). Blocks in order, over two residual streams.

The dense stream runs through the dense blocks, the compressed one through the blocks already compressed. Every least
squares has the moments of the compressed stream and the residual of the dense stream as its target, so each refit also
makes up for what earlier blocks lost.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from optimum_modegpt import distributed
from optimum_modegpt.architectures import Architecture, Block
from optimum_modegpt.calibration.moments import (
    AttentionCurvatureSum,
    HeadMomentSum,
    LinearMomentSum,
    QueryKeyMoments,
    SlopeSum,
    curvature_windows,
    query_key_vectors,
    token_weights,
    with_ones,
)
from optimum_modegpt.calibration.streams import Stream, check_dense, inputs_of, map_stream, store_like
from optimum_modegpt.calibration.transfers import prefetch
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.gauss_newton import TokenSample, hidden_channels, refit_inputs
from optimum_modegpt.decompositions.least_squares import LinearMoments, centred_refit, relative
from optimum_modegpt.decompositions.nystrom import elimination_order, remaining
from optimum_modegpt.decompositions.psd import ROOT_RIDGE, add_diagonal, at_least_float32, damp, inverse
from optimum_modegpt.decompositions.rotary import PairElimination, eliminate_pairs, pair_indices, query_refit
from optimum_modegpt.decompositions.softmax import SoftmaxSample, match_softmax, split_sample
from optimum_modegpt.decompositions.whitened_svd import block_diagonal, tail_error, two_sided_basis, value_basis
from optimum_modegpt.errors import naming
from optimum_modegpt.methods.factors import MLPFactors, QueryKeyFactors, ValueOutputFactors
from optimum_modegpt.methods.method import CutBlock, StreamPair
from optimum_modegpt.modeling.modegpt_family import Widths
from optimum_modegpt.report import PARTS

REFIT_TOKENS = 65_536
"""Most tokens that the refit of gate and up looks at."""

GAIN_TOKENS, LOGITS = 8192, 2**27
"""Most tokens, and most numbers in their distributions, that the final gain is fitted to."""

FINAL_ROUNDS = 2
"""Rounds of refitting gate and up, then down, after the last elimination."""


@dataclass(frozen=True)
class DenseTargets:
    """What the dense block does to the dense stream, a tensor a batch.

    The sums of stream and part output (before a post-norm), the weights of their tokens (None: all equal; where they
    were computed, they are small), and the stream after the block.
    """

    attention: Stream
    mlp: Stream
    attention_weights: list[Tensor] | None
    mlp_weights: list[Tensor] | None
    after: Stream


# streams


def run_dense(block: Block, stream: Stream, arguments: dict[str, Any], *, weighted: bool = True) -> DenseTargets:
    """Runs the dense block over the dense stream and keeps what the refits are to match."""
    device = block.output.weight.device
    weights: tuple[list[Tensor], list[Tensor]] = ([], [])

    def sums() -> Iterator[Tensor]:
        for hidden in prefetch(stream, device):
            total = hidden + block.attend(block.attention_input(hidden), arguments)
            middle = block.after_attention(total)
            end = middle + block.down(block.mlp_hidden(block.mlp_input(middle)))
            weights[0].append(token_weights(total, block.attention_norm))
            weights[1].append(token_weights(end, block.mlp_norm))
            yield from (total, end)

    both = list(store_like(sums(), stream))
    attention, mlp = both[::2], both[1::2]
    attention_weights, mlp_weights = (_with_mean_one(w) if weighted else None for w in weights)
    return DenseTargets(attention, mlp, attention_weights, mlp_weights, stream_after(block, mlp, block.after_mlp))


def compress_block(
    student: Block,
    dense: Stream,
    compressed: Stream,
    targets: DenseTargets,
    widths: Widths,
    *,
    arguments: dict[str, Any],
    config: ModeGPTConfig,
    keep_derivatives: bool,
) -> tuple[dict[str, float], Stream]:
    """Cuts and refits the three parts of `student`, a copy of the dense block at full width.

    `dense` and `compressed` are the two streams at the block's input. Returns the relative error by part, and the
    compressed stream after the block.
    """
    if student.norm_first:
        match_norm(student.attention_norm, dense, compressed)
    with naming("qk"):
        moments = observe_query_key(student, compressed, arguments)
        elimination = eliminate_query_key(student, moments, widths.qk)
        query_key = cut_query_key(student, moments, elimination, widths.qk, config)
    student.install_query_key(query_key.query, query_key.key, query_key.pairs)

    with naming("vo"):
        heads = list(store_like(head_outputs(student, compressed, arguments), compressed))
        moments = observe_output(student, compressed, heads, targets.attention, targets.attention_weights)
        value_output = cut_value_output(student, moments, widths.vo, config)
    student.install_value_output(value_output.value, value_output.output)
    sums = _attended(student, compressed, heads, value_output.bases)

    match_norm(student.mlp_norm if student.norm_first else student.attention_norm, targets.attention, sums)
    middle = stream_after(student, sums, student.after_attention)
    with naming("mlp"):
        mlp = refit_mlp(student, middle, targets, widths.mlp, config, keep_derivatives=keep_derivatives)
    student.install_mlp(mlp.rows, mlp.down)
    device = student.output.weight.device
    sums = list(map_stream(lambda h: h + student.down(student.mlp_hidden(student.mlp_input(h))), device, middle))

    if not student.norm_first:
        match_norm(student.mlp_norm, targets.mlp, sums)
    errors = {"qk": query_key.relative_error, "vo": value_output.relative_error, "mlp": mlp.relative_error}
    return errors, stream_after(student, sums, student.after_mlp)


def match_norm(norm: Any, dense: Stream, compressed: Stream) -> None:
    """Scales the norm's weight, per channel, by the slope of the dense normalised stream on the compressed one.

    A norm without a weight is left alone.
    """
    weight = getattr(norm, "weight", None)
    if weight is None:
        return
    slope = SlopeSum(norm)
    for target, source in zip(prefetch(dense, weight.device), prefetch(compressed, weight.device), strict=True):
        slope.add(target, source)
    with torch.no_grad():
        weight.mul_(slope.value().to(weight))


def gain_tokens(windows: int, length: int, vocabulary: int) -> int:
    """How many tokens the final gain is fitted to; at least one of every window."""
    return max(windows, min(windows * length, GAIN_TOKENS, LOGITS // vocabulary))


def match_output(norm: Any, head: Tensor, dense: Stream, compressed: Stream, dense_norm: Any) -> None:
    """The final norm: first `match_norm`, then its gain is fitted to the dense model's next-token distributions.

    `head` (vocabulary, d_model) maps the norm's output to logits.
    """
    match_norm(norm, dense, compressed)
    if getattr(norm, "weight", None) is None:
        return
    bare, device = SlopeSum(norm).norm, head.device
    length = dense[0].shape[1]
    windows = sum(len(batch) for batch in dense)
    stride = -(
        -int(distributed.all_reduce(windows))
        * length
        // gain_tokens(int(distributed.all_reduce(windows)), length, len(head))
    )
    samples = []
    for target, source in zip(dense, compressed, strict=True):
        for wanted, seen in zip(
            target[:, stride - 1 :: stride].to(device), source[:, stride - 1 :: stride].to(device), strict=True
        ):
            distribution = (at_least_float32(dense_norm(wanted)) @ head.T).softmax(-1)
            samples.append(SoftmaxSample(bare(at_least_float32(seen)), distribution))
    bias = getattr(norm, "bias", None)
    gain = at_least_float32(norm.weight.detach())
    bias = torch.zeros_like(gain) if bias is None else at_least_float32(bias.detach())
    fitted, held_back = split_sample(samples, before=distributed.exclusive_sum(windows), total=distributed.all_reduce)
    with torch.no_grad():
        norm.weight.copy_(match_softmax(gain, bias, head, fitted, held_back, total=distributed.all_reduce))


# query and key


def observe_query_key(block: Block, stream: Stream, arguments: dict[str, Any]) -> QueryKeyMoments:
    """Query moments with the attention curvature (rotary), or with the key moments; over as many windows as pay."""
    device = block.output.weight.device
    own = sum(len(batch) for batch in stream)
    windows = own
    if block.rotary:
        length = arguments["position_embeddings"][0].shape[1]
        windows = curvature_windows(block, int(distributed.all_reduce(own)), length) - distributed.exclusive_sum(own)
    query_sum, key_sum, curvature = (
        HeadMomentSum(block.kv_heads),
        HeadMomentSum(block.kv_heads),
        AttentionCurvatureSum(block),
    )
    for batch in prefetch(_first_windows(stream, windows), device):
        query, key = query_key_vectors(block, block.attention_input(batch))
        query_sum.add(query)
        if block.rotary:
            curvature.add(query, key, arguments)
        else:
            key_sum.add(key)
    return QueryKeyMoments(query_sum.value(), curvature.value() if block.rotary else key_sum.value())


def eliminate_query_key(block: Block, moments: QueryKeyMoments, rank: int) -> PairElimination | None:
    """The order in which a head's rotary pairs go, down to `rank`; None without rotation, where nothing is selected."""
    return eliminate_pairs(moments.key, moments.query, rank // 2) if block.rotary else None


def cut_query_key(
    block: Block, moments: QueryKeyMoments, elimination: PairElimination | None, rank: int, config: ModeGPTConfig
) -> QueryKeyFactors:
    """Rotary: the pairs that `elimination` leaves, query refitted on their curvature. Else a two-sided basis."""
    query, key = block.head_rows("query"), block.head_rows("key")
    if rank == block.head_dim:
        pairs = block.attention.rope_index if block.rotary else None
        return QueryKeyFactors(query, key, pairs, 0.0)
    per_group = block.heads // block.kv_heads
    if elimination is None:
        query_map, key_map = two_sided_basis(moments.query, moments.key, rank)
        error = float(tail_error(moments.query, moments.key, rank).square().mean().sqrt())
        return QueryKeyFactors(query_map.repeat_interleave(per_group, dim=0) @ query, key_map @ key, None, error)
    pairs, errors = elimination.after(rank // 2)
    pairs = distributed.broadcast(pairs)
    query_map = query_refit(moments.key, pairs, ridge=config.query_ridge).repeat_interleave(per_group, dim=0)
    store_like = pair_indices(pairs, block.head_dim)[..., None].expand(-1, -1, key.shape[2])
    total = (damp(moments.key, ROOT_RIDGE) * moments.query).sum((-2, -1))
    return QueryKeyFactors(query_map @ query, key.gather(1, store_like), pairs, relative(errors.sum(), total.sum()))


# value and output


def head_outputs(block: Block, stream: Stream, arguments: dict[str, Any]) -> Iterator[Tensor]:
    """What the attention gives its output projection, (batch, length, heads · head_dim), on the block's device."""
    with inputs_of(block.output) as seen:
        for hidden in prefetch(stream, block.output.weight.device):
            block.attend(block.attention_input(hidden), arguments)
            yield seen.pop()


def observe_output(
    block: Block, stream: Stream, heads: Iterable[Tensor], targets: Stream, weights: list[Tensor] | None
) -> LinearMoments:
    """Moments of the output projection's input, with what is missing from the stream to the dense sum as the target."""
    device = block.output.weight.device
    moments = LinearMomentSum(ones=block.output.bias is not None)
    arrived = (prefetch(each, device) for each in (stream, heads, targets))
    for index, (batch, head, target) in enumerate(zip(*arrived, strict=True)):
        weight = None if weights is None else weights[index]
        moments.add(head, at_least_float32(target) - at_least_float32(batch), weight)
    return moments.value()


def cut_value_output(block: Block, moments: LinearMoments, rank: int, config: ModeGPTConfig) -> ValueOutputFactors:
    """The value basis of each group from the refitted output, then one joint refit of the output over all heads."""
    value, dense, bases = block.head_rows("value"), block.input_outputs(block.output), None
    per_group, size = block.heads // block.kv_heads, block.head_dim
    if rank < size:
        best = centred_refit(moments, dense, moments.ridge(config.output_ridge))
        grams = (
            moments.gram[: moments.width, : moments.width].unflatten(0, (block.heads, size)).unflatten(2, (-1, size))
        )
        own = torch.stack([grams[head, :, head] for head in range(block.heads)])  # (heads, head_dim, head_dim)
        groups = own.unflatten(0, (-1, per_group)).sum(1)
        rows = best[: moments.width].unflatten(0, (block.kv_heads, per_group, size))
        bases = torch.stack(
            [value_basis(g, r.transpose(0, 1).flatten(1), rank) for g, r in zip(groups, rows, strict=True)]
        )
        value = bases.mT @ value
        basis = block_diagonal(bases, per_group, ones=moments.ones)  # orthonormal: its transpose inverts it
        moments, dense = moments.mapped(basis), basis.T @ dense
    output = centred_refit(moments, dense, moments.ridge(config.output_ridge))
    return ValueOutputFactors(value, output, moments.relative_error(output), bases)


def _attended(block: Block, stream: Stream, heads: Stream, bases: Tensor | None) -> Stream:
    """The sums of stream and attention output from the head outputs with the dense values: Z B is what B gives."""

    def total(hidden: Tensor, head: Tensor) -> Tensor:
        if bases is not None:
            grouped = head.unflatten(-1, (len(bases), -1, bases.shape[1]))  # (batch, length, kv_heads, per group, d)
            head = torch.einsum("...gpd,gdr->...gpr", grouped, bases.to(head)).flatten(-3)  # @ would copy the bases
        return hidden + block.output(head)

    return list(map_stream(total, block.output.weight.device, stream, heads))


# mlp


def observe_mlp(block: Block, middle: Stream, targets: Stream, weights: list[Tensor] | None) -> LinearMoments:
    """Moments of the down projection's input, with what is missing to the dense sum as the target."""
    device = block.output.weight.device
    moments = LinearMomentSum(ones=block.down.bias is not None)
    for index, (batch, target) in enumerate(zip(prefetch(middle, device), prefetch(targets, device), strict=True)):
        weight = None if weights is None else weights[index]
        moments.add(
            block.mlp_hidden(block.mlp_input(batch)), at_least_float32(target) - at_least_float32(batch), weight
        )
    return moments.value()


def eliminate_mlp(block: Block, moments: LinearMoments, rank: int, config: ModeGPTConfig) -> Tensor:
    """The channels in the order in which backward elimination removes them from the refitted W*, down to `rank`."""
    return _elimination(block.input_outputs(block.down), moments, rank, config)


def cut_mlp(block: Block, moments: LinearMoments, order: Tensor, config: ModeGPTConfig) -> MLPFactors:
    """The MLP without the channels of `order`, down refitted for those that stay."""
    factors = MLPFactors(block.mlp_rows(), block.input_outputs(block.down), 0.0)
    ridge = moments.ridge(config.output_ridge)
    return _refit_down(*_without(factors, moments, order), ridge)


def refit_mlp(
    student: Block,
    middle: Stream,
    targets: DenseTargets,
    rank: int,
    config: ModeGPTConfig,
    *,
    keep_derivatives: bool,
) -> MLPFactors:
    """`cut_mlp`, and where channels are removed gate and up are refitted as well.

    Half of the channels go first, and the others are chosen among refitted ones; each refit of gate and up is followed
    by one of down with the new hidden channels. Two rounds of both close the second half.
    """
    moments = observe_mlp(student, middle, targets.mlp, targets.mlp_weights)
    if rank == moments.width or not config.refit_iterations:
        return cut_mlp(student, moments, eliminate_mlp(student, moments, rank, config), config)
    own = sum(len(batch) for batch in middle)
    windows = max(1, REFIT_TOKENS // middle[0].shape[1])
    sample = itertools.islice(
        _token_samples(student, middle, targets), max(0, windows - distributed.exclusive_sum(own))
    )
    samples = _kept_samples(sample, middle)
    factors = MLPFactors(student.mlp_rows(), student.input_outputs(student.down), 0.0)
    halfway = (rank + moments.width) // 2
    for width, rounds in ((halfway, 1), (rank, FINAL_ROUNDS)):
        order, ridge = _elimination(factors.down, moments, width, config), moments.ridge(config.output_ridge)
        factors, moments = _without(factors, moments, order)  # what the moments were takes more than what they are
        factors = _refit_down(factors, moments, ridge)
        for _ in range(rounds):
            del moments  # they take more than all that the refit keeps
            factors = _refit_inputs(student, factors, samples, config, keep_derivatives=keep_derivatives)
            moments = _hidden_moments(student, factors.rows, samples)
            factors = _refit_down(factors, moments, moments.ridge(config.output_ridge))
    if windows < distributed.all_reduce(own):
        moments = _hidden_moments(student, factors.rows, _token_samples(student, middle, targets))
        factors = _refit_down(factors, moments, moments.ridge(config.output_ridge))
    return factors


def _elimination(down: Tensor, moments: LinearMoments, rank: int, config: ModeGPTConfig) -> Tensor:
    """The channels that go, first one first, when `rank` are to be left."""
    ridge = moments.ridge(config.output_ridge)
    inverse_hessian = inverse(add_diagonal(moments.gram, ridge))
    best = inverse_hessian @ (moments.cross + ridge * down)
    order = elimination_order(inverse_hessian, best, moments.width - rank, protected=int(moments.ones))
    return distributed.broadcast(order)


def _without(factors: MLPFactors, moments: LinearMoments, order: Tensor) -> tuple[MLPFactors, LinearMoments]:
    """The factors, and the moments, without the channels of `order`."""
    store_like = remaining(order, moments.width)
    rows, down = tuple(row[store_like] for row in factors.rows), factors.down[moments.with_constant(store_like)]
    return MLPFactors(rows, down, factors.relative_error), moments.kept(store_like)


def _refit_inputs(
    block: Block, factors: MLPFactors, samples: list[TokenSample], config: ModeGPTConfig, *, keep_derivatives: bool
) -> MLPFactors:
    """One Gauss–Newton step on gate and up with down fixed; the output bias is taken off the target."""
    rank = len(factors.rows[0])
    weight, bias = factors.down.to(factors.rows[0]).split((rank, len(factors.down) - rank))
    if len(bias):
        samples = [replace(sample, target=sample.target - bias[0].to(sample.target)) for sample in samples]
    rows = refit_inputs(
        factors.rows,
        weight,
        samples,
        block.activation,
        ridge=config.input_ridge,
        iterations=config.refit_iterations,
        keep_derivatives=keep_derivatives,
        before=distributed.exclusive_sum(len(samples)),
        total=distributed.all_reduce,
    )
    return replace(factors, rows=rows)


def _refit_down(factors: MLPFactors, moments: LinearMoments, ridge: Tensor) -> MLPFactors:
    """Down refitted to the present hidden channels, centred on what it is."""
    down = centred_refit(moments, factors.down, ridge)
    return MLPFactors(factors.rows, down, moments.relative_error(down))


def _hidden_moments(block: Block, rows: tuple[Tensor, ...], samples: Iterable[TokenSample]) -> LinearMoments:
    """Moments of the hidden channels that `rows` give, with the samples' targets."""
    moments = LinearMomentSum(ones=block.down.bias is not None)
    for sample in samples:
        inputs, target, weight = (x.to(rows[0].device) for x in (sample.inputs, sample.target, sample.weight))
        moments.add(hidden_channels(rows, inputs, block.activation), target, weight)
    return moments.value()


def _token_samples(block: Block, middle: Stream, targets: DenseTargets) -> Iterator[TokenSample]:
    """The MLP's normalised inputs and its targets, window after window, on the block's device."""
    assert targets.mlp_weights is not None
    biased = block.mlp_inputs[0].bias is not None
    device = block.output.weight.device
    arrived = (prefetch(each, device) for each in (middle, targets.mlp))
    for batch, target, weight in zip(*arrived, targets.mlp_weights, strict=True):
        inputs, missing = at_least_float32(block.mlp_input(batch)), at_least_float32(target) - at_least_float32(batch)
        for seen, wanted, own in zip(inputs, missing, weight, strict=True):
            yield TokenSample(with_ones(seen) if biased else seen, wanted, own)


def _kept_samples(samples: Iterable[TokenSample], beside: Stream) -> list[TokenSample]:
    """Their inputs and targets where the stream is kept; the weights stay where they are."""
    weights: list[Tensor] = []

    def parts() -> Iterator[Tensor]:
        for sample in samples:
            weights.append(sample.weight)
            yield from (sample.inputs, sample.target)

    both = list(store_like(parts(), beside))
    return list(map(TokenSample, both[::2], both[1::2], weights))


# helpers


def stream_after(block: Block, sums: Stream, post_norm: Callable[[Tensor], Tensor]) -> Stream:
    """The stream that the sums of a part are, or become by the norm that follows them."""
    return sums if block.norm_first else list(map_stream(post_norm, block.output.weight.device, sums))


def _first_windows(stream: Stream, windows: int) -> Iterable[Tensor]:
    for batch in stream:
        if windows <= 0:
            return
        yield batch[:windows]
        windows -= len(batch)


def _with_mean_one(weights: list[Tensor]) -> list[Tensor]:
    mean = float(
        distributed.all_reduce(sum(float(w.sum()) for w in weights))
        / distributed.all_reduce(sum(w.numel() for w in weights))
    )
    return [w / mean for w in weights]


@dataclass(frozen=True)
class ResidualMatched:
    """The residual-matched method, as `compress` runs it."""

    config: ModeGPTConfig

    def cut_block(
        self,
        block: Block,
        streams: StreamPair,
        widths: Widths,
        arguments: dict[str, Any],
        *,
        windows: Tensor,
        keep_derivatives: bool,
    ) -> CutBlock:
        """Cut and refit a copy of the block. It stays as it is at its dense widths while nothing before it was cut."""
        copied = block.compressible_copy(block.output.weight.device)
        targets = run_dense(block, streams.dense, arguments)
        check_dense(targets.after, windows)
        if widths == block.dense_widths and streams.equal:
            return CutBlock(copied, dict.fromkeys(PARTS, 0.0), StreamPair(targets.after, targets.after))
        errors, after = compress_block(
            copied,
            streams.dense,
            streams.compressed,
            targets,
            widths,
            arguments=arguments,
            config=self.config,
            keep_derivatives=keep_derivatives,
        )
        return CutBlock(copied, errors, StreamPair(targets.after, after))

    def fit_final_norm(self, architecture: Architecture, streams: StreamPair, device: torch.device) -> nn.Module | None:
        """Fit a copy of the final norm to the dense model's predictions, if anything was cut."""
        if architecture.final_norm is None or streams.equal:
            return copy.deepcopy(architecture.final_norm)
        norm = copy.deepcopy(architecture.final_norm).to(device)
        match_output(norm, architecture.head(device), streams.dense, streams.compressed, copy.deepcopy(norm))
        return norm.to(architecture.blocks[-1].output.weight.device)
