"""The gain before a softmax: the one place where the output distribution itself is matched (ours; convex)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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


def match_softmax(gain: Tensor, bias: Tensor, head: Tensor, fitted: SoftmaxSample, held_back: SoftmaxSample) -> Tensor:
    """The gain g (d,) after one damped Newton step on mean KL(P ‖ softmax(W (g∘x + b))), which is convex in g.

    The step is found by conjugate gradients and halved until the divergence falls on the fitted tokens; it counts only
    if it also falls on those held back, else `gain` comes back as it was. `bias` b (d,), `head` W (V, d).
    """
    problem = _Softmax(fitted, bias, head)
    probabilities = problem.log_probabilities(gain).exp()
    residual = probabilities - fitted.target
    gradient = (fitted.features * (residual @ head)).mean(0)
    squares = probabilities @ head.square() - (probabilities @ head).square()  # (n, d), variance of a head's column
    damping = DAMPING * (fitted.features.square() * squares).mean()

    def curvature(direction: Tensor) -> Tensor:
        moved = (fitted.features * direction) @ head.T  # (n, V)
        centred = probabilities * (moved - (probabilities * moved).sum(-1, keepdim=True))
        return (fitted.features * (centred @ head)).mean(0) + damping * direction

    step = _conjugate_gradients(curvature, -gradient)
    unmoved = problem.cross_entropy(gain)
    for halving in range(HALVINGS):
        moved = gain + step / 2**halving
        if problem.cross_entropy(moved) < unmoved:
            outside = _Softmax(held_back, bias, head)
            return moved if outside.cross_entropy(moved) < outside.cross_entropy(gain) else gain
    return gain


@dataclass(frozen=True)
class _Softmax:
    sample: SoftmaxSample
    bias: Tensor
    head: Tensor

    def log_probabilities(self, gain: Tensor) -> Tensor:
        return ((gain * self.sample.features + self.bias) @ self.head.T).log_softmax(-1)

    def cross_entropy(self, gain: Tensor) -> float:
        """Differs from the divergence by the entropy of the target, which no gain changes."""
        return -float((self.sample.target * self.log_probabilities(gain)).sum(-1).mean())


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


def split_sample(samples: Sequence[SoftmaxSample], share: int = 8) -> tuple[SoftmaxSample, SoftmaxSample]:
    """(fitted, held back): every `share`-th sample is held back, at least one; one alone serves as both."""
    held = list(samples[::share])
    fitted = [sample for index, sample in enumerate(samples) if index % share] or held
    return _join(fitted), _join(held)


def _join(samples: Sequence[SoftmaxSample]) -> SoftmaxSample:
    return SoftmaxSample(torch.cat([s.features for s in samples]), torch.cat([s.target for s in samples]))
