"""Fit the gain before a softmax. Only here, the output distribution itself is matched (ours; convex)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_modegpt.decompositions.least_squares import Total, complete
from optimum_modegpt.decompositions.scattered import scattered

DAMPING = 1e-3
"""Damping of the Newton step, as a fraction of the curvature's mean diagonal."""
ITERATIONS = 10
"""Conjugate-gradient iterations of the Newton step."""
HALVINGS = 6


@dataclass(frozen=True)
class SoftmaxSample:
    """Normalised inputs x (n, d) of the head, without weight and bias, and the target distribution P (n, V)."""

    features: Tensor
    target: Tensor


def match_softmax(
    gain: Tensor,
    offset: Tensor,
    head: Tensor,
    fitted: SoftmaxSample,
    held_back: SoftmaxSample,
    *,
    total: Total = complete,
) -> Tensor:
    """Compute the gain g (d,) after a damped Newton step on mean KL(P ‖ softmax(W (g∘x) + b)), which is convex in g.

    Conjugate gradients give the step. It is halved until the divergence falls on the fitted tokens. If the divergence
    does not also fall on the held-out tokens, `gain` is returned unchanged. `offset` is b (V,), `head` is W (V, d),
    and `total` completes a sum over tokens with the sums of other ranks.
    """
    problem = _Softmax(fitted, offset, head, total)
    probabilities = problem.log_probabilities(gain).exp()
    residual = probabilities - fitted.target
    gradient = problem.mean(fitted.features * (residual @ head))
    squares = probabilities @ head.square() - (probabilities @ head).square()  # (n, d), variance of a head's column
    damping = DAMPING * problem.mean(fitted.features.square() * squares).mean()

    def curvature(direction: Tensor) -> Tensor:
        moved = (fitted.features * direction) @ head.T  # (n, V)
        centred = probabilities * (moved - (probabilities * moved).sum(-1, keepdim=True))
        return problem.mean(fitted.features * (centred @ head)) + damping * direction

    step = _conjugate_gradients(curvature, -gradient)
    unmoved = problem.cross_entropy(gain)
    for halving in range(HALVINGS):
        moved = gain + step / 2**halving
        if problem.cross_entropy(moved) < unmoved:
            outside = _Softmax(held_back, offset, head, total)
            return moved if outside.cross_entropy(moved) < outside.cross_entropy(gain) else gain
    return gain


@dataclass(frozen=True)
class _Softmax:
    sample: SoftmaxSample
    offset: Tensor
    head: Tensor
    total: Total

    def mean(self, values: Tensor) -> Tensor:
        """Compute the mean over all tokens of values (n, …), with one row per token."""
        return self.total(values.sum(0)) / self.total(len(values))

    def log_probabilities(self, gain: Tensor) -> Tensor:
        return ((gain * self.sample.features) @ self.head.T + self.offset).log_softmax(-1)

    def cross_entropy(self, gain: Tensor) -> float:
        """Compute the cross entropy, which is the divergence plus the entropy of the target, a constant."""
        return -float(self.mean((self.sample.target * self.log_probabilities(gain)).sum(-1)))


def _conjugate_gradients(product: Callable[[Tensor], Tensor], right: Tensor) -> Tensor:
    solution, residual, direction = torch.zeros_like(right), right, right
    square = residual @ residual
    for _ in range(ITERATIONS):
        if square == 0:
            break
        curved = product(direction)
        length = square / (direction @ curved)
        solution = solution + length * direction
        residual = residual - length * curved
        before, square = square, residual @ residual
        direction = residual + square / before * direction
    return solution


def split_sample(
    samples: Sequence[SoftmaxSample], share: int = 8, *, before: int = 0, total: Total = complete
) -> tuple[SoftmaxSample, SoftmaxSample]:
    """Split samples into (fitted, held out). One of every `share` samples is held out, at least one.

    A single sample is used as both. `before` is the number of samples of other ranks that come first, and `total` sums
    the numbers of samples over ranks.
    """
    count = int(total(len(samples)))
    chosen = scattered(count, -(-count // share))
    held = [sample for index, sample in enumerate(samples, start=before) if index in chosen]
    fitted = [sample for index, sample in enumerate(samples, start=before) if index not in chosen]
    if count == 1:
        fitted = held
    nothing = SoftmaxSample(samples[0].features[:0], samples[0].target[:0])
    return _join([nothing, *fitted]), _join([nothing, *held])


def _join(samples: Sequence[SoftmaxSample]) -> SoftmaxSample:
    return SoftmaxSample(torch.cat([s.features for s in samples]), torch.cat([s.target for s in samples]))
