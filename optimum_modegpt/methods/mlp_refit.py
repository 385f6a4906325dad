"""Cut and refit the MLP of a block, its experts, or its shared expert, so that it restores the dense stream (ours)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from optimum_modegpt import distributed
from optimum_modegpt.architectures import Block
from optimum_modegpt.architectures.block import Channels
from optimum_modegpt.architectures.experts import Routing
from optimum_modegpt.calibration.moments import LinearMomentSum, with_ones
from optimum_modegpt.calibration.streams import Stream, store_like
from optimum_modegpt.calibration.transfers import prefetch
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.gauss_newton import Activation, TokenSample
from optimum_modegpt.decompositions.least_squares import LinearMoments, centred_refit
from optimum_modegpt.decompositions.psd import at_least_float32
from optimum_modegpt.methods.channels import eliminate_channels, without_channels
from optimum_modegpt.methods.experts import ExpertMoments, RoutedTokens, cut_experts, refits_experts
from optimum_modegpt.methods.factors import ExpertsFactors, MLPFactors
from optimum_modegpt.methods.input_refit import hidden_moments, refit_rows, refit_windows, refits_inputs
from optimum_modegpt.methods.output_norm import before_norm
from optimum_modegpt.methods.targets import DenseTargets, MLPStreams

SMALLEST_GATE = 1e-4
"""Smallest weight of a shared expert's output that a missing difference is divided by."""


@dataclass(frozen=True)
class SampledMLP:
    """A dense MLP or shared expert, with the tokens of this rank.

    Attributes:
        channels: its weights.
        activation: its activation φ.
        samples: yields inputs, targets and weights of the tokens, window by window, on the block's device.
        stream: the residual stream that its output is added to. Stored windows get the same storage.
    """

    channels: Channels
    activation: Activation
    samples: Callable[[], Iterator[TokenSample]]
    stream: Stream


def observe_mlp(block: Block, streams: MLPStreams, targets: DenseTargets) -> LinearMoments:
    """Measure moments of the down projection's input. The target is the missing difference to the dense sum."""
    device, residual = block.device, block.residual
    moments = LinearMomentSum(ones=block.down.bias is not None)
    arrived = streams.batches(device), prefetch(targets.mlp, device)
    for (read, middle), target, weight in zip(*arrived, targets.mlp_weights, strict=True):
        hidden = block.mlp_hidden(residual.mlp_input(read))
        wanted = residual.missing(target, middle)
        if residual.mlp_output_norm is not None:
            wanted, weight = before_norm(block.down(hidden), wanted, weight, residual.mlp_output_norm, block.norm)
        moments.add(hidden, wanted, weight)
    return moments.value()


def observe_experts(block: Block, streams: MLPStreams, targets: DenseTargets) -> list[LinearMoments]:
    """Measure moments of every expert. The target is its dense output and its share of the missing difference."""
    assert block.experts is not None
    moments = ExpertMoments(block.experts)
    for routed in _routed_tokens(block, streams, targets):
        moments.add(routed)
    return moments.value()


def _routed_tokens(block: Block, streams: MLPStreams, targets: DenseTargets) -> Iterator[RoutedTokens]:
    """Yield the tokens of every batch with their experts, on the block's device."""
    device, residual = block.device, block.residual
    arrived = streams.batches(device), prefetch(targets.mlp, device)
    for (read, middle), target, weight in zip(*arrived, targets.mlp_weights, strict=True):
        output, routing, _ = block.route(residual.mlp_input(read))
        wanted = residual.missing(target, middle)
        if residual.mlp_output_norm is not None:
            wanted, weight = before_norm(output, wanted, weight, residual.mlp_output_norm, block.norm)
        yield RoutedTokens(routing, (wanted - output).flatten(0, 1), weight.flatten())


def cut_channels(channels: Channels, moments: LinearMoments, order: Tensor, config: ModeGPTConfig) -> MLPFactors:
    """Remove the channels of `order`, and refit down for the others."""
    kept, dense, moments = without_channels(channels.down, moments, order, config)
    down = centred_refit(moments, dense, moments.refit_ridge(config.output_ridge))
    rows = tuple(row[kept] for row in channels.rows)
    return MLPFactors(Channels(rows, down), moments.relative_error(down))


def refit_channels(
    mlp: SampledMLP,
    moments: LinearMoments,
    metric: Tensor,
    rank: int,
    config: ModeGPTConfig,
    *,
    keep_derivatives: bool,
) -> MLPFactors:
    """Keep `rank` channels, and refit down. If channels are removed and there are enough tokens, also gate and up.

    Args:
        mlp: the MLP. At most `refit_windows` windows of the tokens of all ranks are stored.
        moments: of all its channels.
        metric: of the errors by which channels are removed, from `metric_factor`.
        rank: the number of channels to keep.
        config: the settings.
        keep_derivatives: as for `refit_rows`.
    """
    channels, stream = mlp.channels, mlp.stream
    order = eliminate_channels(channels.down, moments, metric, rank, config).order
    if rank == moments.width or not refits_inputs(moments.tokens, rank, len(channels.rows), config):
        return cut_channels(channels, moments, order, config)
    own, windows = sum(map(len, stream)), refit_windows(stream[0].shape[1])
    stored = _kept_samples(itertools.islice(mlp.samples(), max(0, windows - distributed.exclusive_sum(own))), stream)
    kept, dense, moments = without_channels(channels.down, moments, order, config)
    dense_rows = tuple(row[kept] for row in channels.rows)
    rows, moments = refit_rows(
        dense_rows, dense, moments, stored, mlp.activation, config, keep_derivatives=keep_derivatives
    )
    if rows is not dense_rows and windows < distributed.all_reduce(own):
        moments = hidden_moments(rows, mlp.samples(), mlp.activation, ones=moments.ones)
    down = centred_refit(moments, dense, moments.refit_ridge(config.output_ridge))
    return MLPFactors(Channels(rows, down), moments.relative_error(down))


def refit_mlp(
    student: Block,
    streams: MLPStreams,
    targets: DenseTargets,
    metric: Tensor,
    rank: int,
    config: ModeGPTConfig,
    *,
    keep_derivatives: bool,
) -> MLPFactors:
    """Cut an MLP without experts by `refit_channels`."""
    moments, samples = observe_mlp(student, streams, targets), partial(_token_samples, student, streams, targets)
    mlp = SampledMLP(student.mlp_channels(), student.activation, samples, streams.middle)
    return refit_channels(mlp, moments, metric, rank, config, keep_derivatives=keep_derivatives)


def refit_shared(
    student: Block,
    streams: MLPStreams,
    targets: DenseTargets,
    metric: Tensor,
    rank: int,
    config: ModeGPTConfig,
    *,
    keep_derivatives: bool,
) -> MLPFactors:
    """Cut the shared expert by `refit_channels`, after the experts, so that it also compensates their errors."""
    shared, samples = student.shared, partial(shared_samples, student, streams, targets)
    assert shared is not None
    mlp = SampledMLP(student.shared_channels(), shared.activation, samples, streams.middle)
    moments = hidden_moments(mlp.channels.rows, samples(), mlp.activation, ones=shared.has_bias)
    return refit_channels(mlp, moments, metric, rank, config, keep_derivatives=keep_derivatives)


def refit_experts(
    student: Block,
    streams: MLPStreams,
    targets: DenseTargets,
    metric: Tensor,
    rank: int,
    config: ModeGPTConfig,
    *,
    keep_derivatives: bool,
) -> ExpertsFactors:
    """Cut the experts by `cut_experts`. Their tokens are stored if gate and up of any expert are refitted."""
    moments, windows = observe_experts(student, streams, targets), None
    if refits_experts(student, moments, rank, config):
        windows = _kept_windows(_routed_tokens(student, streams, targets), streams.middle)
    return cut_experts(student, moments, metric, rank, config, windows, keep_derivatives=keep_derivatives)


def _kept_windows(batches: Iterable[RoutedTokens], stream: Stream) -> list[RoutedTokens]:
    """Move the tokens to the storage of `stream`, window by window."""
    others: list[tuple[Tensor, Tensor, Tensor]] = []

    def parts() -> Iterator[Tensor]:
        for batch in batches:
            for window in batch.windows(stream[0].shape[1]):
                assert window.missing is not None
                assert window.weight is not None
                others.append((window.routing.chosen, window.routing.weights, window.weight))
                yield from (window.routing.inputs, window.missing)

    both = list(store_like(parts(), stream))
    found = []
    for inputs, missing, small in zip(both[::2], both[1::2], others, strict=True):
        chosen, weights, weight = (each.to(inputs.device) for each in small)
        found.append(RoutedTokens(Routing(inputs, chosen, weights), missing, weight))
    return found


def shared_samples(block: Block, streams: MLPStreams, targets: DenseTargets) -> Iterator[TokenSample]:
    """Yield the inputs of the shared expert and its targets, window by window, on the block's device.

    A token adds g · shared(x) with the weight g of its gate. Its target therefore is its output with missing / g, and
    its errors count with g².
    """
    shared = block.shared
    assert shared is not None
    for batch in _routed_tokens(block, streams, targets):
        for window in batch.windows(streams.middle[0].shape[1]):
            assert window.missing is not None
            assert window.weight is not None
            inputs = window.routing.inputs
            gates = at_least_float32(shared.gates(inputs)).clamp_min(SMALLEST_GATE)
            target = at_least_float32(shared.module(inputs)) + window.missing / gates
            seen = at_least_float32(inputs)
            yield TokenSample(
                with_ones(seen) if shared.has_bias else seen, target, window.weight * gates.flatten().square()
            )


def _token_samples(block: Block, streams: MLPStreams, targets: DenseTargets) -> Iterator[TokenSample]:
    """Yield the MLP's inputs after its norm and its targets, window by window, on the block's device."""
    biased = block.mlp_inputs[0].bias is not None
    device, residual = block.device, block.residual
    arrived = (streams.batches(device), prefetch(targets.mlp, device))
    for (read, middle), target, weight in zip(*arrived, targets.mlp_weights, strict=True):
        inputs = residual.mlp_input(read)
        missing = residual.missing(target, middle)
        if residual.mlp_output_norm is not None:
            missing, weight = before_norm(block.mlp(inputs), missing, weight, residual.mlp_output_norm, block.norm)
        for seen, wanted, own in zip(at_least_float32(inputs), missing, weight, strict=True):
            if biased:
                seen = with_ones(seen)
            yield TokenSample(seen, wanted, own)


def _kept_samples(samples: Iterable[TokenSample], stream: Stream) -> list[TokenSample]:
    """Move the samples' inputs and targets to the storage of `stream`. Their weights are not moved."""
    weights: list[Tensor] = []

    def parts() -> Iterator[Tensor]:
        for sample in samples:
            weights.append(sample.weight)
            yield from (sample.inputs, sample.target)

    both = list(store_like(parts(), stream))
    return list(map(TokenSample, both[::2], both[1::2], weights))
