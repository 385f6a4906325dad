"""Cut an MLP in two halves and refit its gate and up, or the one input matrix of a plain MLP (ours).

Gate and up are refitted by Gauss–Newton steps with down fixed. Down is refitted after each step. The steps cost most of
a compression, so each is computed on no more tokens than it needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from optimum_modegpt import distributed
from optimum_modegpt.architectures import Block
from optimum_modegpt.calibration.moments import LinearMomentSum
from optimum_modegpt.calibration.streams import Stream, store_like
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.gauss_newton import (
    FEWEST_WINDOWS,
    Step,
    TokenSample,
    hidden_channels,
    hold_out,
    refit_inputs,
)
from optimum_modegpt.decompositions.least_squares import LinearMoments, centred_refit
from optimum_modegpt.methods.channels import eliminate_channels, without_channels
from optimum_modegpt.methods.factors import MLPFactors

REFIT_TOKENS = 65_536
"""Maximum number of tokens for the refit of gate and up."""

TOKENS_PER_ROW = 10
"""Fewest tokens per row of gate and up for which they are refitted.

Of the loss of log-perplexity, the refit removed 1 % with 8.5 tokens per row, 8 % with 17 and 26 % with 137.
"""


FINAL_ROUNDS = 2
"""Rounds of refitting gate and up, then down, after the last elimination."""

LEAST_GAIN = 0.01
"""If a round lowers the error on held-out windows by a smaller share, no other follows."""

CURVATURE = 1 / 4
"""Share of the tokens that the curvature is measured on."""


@dataclass(frozen=True)
class RefitTokens:
    """The tokens of a refit: the sample for gate and up, one for each window of this rank, and those for down.

    Attributes:
        sample: the tokens for gate and up.
        every: yields all tokens of this rank, if down is refitted to more than the sample at the end. Else None.
    """

    sample: list[TokenSample]
    every: Callable[[], Iterator[TokenSample]] | None

    @classmethod
    def of(cls, every: Callable[[], Iterator[TokenSample]], stream: Stream) -> RefitTokens:
        """Move the first windows to the storage of `stream`, which has as many windows as `every` yields."""
        own = sum(map(len, stream))
        windows = max(1, REFIT_TOKENS // stream[0].shape[1])
        first = itertools.islice(every(), max(0, windows - distributed.exclusive_sum(own)))
        return cls(_kept_samples(first, stream), every if windows < distributed.all_reduce(own) else None)


def _kept_samples(samples: Iterable[TokenSample], stream: Stream) -> list[TokenSample]:
    """Move the samples' inputs and targets to the storage of `stream`. Their weights are not moved."""
    weights: list[Tensor] = []

    def parts() -> Iterator[Tensor]:
        for sample in samples:
            weights.append(sample.weight)
            yield from (sample.inputs, sample.target)

    both = list(store_like(parts(), stream))
    return list(map(TokenSample, both[::2], both[1::2], weights))


def refits_inputs(tokens: int, rank: int, matrices: int, config: ModeGPTConfig) -> bool:
    """Return whether gate and up are refitted: with enough tokens for their rows, if the configuration allows it."""
    return bool(config.refit_iterations) and min(tokens, REFIT_TOKENS) >= TOKENS_PER_ROW * matrices * rank


def cut_and_refit(
    student: Block,
    moments: LinearMoments,
    tokens: RefitTokens,
    metric: Tensor,
    rank: int,
    config: ModeGPTConfig,
    *,
    keep_derivatives: bool,
) -> MLPFactors:
    """Remove channels down to `rank`, and refit gate, up and down.

    Half of the channels are removed first. The others are chosen after a round of refits, and more rounds follow. Down
    is refitted to the new hidden channels after each refit of gate and up. Each round starts with the damping that was
    best in the round before. The last rounds end early if a refit of gate and up gains little. Only the last refit of
    down uses the held-out windows.
    """
    rows, dense, changed = student.mlp_rows(), student.input_outputs(student.down), False
    windows, ridge = int(distributed.all_reduce(len(tokens.sample))), config.input_ridge
    fitted, held_out = hold_out(tokens.sample, windows, distributed.exclusive_sum(len(tokens.sample)))
    if apart := windows >= FEWEST_WINDOWS:
        moments -= _hidden_moments(student, rows, held_out)
    for width, rounds in (((rank + moments.width) // 2, 1), (rank, FINAL_ROUNDS)):
        order = eliminate_channels(dense, moments, metric, width, config).order
        kept, dense, moments = without_channels(dense, moments, order, config)  # releases the larger moments
        rows = tuple(row[kept] for row in rows)
        for _ in range(rounds):
            down = centred_refit(moments, dense, moments.refit_ridge(config.output_ridge))
            watched = held_out if apart else fitted
            step = _refit_inputs(student, rows, down, fitted, watched, ridge, config, keep_derivatives)
            if step is not None:
                rows, ridge, changed = step.rows, step.ridge, True
                del moments  # they are larger than everything that the refit keeps
                moments = _hidden_moments(student, rows, fitted)
            if step is None or step.gain < LEAST_GAIN:
                break
    if changed and tokens.every is not None:
        moments = _hidden_moments(student, rows, tokens.every())
    elif apart:
        moments += _hidden_moments(student, rows, held_out)
    down = centred_refit(moments, dense, moments.refit_ridge(config.output_ridge))
    return MLPFactors(rows, down, moments.relative_error(down))


def _refit_inputs(
    block: Block,
    rows: tuple[Tensor, ...],
    down: Tensor,
    fitted: Sequence[TokenSample],
    held_out: Sequence[TokenSample],
    ridge: float,
    config: ModeGPTConfig,
    keep_derivatives: bool,
) -> Step | None:
    """Take one Gauss–Newton step on gate and up with down fixed. The output bias is subtracted from the target."""
    rank = len(rows[0])
    weight, bias = down.to(rows[0]).split((rank, len(down) - rank))
    if len(bias):
        fitted, held_out = (
            [replace(sample, target=sample.target - bias[0].to(sample.target)) for sample in samples]
            for samples in (fitted, held_out)
        )
    return refit_inputs(
        rows,
        weight,
        fitted,
        held_out,
        block.activation,
        ridge=ridge,
        iterations=config.refit_iterations,
        curvature=CURVATURE,
        keep_derivatives=keep_derivatives,
        total=distributed.all_reduce,
    )


def _hidden_moments(block: Block, rows: tuple[Tensor, ...], samples: Iterable[TokenSample]) -> LinearMoments:
    """Compute moments of the hidden channels of `rows`, with the samples' targets."""
    moments = LinearMomentSum(ones=block.down.bias is not None)
    for sample in samples:
        arrived = sample.to(rows[0].device)
        moments.add(hidden_channels(rows, arrived.inputs, block.activation), arrived.target, arrived.weight)
    return moments.value()
