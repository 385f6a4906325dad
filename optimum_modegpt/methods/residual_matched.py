"""`method="default"`: residual-matched MoDeGPT (ours). It passes two residual streams through the blocks in order.

The dense stream runs through the dense blocks, the compressed one through the blocks already compressed. Every least
squares uses the moments of the compressed stream, with the missing difference to the dense stream as its target. Each
refit therefore also compensates the errors of earlier blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optimum_modegpt import distributed
from optimum_modegpt.architectures import Block
from optimum_modegpt.architectures.head import LinearHead
from optimum_modegpt.architectures.norms import gain, has_gain, set_gain
from optimum_modegpt.calibration.gradients import OutputGradients, metric_factor, query_metric
from optimum_modegpt.calibration.moments import (
    HeadMomentSum,
    HeadSamples,
    LinearMomentSum,
    QueryKeyMoments,
    SlopeSum,
    token_weights,
    without_gain,
)
from optimum_modegpt.calibration.streams import Stream, inputs_of, map_stream, store_like, token_count
from optimum_modegpt.calibration.transfers import prefetch
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.coordinates import CoordinateElimination, eliminate_coordinates, selection
from optimum_modegpt.decompositions.least_squares import LinearMoments, centred_refit, relative
from optimum_modegpt.decompositions.nystrom import remaining
from optimum_modegpt.decompositions.psd import ROOT_RIDGE, add_diagonal, at_least_float32, damp, mean_diagonal
from optimum_modegpt.decompositions.rotary import (
    PairElimination,
    eliminate_pairs,
    eliminate_pairs_alone,
    pair_indices,
    query_refit,
)
from optimum_modegpt.decompositions.softmax import SoftmaxSample, match_softmax, split_sample
from optimum_modegpt.decompositions.whitened_svd import block_diagonal, tail_error, two_sided_basis, value_basis
from optimum_modegpt.errors import naming
from optimum_modegpt.methods.channels import refit_to_dense
from optimum_modegpt.methods.factors import QueryKeyFactors, ValueOutputFactors
from optimum_modegpt.methods.head_norms import narrow_query_key
from optimum_modegpt.methods.method import CalibrationInputs
from optimum_modegpt.methods.mlp_refit import refit_experts, refit_mlp, refit_shared
from optimum_modegpt.methods.output_norm import before_norm
from optimum_modegpt.methods.targets import DenseTargets, MLPStreams
from optimum_modegpt.modeling.modegpt_family import Norm, Widths

GAIN_TOKENS, LOGITS = 8192, 2**27
"""Maximum number of tokens for the fit of the final gain, and of entries in their distributions."""


@dataclass(frozen=True)
class OutputMetrics:
    """The metrics in which errors inside one block are measured.

    Attributes:
        attention, mlp: of the outputs of attention and MLP, from `metric_factor`.
        query: of the queries, from `query_metric`. This and `attention` are None if the block's attention stays dense.
    """

    mlp: Tensor
    attention: Tensor | None = None
    query: Tensor | None = None

    @classmethod
    def of(cls, gradients: OutputGradients, block: Block, device: torch.device) -> OutputMetrics:
        """Return the metrics of the gradients at `block`."""
        mlp = metric_factor(gradients.mlp, device)
        if not block.attends:
            return cls(mlp)
        return cls(mlp, metric_factor(gradients.attention, device), query_metric(gradients.query, block, device))


# streams


def run_dense(block: Block, stream: Stream, arguments: dict[str, Any]) -> DenseTargets:
    """Run the dense block over the dense stream, and keep the targets of the refits."""
    device = block.device
    residual = block.residual
    attention_weights: list[Tensor] = []
    mlp_weights: list[Tensor] = []

    def sums() -> Iterator[Tensor]:
        for hidden in prefetch(stream, device):
            total = _mixed(block, arguments, hidden)
            middle = residual.after_attention(total)
            end = residual.add_mlp(middle, block.mlp(residual.mlp_input(residual.mlp_stream(hidden, middle))))
            # In a parallel block, the norm that divides the attention's output is the next block's.
            attention_weights.append(token_weights(residual.mlp_stream(end, total), block.norm))
            mlp_weights.append(token_weights(end, block.norm))
            yield from (total, end)

    both = list(store_like(sums(), stream))
    attention, mlp = both[::2], both[1::2]
    after = stream_after(block, mlp, residual.after_mlp, changed=not residual.ends_with_sum)
    return DenseTargets(attention, mlp, _with_mean_one(attention_weights), _with_mean_one(mlp_weights), after)


def compress_block(
    student: Block,
    inputs: CalibrationInputs,
    targets: DenseTargets,
    widths: Widths,
    *,
    metrics: OutputMetrics,
    config: ModeGPTConfig,
    keep_derivatives: bool,
) -> tuple[dict[str, float], Stream]:
    """Cut and refit the parts of `student`, a copy of the dense block at full width.

    `inputs` are those of the dense block. The target of each part is the output that makes the compressed stream equal
    to the dense one. The MLP therefore also compensates the error of the attention, even if both halves read the
    block's input.

    Returns:
        The relative error by part, and the compressed stream after the block.
    """
    residual, dense, compressed = student.residual, inputs.streams.dense, inputs.streams.compressed
    for norm in residual.norms_of_input:
        match_norm(norm, student.norm, dense, compressed)
    if student.attends:
        errors, sums = _compress_attention(student, inputs, targets, widths, metrics, config)
    else:
        errors, sums = {}, list(map_stream(partial(_mixed, student, inputs.arguments), student.device, compressed))

    for norm in residual.norms_of_middle:
        match_norm(norm, student.norm, targets.attention, sums)
    middle = stream_after(student, sums, residual.after_attention, changed=residual.post_norm)
    own = MLPStreams(residual.mlp_stream(compressed, middle), middle)
    with naming("mlp"):
        if student.experts is None:
            mlp = refit_mlp(student, own, targets, metrics.mlp, widths.mlp, config, keep_derivatives=keep_derivatives)
        else:
            mlp = refit_experts(
                student, own, targets, metrics.mlp, widths.mlp, config, keep_derivatives=keep_derivatives
            )
    mlp.install(student)
    errors["mlp"] = mlp.relative_error
    if student.shared is not None:
        with naming("shared"):
            shared = refit_shared(
                student, own, targets, metrics.mlp, widths.shared, config, keep_derivatives=keep_derivatives
            )
        student.install_shared(shared.channels)
        errors["shared"] = shared.relative_error
    sums = _after_mlp(student, own)

    for norm in residual.norms_of_output:
        match_norm(norm, student.norm, targets.mlp, sums)
    return errors, stream_after(student, sums, residual.after_mlp, changed=not residual.ends_with_sum)


def _compress_attention(
    student: Block,
    inputs: CalibrationInputs,
    targets: DenseTargets,
    widths: Widths,
    metrics: OutputMetrics,
    config: ModeGPTConfig,
) -> tuple[dict[str, float], Stream]:
    """Cut and refit the attention of `student`. Return the relative errors, and the sums of stream and its output."""
    stream, arguments = inputs.streams.compressed, inputs.arguments
    assert metrics.query is not None
    assert metrics.attention is not None
    with naming("qk"):
        moments = observe_query_key(student, stream, metrics.query, arguments)
        elimination = eliminate_query_key(student, moments, widths.qk, inputs.pairs)
        query_key = cut_query_key(
            student, moments, elimination, widths.qk, config, shared_gains=config.layout == "stock"
        )
    student.install_query_key(query_key.query, query_key.key, query_key.pairs, query_key.gains)

    with naming("vo"):
        heads = list(store_like(head_outputs(student, stream, arguments), stream))
        moments = observe_output(student, stream, heads, targets)
        value_output = cut_value_output(student, moments, metrics.attention, widths.vo, config)
    student.install_value_output(value_output.value, value_output.output, value_output.gate)
    errors = {"qk": query_key.relative_error, "vo": value_output.relative_error}
    return errors, _attended(student, stream, heads, value_output.bases)


def _mixed(block: Block, arguments: dict[str, Any], hidden: Tensor) -> Tensor:
    """Return the sum of stream and the output of the module that mixes tokens."""
    residual = block.residual
    return residual.add_attention(hidden, block.attend(residual.attention_input(hidden), arguments))


def match_norm(norm: Any, kind: Norm, dense: Stream, compressed: Stream) -> None:
    """Multiply the norm's gain, per channel, by the slope of the dense normalised stream on the compressed one.

    A norm without a gain does not change.
    """
    if not has_gain(norm):
        return
    slope, device = SlopeSum(norm, kind), norm.weight.device
    for target, source in zip(prefetch(dense, device), prefetch(compressed, device), strict=True):
        slope.add(target, source)
    present = gain(norm, kind)
    set_gain(norm, kind, present * slope.value().to(present))


def gain_tokens(windows: int, length: int, vocabulary: int) -> int:
    """Return the number of tokens that the final gain is fitted to: at least one of every window."""
    return max(windows, min(windows * length, GAIN_TOKENS, LOGITS // vocabulary))


def match_output(
    norm: Any, head: LinearHead, dense: Stream, compressed: Stream, dense_norm: Any, *, kind: Norm, capped: bool
) -> None:
    """Fit the final norm by `match_norm`, then fit its gain to the dense model's next-token distributions.

    `head` maps the norm's output to logits. If they are `capped`, the second fit is skipped, because it is for linear
    logits.
    """
    match_norm(norm, kind, dense, compressed)
    if capped or not has_gain(norm):
        return
    matrix, offset = head
    bare, device = without_gain(norm, kind), matrix.device
    length = dense[0].shape[1]
    own = sum(map(len, dense))
    windows = int(distributed.all_reduce(own))
    stride = -(-windows * length // gain_tokens(windows, length, len(matrix)))
    samples = []
    for target, source in zip(dense, compressed, strict=True):
        for wanted, seen in zip(
            target[:, stride - 1 :: stride].to(device), source[:, stride - 1 :: stride].to(device), strict=True
        ):
            distribution = (at_least_float32(dense_norm(wanted)) @ matrix.T + offset).softmax(-1)
            samples.append(SoftmaxSample(bare(at_least_float32(seen)), distribution))
    present = at_least_float32(gain(norm, kind))
    if getattr(norm, "bias", None) is not None:
        offset = offset + matrix @ at_least_float32(norm.bias.detach())
    fitted, held_back = split_sample(samples, before=distributed.exclusive_sum(own), total=distributed.all_reduce)
    set_gain(norm, kind, match_softmax(present, offset, matrix, fitted, held_back, total=distributed.all_reduce))


# query and key


def observe_query_key(
    block: Block, stream: Stream, metric: Tensor, arguments: dict[str, Any]
) -> QueryKeyMoments | None:
    """Measure query moments, for the given metric of the queries. If query and key stay at full width, return None."""
    if "qk" in block.uncut:
        return None
    total = HeadMomentSum(block.kv_heads)
    samples = HeadSamples(block, token_count(stream)) if block.normalised else None
    for batch in prefetch(stream, block.device):
        inputs = block.residual.attention_input(batch)
        if samples is None:
            total.add(block.query(inputs).unflatten(-1, (-1, block.head_dim)))
        else:
            total.add(samples.vectors(inputs, arguments)[0])
    return QueryKeyMoments(total.value(), metric, None if samples is None else samples.value())


def eliminate_query_key(
    block: Block, moments: QueryKeyMoments | None, rank: int, pairs: Tensor | None = None
) -> PairElimination | None:
    """Return the order in which the pairs of a head are removed, down to `rank`. None without pairs or moments.

    If `pairs` (rank / 2,) are given, the other ones are removed. The moments are those after the norms, if any. Norms
    after the rotation rule out a refit of the query, because the rotation is then between its projection and the
    moments.
    """
    if moments is None or not block.paired:
        return None
    eliminate = eliminate_pairs_alone if block.norms_rotated else eliminate_pairs
    order = None
    if pairs is not None:
        order = remaining(pairs[None].to(moments.metric.device), block.head_dim // 2).expand(block.kv_heads, -1)
    return eliminate(moments.metric, moments.query, rank // 2, order=order)


def cut_query_key(
    block: Block,
    moments: QueryKeyMoments | None,
    elimination: PairElimination | None,
    rank: int,
    config: ModeGPTConfig,
    *,
    shared_gains: bool = False,
) -> QueryKeyFactors:
    """Keep the pairs that `elimination` leaves, and refit the query on them.

    Without an elimination, use a two-sided basis. Without moments, `rank` must be the full one. `shared_gains` is that
    of `narrow_query_key`.
    """
    query, key = block.head_rows("query"), block.head_rows("key")
    if rank == block.head_dim:
        pairs = block.attention.rope_index if block.rotary else None
        return QueryKeyFactors(query, key, pairs, 0.0)
    assert moments is not None
    per_group = block.heads // block.kv_heads
    if elimination is None:
        # The metric has other units than the keys, and is zero for a head that no prediction depends on.
        loudness = mean_diagonal(moments.query)
        balanced = moments.metric * (loudness / mean_diagonal(moments.metric))[:, None, None]
        query_map, key_map = two_sided_basis(moments.query, add_diagonal(balanced, ROOT_RIDGE * loudness), rank)
        error = float(tail_error(moments.query, moments.metric, rank).square().mean().sqrt())
        return QueryKeyFactors(query_map.repeat_interleave(per_group, dim=0) @ query, key_map @ key, None, error)
    pairs, errors = elimination.after(rank // 2)
    pairs = distributed.broadcast(pairs)
    total = (damp(moments.metric, ROOT_RIDGE) * moments.query).sum((-2, -1))
    error = relative(errors.sum(), total.sum())
    query_map = None if block.norms_rotated else query_refit(moments.metric, pairs, ridge=config.query_ridge)
    if moments.samples is not None:
        return narrow_query_key(block, moments.samples, pairs, error, query_map, shared_gains=shared_gains)
    assert query_map is not None
    kept = pair_indices(pairs, block.head_dim)[..., None].expand(-1, -1, key.shape[2])
    query = query_map.repeat_interleave(per_group, dim=0) @ query
    return QueryKeyFactors(query, key.gather(1, kept), pairs, error)


# value and output


def head_outputs(block: Block, stream: Stream, arguments: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the inputs of the output projection, (batch, length, heads · head_dim), on the block's device."""
    with inputs_of(block.output) as seen:
        for hidden in prefetch(stream, block.device):
            block.attend(block.residual.attention_input(hidden), arguments)
            yield seen.pop()


def observe_output(block: Block, stream: Stream, heads: Iterable[Tensor], targets: DenseTargets) -> LinearMoments:
    """Measure moments of the output projection's input. The target is the missing difference to the dense sum."""
    device = block.device
    moments = LinearMomentSum(ones=block.output.bias is not None)
    norm = block.residual.attention_output_norm
    arrived = prefetch(stream, device), prefetch(heads, device), prefetch(targets.attention, device)
    for batch, head, target, weight in zip(*arrived, targets.attention_weights, strict=True):
        wanted = block.residual.missing(target, batch)
        if norm is not None:
            wanted, weight = before_norm(block.output(head), wanted, weight, norm, block.norm)
        moments.add(head, wanted, weight)
    return moments.value()


def cut_value_output(
    block: Block, moments: LinearMoments, metric: Tensor, rank: int, config: ModeGPTConfig
) -> ValueOutputFactors:
    """Choose the value basis of each group from the refitted output, then refit the output jointly over all heads.

    The basis loses least in `metric`, from `metric_factor`. The refit does not depend on it.
    """
    value, dense, bases = block.head_rows("value"), block.input_outputs(block.output), None
    if rank < block.head_dim:
        bases = _value_bases(block, moments, metric, rank, config)
        value = bases.mT @ value
        # The basis is orthonormal: its transpose inverts it.
        basis = block_diagonal(bases, block.heads // block.kv_heads, ones=moments.ones)
        own = basis.T @ (moments.gram @ dense)
        moments = moments.mapped(basis)
        dense = refit_to_dense(moments, own, basis.T @ dense, config)
    output = centred_refit(moments, dense, moments.refit_ridge(config.output_ridge))
    gate = None
    if bases is not None and block.family.attention.gate is not None:
        gate = bases.mT.repeat_interleave(block.heads // block.kv_heads, dim=0) @ block.head_rows("gate")
    return ValueOutputFactors(value, output, moments.relative_error(output), bases, gate)


def _value_bases(block: Block, moments: LinearMoments, metric: Tensor, rank: int, config: ModeGPTConfig) -> Tensor:
    """Choose the value basis (kv_heads, head_dim, rank) of each group: free, or some of its coordinates."""
    if block.keeps_coordinates:
        kept = eliminate_values(block, moments, metric, rank, config).kept(rank)
        return selection(distributed.broadcast(kept), block.head_dim)
    return torch.stack([value_basis(*group, rank) for group in value_groups(block, moments, metric, config)])


def eliminate_values(
    block: Block, moments: LinearMoments, metric: Tensor, rank: int, config: ModeGPTConfig
) -> CoordinateElimination:
    """Remove value coordinates by backward elimination, down to `rank`. The costs are measured in `metric`."""
    return eliminate_coordinates(*_grouped_heads(block, moments, metric, config), rank)


def value_groups(
    block: Block, moments: LinearMoments, metric: Tensor, config: ModeGPTConfig
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the moment and the refitted output rows of the heads of every key-value group, as for `value_basis`.

    The rows are multiplied by `metric`, from `metric_factor`.
    """
    for own, rows in zip(*_grouped_heads(block, moments, metric, config), strict=True):
        yield own.sum(0), rows.transpose(0, 1).flatten(1)


def _grouped_heads(
    block: Block, moments: LinearMoments, metric: Tensor, config: ModeGPTConfig
) -> tuple[Tensor, Tensor]:
    """Return moments (kv_heads, heads / kv_heads, d, d) and refitted output rows (…, d, d_model) of the heads.

    The rows are multiplied by `metric`.
    """
    per_group, size = block.heads // block.kv_heads, block.head_dim
    best = centred_refit(moments, block.input_outputs(block.output), moments.refit_ridge(config.output_ridge))
    grams = moments.gram[: moments.width, : moments.width].unflatten(0, (block.heads, size)).unflatten(2, (-1, size))
    own = grams.diagonal(dim1=0, dim2=2).movedim(-1, 0).contiguous()  # (heads, head_dim, head_dim)
    rows = (best @ metric)[: moments.width].unflatten(0, (block.kv_heads, per_group, size))
    return own.unflatten(0, (-1, per_group)), rows


def _attended(block: Block, stream: Stream, heads: Stream, bases: Tensor | None) -> Stream:
    """Return the sums of stream and attention output, from the head outputs with the dense values and their bases."""

    def total(hidden: Tensor, head: Tensor) -> Tensor:
        if bases is not None:
            grouped = head.unflatten(-1, (len(bases), -1, bases.shape[1]))  # (batch, length, kv_heads, per group, d)
            head = torch.einsum("...gpd,gdr->...gpr", grouped, bases.to(head)).flatten(-3)  # @ would copy the bases
        return block.residual.add_attention(hidden, block.output(head))

    return list(map_stream(total, block.device, stream, heads))


# helpers


def _after_mlp(block: Block, streams: MLPStreams) -> Stream:
    """Return the sums of stream and MLP output."""
    residual = block.residual

    def total(read: Tensor, middle: Tensor) -> Tensor:
        return residual.add_mlp(middle, block.mlp(residual.mlp_input(read)))

    device = block.device
    return list(store_like(itertools.starmap(total, streams.batches(device)), streams.middle))


def stream_after(block: Block, sums: Stream, function: Callable[[Tensor], Tensor], *, changed: bool) -> Stream:
    """Return the stream after a half from the sums of stream and output: the same, or `function` of it if `changed`."""
    return list(map_stream(function, block.device, sums)) if changed else sums


def _with_mean_one(weights: list[Tensor]) -> list[Tensor]:
    mean = float(
        distributed.all_reduce(sum(float(w.sum()) for w in weights))
        / distributed.all_reduce(sum(w.numel() for w in weights))
    )
    return [w / mean for w in weights]
