"""Cut an MLP in two halves and refit gate and up with it, or the one input matrix of a plain MLP (ours).

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
from optimum_modegpt.decompositions.gauss_newton import TokenSample, hidden_channels, refit_inputs, spread
from optimum_modegpt.decompositions.least_squares import LinearMoments, centred_refit
from optimum_modegpt.methods.channels import eliminate_channels, without_channels
from optimum_modegpt.methods.factors import MLPFactors

REFIT_TOKENS = 65_536
"""Maximum number of tokens for the refit of gate and up."""

TOKENS_PER_ROW = 10
"""Fewest tokens per row of gate and up for which they are refitted.

Of the loss of log-perplexity, the refit removed 1 % with 8.5 tokens per row, 8 % with 17 and 26 % with 137.
"""


@dataclass(frozen=True)
class Round:
    """One refit of gate and up.

    Attributes:
        tokens: share of the windows that it uses.
        curvature: share of these that the curvature uses.
        iterations: share of the configured conjugate-gradient iterations.
    """

    tokens: float = 1.0
    curvature: float = 1 / 4
    iterations: float = 1.0

    def most_iterations(self, config: ModeGPTConfig) -> int:
        """Return the number of iterations."""
        return max(1, round(self.iterations * config.refit_iterations))


HALFWAY = (Round(tokens=1 / 2, curvature=1 / 2, iterations=1 / 2),)
"""The round after half of the channels are removed. It only has to show which others can be removed."""

FINAL = (Round(), Round())
"""The rounds after the last elimination."""


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

    Half of the channels are removed first. The others are chosen after a refit. Down is refitted to the new hidden
    channels after each refit of gate and up. The refits end early if one of gate and up changes nothing.
    """
    rows, dense = student.mlp_rows(), student.input_outputs(student.down)
    halfway, pays = (rank + moments.width) // 2, True
    for width, rounds in ((halfway, HALFWAY), (rank, FINAL)):
        order = eliminate_channels(dense, moments, metric, width, config).order
        kept, dense, moments = without_channels(dense, moments, order, config)  # releases the larger moments
        rows = tuple(row[kept] for row in rows)
        down = centred_refit(moments, dense, moments.refit_ridge(config.output_ridge))
        for each in rounds:
            if not pays:
                break
            refitted = _refit_inputs(student, rows, down, tokens.sample, each, config, keep_derivatives)
            pays = refitted is not rows
            if pays:
                rows = refitted
                del moments  # they are larger than everything that the refit keeps
                moments = _hidden_moments(student, rows, tokens.sample)
                down = centred_refit(moments, dense, moments.refit_ridge(config.output_ridge))
    if pays and tokens.every is not None:
        moments = _hidden_moments(student, rows, tokens.every())
        down = centred_refit(moments, dense, moments.refit_ridge(config.output_ridge))
    return MLPFactors(rows, down, moments.relative_error(down))


def _refit_inputs(
    block: Block,
    rows: tuple[Tensor, ...],
    down: Tensor,
    samples: Sequence[TokenSample],
    present: Round,
    config: ModeGPTConfig,
    keep_derivatives: bool,
) -> tuple[Tensor, ...]:
    """Take one Gauss–Newton step on gate and up with down fixed. The output bias is subtracted from the target."""
    rank = len(rows[0])
    weight, bias = down.to(rows[0]).split((rank, len(down) - rank))
    windows = int(distributed.all_reduce(len(samples)))
    count = max(1, round(present.tokens * windows))
    samples, _ = spread(samples, count, windows, distributed.exclusive_sum(len(samples)))
    if len(bias):
        samples = [replace(sample, target=sample.target - bias[0].to(sample.target)) for sample in samples]
    return refit_inputs(
        rows,
        weight,
        samples,
        block.activation,
        ridge=config.input_ridge,
        iterations=present.most_iterations(config),
        curvature=present.curvature,
        keep_derivatives=keep_derivatives,
        before=distributed.exclusive_sum(len(samples)),
        total=distributed.all_reduce,
    )


def _hidden_moments(block: Block, rows: tuple[Tensor, ...], samples: Iterable[TokenSample]) -> LinearMoments:
    """Compute moments of the hidden channels of `rows`, with the samples' targets."""
    moments = LinearMomentSum(ones=block.down.bias is not None)
    for sample in samples:
        arrived = sample.to(rows[0].device)
        moments.add(hidden_channels(rows, arrived.inputs, block.activation), arrived.target, arrived.weight)
    return moments.value()
