"""Refit gate and up of a cut MLP, or the one input matrix of a plain one, in rounds with down (ours).

A round is one Gauss–Newton step on gate and up with down fixed, then a refit of down. Both leave out some windows. The
error on these shows whether a step helps on text that no matrix has seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from optimum_modegpt import distributed
from optimum_modegpt.calibration.moments import LinearMomentSum
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.gauss_newton import (
    Activation,
    TokenSample,
    hidden_channels,
    refit_inputs,
    split_windows,
)
from optimum_modegpt.decompositions.least_squares import LinearMoments, centred_refit

REFIT_TOKENS = 65_536
"""Maximum number of tokens for the refit of gate and up."""

CURVATURE_TOKENS = 16_384
"""About the maximum number of tokens from which the curvature of a step is measured. The gradient uses all tokens."""

TOKENS_PER_ROW = 10
"""Fewest tokens per row of gate and up for which they are refitted."""

ROUNDS = 4
"""Most rounds of refitting gate and up, then down."""

INPUT_NOISE = 20.0
"""c of the ridge of gate and up, `input_ridge` + c · inputs / tokens. Chosen on held-out text: the best of three ridges
was 0.1 for 64 to 128 inputs, and between 0.3 and 1 for the 576 inputs of SmolLM2-135M, with 16,384 to 32,768 tokens."""


def refits_inputs(tokens: int, rank: int, matrices: int, config: ModeGPTConfig) -> bool:
    """Return whether gate and up are refitted: with enough tokens for their rows, if the configuration allows it."""
    return bool(config.refit_iterations and tokens) and min(tokens, REFIT_TOKENS) >= TOKENS_PER_ROW * matrices * rank


def refit_windows(length: int) -> int:
    """Return the maximum number of windows of `length` tokens for the refit, at least 1."""
    return max(1, REFIT_TOKENS // length)


def curvature_stride(tokens: int) -> int:
    """Return n such that one of every n windows of `tokens` measures the curvature."""
    return max(1, -(-tokens // CURVATURE_TOKENS))


def refit_rows(
    rows: tuple[Tensor, ...],
    dense: Tensor,
    moments: LinearMoments,
    samples: list[TokenSample],
    activation: Activation,
    config: ModeGPTConfig,
    *,
    keep_derivatives: bool,
) -> tuple[tuple[Tensor, ...], LinearMoments]:
    """Refit the kept rows of gate and up for at most `ROUNDS` rounds, until a step gains nothing on held-out windows.

    Args:
        rows: of gate and up, (k, d) each.
        dense: the dense down (k, m), which every refit of down stays close to.
        moments: of the hidden channels of `rows`.
        samples: the windows of this rank.
        activation: φ of the MLP.
        keep_derivatives: as for `refit_inputs`.

    Returns:
        The rows, and the moments of their hidden channels over all samples. Without a gain, these are the given ones.
    """
    before = distributed.exclusive_sum(len(samples))
    held_out, fitted = split_windows(samples, before=before, total=distributed.all_reduce)
    known = moments
    if held_out is not fitted:
        known = moments.without(hidden_moments(rows, held_out, activation, ones=moments.ones))
    moved = rows
    for _ in range(ROUNDS):
        down = centred_refit(known, dense, known.refit_ridge(config.output_ridge))
        refitted = _step(moved, down, fitted, held_out, activation, config, keep_derivatives=keep_derivatives)
        if refitted is moved:
            break
        moved = refitted
        known = hidden_moments(moved, fitted, activation, ones=moments.ones)
    if moved is rows:
        return rows, moments
    if held_out is not fitted:
        known = known.joined(hidden_moments(moved, held_out, activation, ones=moments.ones))
    return moved, known


def hidden_moments(
    rows: tuple[Tensor, ...], samples: Iterable[TokenSample], activation: Activation, *, ones: bool
) -> LinearMoments:
    """Compute moments of the hidden channels of `rows`, with the samples' targets. `ones` is that of the moments."""
    moments = LinearMomentSum(ones=ones)
    for sample in samples:
        arrived = sample.to(rows[0].device)
        moments.add(hidden_channels(rows, arrived.inputs, activation), arrived.target, arrived.weight)
    return moments.value()


def _step(
    rows: tuple[Tensor, ...],
    down: Tensor,
    fitted: list[TokenSample],
    held_out: list[TokenSample],
    activation: Activation,
    config: ModeGPTConfig,
    *,
    keep_derivatives: bool,
) -> tuple[Tensor, ...]:
    """Take one Gauss–Newton step on gate and up with down fixed. The output bias is subtracted from the target."""
    rank = len(rows[0])
    weight, bias = down.to(rows[0]).split((rank, len(down) - rank))
    if len(bias):
        held_out, fitted = (
            [replace(sample, target=sample.target - bias[0].to(sample.target)) for sample in samples]
            for samples in (held_out, fitted)
        )
    tokens = int(distributed.all_reduce(sum(len(sample.inputs) for sample in fitted)))
    return refit_inputs(
        rows,
        weight,
        fitted,
        held_out,
        activation,
        ridge=config.input_ridge + INPUT_NOISE * rows[0].shape[1] / tokens,
        iterations=config.refit_iterations,
        stride=curvature_stride(tokens),
        keep_derivatives=keep_derivatives,
        before=distributed.exclusive_sum(len(fitted)),
        total=distributed.all_reduce,
    )
