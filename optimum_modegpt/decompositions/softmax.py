"""The gain before a softmax: the one place where the output distribution itself is matched (ours; convex)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_modegpt.decompositions.least_squares import Total, complete

DAMPING = 1e-3
"""Of the Newton step, as a fraction of the curvature's mean diagonal."""
ITERATIONS = 10
"""Conjugate-gradient iterations of the Newton step."""
HALVINGS = 6


@dataclass(frozen=True)
class SoftmaxSample:
    """Tokens before the head: x (n, d) normalised, without weight and bias, and the wanted distribution P (n, V)."""

    features: Tensor
    target: Tensor


def match_softmax(
    gain: Tensor,
    bias: Tensor,
    head: Tensor,
    fitted: SoftmaxSample,
    held_back: SoftmaxSample,
    *,
    total: Total = complete,
) -> Tensor:
    """The gain g (d,) after one damped Newton step on mean KL(P ‖ softmax(W (g∘x + b))), which is convex in g.

    The step is found by conjugate gradients and halved until the divergence falls on the fitted tokens; it counts only
    if it also falls on those held back, else `gain` comes back as it was. `bias` b (d,), `head` W (V, d); `total`
    is what completes a sum over tokens.
    """
    problem = _Softmax(fitted, bias, head, total)
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
            outside = _Softmax(held_back, bias, head, total)
            return moved if outside.cross_entropy(moved) < outside.cross_entropy(gain) else gain
    return gain


@dataclass(frozen=True)
class _Softmax:
    sample: SoftmaxSample
    bias: Tensor
    head: Tensor
    total: Total

    def mean(self, values: Tensor) -> Tensor:
        """Of values (n, …), a row a token, over all tokens."""
        return self.total(values.sum(0)) / self.total(len(values))

    def log_probabilities(self, gain: Tensor) -> Tensor:
        return ((gain * self.sample.features + self.bias) @ self.head.T).log_softmax(-1)

    def cross_entropy(self, gain: Tensor) -> float:
        """Differs from the divergence by the entropy of the target, which no gain changes."""
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
    """(fitted, held back): every `share`-th sample is held back, at least one; one alone serves as both.

    `before` samples are with other processes and come first, `total` adds up how many all have.
    """
    held = [sample for index, sample in enumerate(samples, before) if index % share == 0]
    fitted = [sample for index, sample in enumerate(samples, before) if index % share]
    nothing = SoftmaxSample(samples[0].features[:0], samples[0].target[:0])
    return _join([nothing, *(fitted if total(len(fitted)) else held)]), _join([nothing, *held])


def _join(samples: Sequence[SoftmaxSample]) -> SoftmaxSample:
    return SoftmaxSample(torch.cat([s.features for s in samples]), torch.cat([s.target for s in samples]))
