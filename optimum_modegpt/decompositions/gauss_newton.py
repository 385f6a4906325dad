"""The MLP's input side: one damped Gauss–Newton step on gate and up, or on the one matrix of a plain MLP (ours).

With D fixed the output Dᵀ(φ(G y)∘(U y)) is linear in U and, linearised, in G. The step minimises

    Σ w_t ‖target_t − Dᵀ(φ(G y_t)∘(U y_t))‖² + μ_U ‖ΔU‖² + μ_G ‖ΔG‖²

by conjugate gradients, preconditioned per matrix by ((DDᵀ)∘Σ w zzᵀ + λI) ⊗ (Σ w yyᵀ / Σ w + λI), where z is the
derivative of a hidden channel by its row: z = φ(Gy) for U, φ′(Gy)∘(Uy) for G, φ′(Wy) for a plain MLP. The products with
the curvature cost most. They may be summed over a part of the tokens, while the gradient is summed over all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimum_modegpt.decompositions.least_squares import Total, complete
from optimum_modegpt.decompositions.psd import damp, gram_matrix, inverse, mean_diagonal

Activation = Callable[[Tensor], Tensor]

SMALLEST_STEP = 1 / 4
"""Smallest fraction of the step that is tried. Smaller ones gain nothing measurable."""


@dataclass(frozen=True)
class TokenSample:
    """Normalised inputs y (n, d), targets (n, m) and weights (n,) of one window's tokens. y ends in 1 for biases."""

    inputs: Tensor
    target: Tensor
    weight: Tensor

    def to(self, place: Any) -> TokenSample:
        """Return the sample on a device, or with the device and dtype of a tensor."""
        return TokenSample(self.inputs.to(place), self.target.to(place), self.weight.to(place))


def hidden_channels(rows: Sequence[Tensor], inputs: Tensor, activation: Activation) -> Tensor:
    """Compute φ(G y)∘(U y) for rows (G, U), or φ(W y) for rows (W,). Rows (k, d) and `inputs` (n, d) to (n, k)."""
    hidden = activation(inputs @ rows[0].T)
    return hidden * (inputs @ rows[1].T) if len(rows) == 2 else hidden


def spread(samples: Sequence[TokenSample], count: int, windows: int, before: int = 0) -> tuple[list[TokenSample], ...]:
    """Divide samples into `count` at equal distances and the others.

    `windows` is the number of samples of all ranks, and `before` that of earlier ranks.
    """
    chosen: list[TokenSample] = []
    others: list[TokenSample] = []
    for number, sample in enumerate(samples, before):
        is_chosen = (number + 1) * count // windows > number * count // windows
        (chosen if is_chosen else others).append(sample)
    return chosen, others


def refit_inputs(  # noqa: PLR0913 - each is part of the formula or of its computation
    rows: tuple[Tensor, ...],
    down: Tensor,
    samples: Sequence[TokenSample],
    activation: Activation,
    *,
    ridge: float,
    iterations: int,
    curvature: float = 1.0,
    keep_derivatives: bool = True,
    before: int = 0,
    total: Total = complete,
) -> tuple[Tensor, ...]:
    """Return the rows after the Gauss–Newton step, or `rows` itself if no step lowers the error on held-out windows.

    An eighth of the windows, at least 2, is held out. The conjugate gradients stop when the true error on them no
    longer falls. A step that does not lower this error is halved, at most down to `SMALLEST_STEP`. With fewer than 4
    windows, none is held out, and the error is measured on all of them.

    Args:
        rows: (G, U) or (W,), each (k, d), in the order of `hidden_channels`.
        down: D (k, m).
        samples: one per window. They are moved to the rows' device one at a time.
        activation: φ.
        ridge: damping of both factors and of the objective, as a fraction (0.1 by default in `Recipe`).
        iterations: most conjugate-gradient iterations, at least 1.
        curvature: share of the other windows, at least one, that JᵀJ is measured on. The gradient uses all of them.
        keep_derivatives: whether to keep z of these windows (tokens × rows numbers) between iterations. Otherwise z is
            recomputed, which costs a third more products.
        before: number of windows of other ranks that come before `samples`.
        total: completes a sum over `samples` with the sums of other ranks.
    """
    windows = int(total(len(samples)))
    held_out = fitted = samples
    if windows >= 4:
        count = max(2, windows // 8)
        held_out, fitted = spread(samples, count, windows, before)
        windows, before = windows - count, before - before * count // windows
    measured, others = spread(fitted, max(1, round(curvature * windows)), windows, before)
    problem = _Linearised(rows, down, measured, activation, ridge, others, total, keep_derivatives)

    def error(step: Sequence[Tensor], scale: float = 1.0) -> float:
        return problem.true_error(_moved(rows, scale, step), held_out)

    unmoved = problem.true_error(rows, held_out)
    steps = problem.iterates(iterations)
    best = next(steps)
    reached = error(best)
    if reached < unmoved:
        for step in steps:
            present = error(step)
            if present >= reached:
                break
            best, reached = step, present
    scale = 1.0
    while reached >= unmoved and scale > SMALLEST_STEP:
        scale /= 2
        reached = error(best, scale)
    if not reached < unmoved:
        return rows
    return tuple(_moved(rows, scale, best))


class _Linearised:
    """The damped least-squares problem, linearised at `rows`. Its sums loop over the windows.

    The gradient Jᵀ r is a sum over all windows. JᵀJ is a sum over the windows `measured`, times the ratio of the
    weights of all windows to theirs.
    """

    def __init__(
        self,
        rows: tuple[Tensor, ...],
        down: Tensor,
        measured: Sequence[TokenSample],
        activation: Activation,
        ridge: float,
        others: Sequence[TokenSample] = (),
        total: Total = complete,
        keep_derivatives: bool = False,
    ) -> None:
        self.rows, self.down, self.measured, self.activation, self.total = rows, down, measured, activation, total
        self.keep_derivatives = keep_derivatives
        self.derivatives: list[list[Tensor]] = []
        input_moment, output_moments = self._sums(others)
        scale = mean_diagonal(input_moment)
        self.damping = [float(ridge * mean_diagonal(moment) * scale) for moment in output_moments]
        self.input_inverse = inverse(damp(input_moment, ridge))
        self.output_inverses = [inverse(damp(moment, ridge)) for moment in output_moments]

    def iterates(self, iterations: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield the conjugate-gradient iterates, with one tensor per matrix."""
        step = [torch.zeros_like(row) for row in self.rows]
        residual: Sequence[Tensor] = self.gradient
        preconditioned = self._precondition(residual)
        direction, product = preconditioned, _dot(residual, preconditioned)
        for _ in range(iterations):
            curved = self._normal_product(direction)
            length = product / _dot(direction, curved)
            step = _moved(step, length, direction)
            yield tuple(step)
            residual = _moved(residual, -length, curved)
            preconditioned = self._precondition(residual)
            before, product = product, _dot(residual, preconditioned)
            direction = _moved(preconditioned, product / before, direction)

    def true_error(self, rows: Sequence[Tensor], samples: Iterable[TokenSample]) -> float:
        """Compute Σ w ‖target − Dᵀ hidden‖² with the nonlinear hidden channels."""
        error = 0.0
        for sample in self._on_device(samples):
            residual = sample.target - hidden_channels(rows, sample.inputs, self.activation) @ self.down
            error += float((sample.weight @ residual.square()).sum())
        return float(self.total(error))

    def _normal_product(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """Compute (JᵀJ + μ) direction."""
        sums = [torch.zeros_like(row) for row in self.rows]
        for index, sample in enumerate(self._on_device(self.measured)):
            if self.keep_derivatives:
                derivatives = self.derivatives[index]
            else:
                derivatives, _ = self._derivatives(sample.inputs)
            hidden = [z * (sample.inputs @ d.T) for z, d in zip(derivatives, direction, strict=True)]
            self._add_transposed(sums, sample, derivatives, functools.reduce(torch.add, hidden) @ self.down)
        return [
            self.ratio * self.total(each) + mu * d for each, mu, d in zip(sums, self.damping, direction, strict=True)
        ]

    def _add_transposed(
        self, sums: list[Tensor], sample: TokenSample, derivatives: list[Tensor], outputs: Tensor
    ) -> None:
        """Add Jᵀ v of one window, with the rows of v (n, m) from `outputs`, to `sums`."""
        back = (sample.weight[:, None] * outputs) @ self.down.T
        for each, z in zip(sums, derivatives, strict=True):
            each.addmm_((z * back).T, sample.inputs)

    def _sums(self, others: Sequence[TokenSample]) -> tuple[Tensor, list[Tensor]]:
        """Sum the gradient at the current rows, and return Σ w yyᵀ / Σ w, and (DDᵀ)∘Σ w zzᵀ per matrix.

        The moments are used only for preconditioning, so float32 sums suffice.
        """
        width, d_model = self.rows[0].shape
        gradient = [torch.zeros_like(row) for row in self.rows]
        inputs, weights = self.down.new_zeros(d_model, d_model), self.down.new_zeros(2)
        channels = [self.down.new_zeros(width, width) for _ in self.rows]
        for index, sample in enumerate(self._on_device([*self.measured, *others])):
            derivatives, hidden = self._derivatives(sample.inputs)
            self._add_transposed(gradient, sample, derivatives, sample.target - hidden @ self.down)
            weights[0] += sample.weight.sum()
            if index >= len(self.measured):
                continue
            weights[1] += sample.weight.sum()
            root = sample.weight.sqrt()[:, None]
            inputs += gram_matrix(root * sample.inputs)
            for channel, z in zip(channels, derivatives, strict=True):
                channel += gram_matrix(root * z)
            if self.keep_derivatives:
                self.derivatives.append(derivatives)
        self.gradient = [self.total(each) for each in gradient]
        every, measured = self.total(weights)
        self.ratio, metric = every / measured, self.down @ self.down.T
        return self.total(inputs) / measured, [self.total(each).mul_(self.ratio * metric) for each in channels]

    def _derivatives(self, inputs: Tensor) -> tuple[list[Tensor], Tensor]:
        """Compute z per matrix, in the order of the rows, and the hidden channels."""
        before = inputs @ self.rows[0].T
        value, slope = torch.func.jvp(self.activation, (before,), (torch.ones_like(before),))  # pyright: ignore[reportAssignmentType]
        if len(self.rows) == 1:
            return [slope], value
        linear = inputs @ self.rows[1].T
        return [slope * linear, value], value * linear

    def _precondition(self, gradient: Sequence[Tensor]) -> list[Tensor]:
        return [
            output @ matrix @ self.input_inverse for matrix, output in zip(gradient, self.output_inverses, strict=True)
        ]

    def _on_device(self, samples: Iterable[TokenSample]) -> Iterator[TokenSample]:
        for sample in samples:
            yield sample.to(self.down)


def _moved(start: Sequence[Tensor], scale: Tensor | float, step: Sequence[Tensor]) -> list[Tensor]:
    return [each + scale * delta for each, delta in zip(start, step, strict=True)]


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()
