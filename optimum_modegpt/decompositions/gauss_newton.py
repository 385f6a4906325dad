"""The MLP's input side: one damped Gauss–Newton step on gate and up, or on the one matrix of a plain MLP (ours).

With D fixed the output Dᵀ(φ(G y)∘(U y)) is linear in U and, linearised, in G. The step minimises

    Σ w_t ‖target_t − Dᵀ(φ(G y_t)∘(U y_t))‖² + μ_U ‖ΔU‖² + μ_G ‖ΔG‖²

by conjugate gradients, preconditioned per matrix by ((DDᵀ)∘Σ w zzᵀ + λI) ⊗ (Σ w yyᵀ / Σ w + λI), where z is the
derivative of a hidden channel by its row: z = φ(Gy) for U, φ′(Gy)∘(Uy) for G, φ′(Wy) for a plain MLP.
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
from optimum_modegpt.decompositions.scattered import scattered

Activation = Callable[[Tensor], Tensor]

SMALLEST_STEP = 1 / 4
"""Smallest fraction of the step that is tried. Smaller ones gain nothing measurable."""

SMALLEST_GAIN = 1e-3
"""Smallest relative decrease of the held-out error for which the rows are changed."""


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


def split_windows(
    samples: list[TokenSample], *, before: int = 0, total: Total = complete
) -> tuple[list[TokenSample], list[TokenSample]]:
    """Split the windows into (held out, fitted). An eighth is held out, at least 2, scattered over all of them.

    With fewer than 4 windows, both are all of them, as the same list.

    Args:
        samples: one per window.
        before: number of windows of other ranks that come before `samples`.
        total: completes a sum over `samples` with the sums of other ranks.
    """
    windows = int(total(len(samples)))
    if windows < 4:
        return samples, samples
    chosen = scattered(windows, max(2, windows // 8))
    held_out, fitted = [], []
    for index, sample in enumerate(samples, start=before):
        (held_out if index in chosen else fitted).append(sample)
    return held_out, fitted


def refit_inputs(  # noqa: PLR0913 - each is part of the formula or of its computation
    rows: tuple[Tensor, ...],
    down: Tensor,
    fitted: Sequence[TokenSample],
    held_out: Sequence[TokenSample],
    activation: Activation,
    *,
    ridge: float,
    iterations: int,
    stride: int = 1,
    keep_derivatives: bool = True,
    before: int = 0,
    total: Total = complete,
) -> tuple[Tensor, ...]:
    """Return the rows after the Gauss–Newton step, or `rows` itself if it gains less than `SMALLEST_GAIN`.

    The gain is measured by the true error on the held-out windows. The conjugate gradients stop when it no longer
    falls. A step that gains too little is halved, at most down to `SMALLEST_STEP`.

    Args:
        rows: (G, U) or (W,), each (k, d), in the order of `hidden_channels`.
        down: D (k, m).
        fitted: the windows of the objective. They are moved to the rows' device one at a time.
        held_out: the windows of the error, from `split_windows`.
        activation: φ.
        ridge: damping of both factors and of the objective, as a fraction.
        iterations: most conjugate-gradient iterations, at least 1.
        stride: one of every `stride` fitted windows measures the curvature. The gradient uses all of them.
        keep_derivatives: whether to keep z of the curvature's tokens (tokens × rows numbers) between iterations.
            Otherwise z is recomputed, which costs a third more products.
        before: number of fitted windows of other ranks that come before `fitted`.
        total: completes a sum over windows with the sums of other ranks.
    """
    windows = int(total(len(fitted)))
    chosen = scattered(windows, -(-windows // stride))
    curvature = [sample for index, sample in enumerate(fitted, start=before) if index in chosen]
    problem = _Linearised(rows, down, fitted, curvature, activation, ridge, total, keep_derivatives)

    def error(step: Sequence[Tensor], scale: float = 1.0) -> float:
        return problem.true_error(_moved(rows, scale, step), held_out)

    unmoved = problem.true_error(rows, held_out)
    enough = (1 - SMALLEST_GAIN) * unmoved
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
    while reached >= enough and scale > SMALLEST_STEP:
        scale /= 2
        reached = error(best, scale)
    if not reached < enough:
        return rows
    return tuple(_moved(rows, scale, best))


class _Linearised:
    """The damped least-squares problem, linearised at `rows`. Products with its matrix loop over the windows.

    The matrix is measured on the windows `curvature`, some of `samples`, and scaled to the weight of all of them.
    """

    def __init__(
        self,
        rows: tuple[Tensor, ...],
        down: Tensor,
        samples: Sequence[TokenSample],
        curvature: Sequence[TokenSample],
        activation: Activation,
        ridge: float,
        total: Total = complete,
        keep_derivatives: bool = False,
    ) -> None:
        self.rows, self.down, self.activation, self.total = rows, down, activation, total
        self.samples, self.curvature = samples, curvature
        self.curvature_weight = self._weight(curvature)
        self.share = self._weight(samples) / self.curvature_weight
        self.keep_derivatives = keep_derivatives
        self.derivatives: list[list[Tensor]] = []
        input_moment, output_moments = self._factor_moments()
        scale = mean_diagonal(input_moment)
        self.damping = [float(ridge * mean_diagonal(moment) * scale) for moment in output_moments]
        self.input_inverse = inverse(damp(input_moment, ridge))
        self.output_inverses = [inverse(damp(moment, ridge)) for moment in output_moments]

    def iterates(self, iterations: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield the conjugate-gradient iterates, with one tensor per matrix."""
        step = [torch.zeros_like(row) for row in self.rows]
        residual = self._gradient()
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
            residual = self._missing(rows, sample)
            error += float((sample.weight @ residual.square()).sum())
        return float(self.total(error))

    def _gradient(self) -> list[Tensor]:
        """Compute Jᵀ r at the current rows."""
        sums = [torch.zeros_like(row) for row in self.rows]
        for sample in self._on_device(self.samples):
            hidden, derivatives = self._hidden(sample.inputs)
            self._add_transposed(sums, sample, derivatives, sample.target - hidden @ self.down)
        return [self.total(each) for each in sums]

    def _normal_product(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """Compute (JᵀJ + μ) direction."""
        sums = [torch.zeros_like(row) for row in self.rows]
        for sample, derivatives in self._linearised():
            hidden = [z * (sample.inputs @ d.T) for z, d in zip(derivatives, direction, strict=True)]
            self._add_transposed(sums, sample, derivatives, functools.reduce(torch.add, hidden) @ self.down)
        products = [self.share * self.total(each) for each in sums]
        return [each + mu * d for each, mu, d in zip(products, self.damping, direction, strict=True)]

    def _add_transposed(
        self, sums: list[Tensor], sample: TokenSample, derivatives: list[Tensor], outputs: Tensor
    ) -> None:
        """Add Jᵀ v of one window to `sums`, for the rows of v (n, m) in `outputs`."""
        back = (sample.weight[:, None] * outputs) @ self.down.T
        for each, z in zip(sums, derivatives, strict=True):
            each += (z * back).T @ sample.inputs

    def _missing(self, rows: Sequence[Tensor], sample: TokenSample) -> Tensor:
        return sample.target - hidden_channels(rows, sample.inputs, self.activation) @ self.down

    def _linearised(self) -> Iterator[tuple[TokenSample, list[Tensor]]]:
        """Yield the curvature's windows with z per matrix, kept from the first pass or recomputed in each pass."""
        for index, sample in enumerate(self._on_device(self.curvature)):
            if index < len(self.derivatives):
                yield sample, self.derivatives[index]
                continue
            _, derivatives = self._hidden(sample.inputs)
            if self.keep_derivatives:
                self.derivatives.append(derivatives)
            yield sample, derivatives

    def _hidden(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Compute the hidden channels, and z per matrix in the order of the rows."""
        before = inputs @ self.rows[0].T
        value, slope = torch.func.jvp(self.activation, (before,), (torch.ones_like(before),))  # pyright: ignore[reportAssignmentType]
        if len(self.rows) == 1:
            return value, [slope]
        up = inputs @ self.rows[1].T
        return value * up, [slope * up, value]

    def _weight(self, samples: Sequence[TokenSample]) -> float:
        """Return the sum of the tokens' weights over all ranks."""
        return float(self.total(sum(float(sample.weight.sum()) for sample in samples)))

    def _factor_moments(self) -> tuple[Tensor, list[Tensor]]:
        """Compute Σ w yyᵀ / Σ w, and (DDᵀ)∘Σ w zzᵀ per matrix.

        They are used only for preconditioning, so float32 sums suffice.
        """
        width, d_model = self.rows[0].shape
        inputs = self.down.new_zeros(d_model, d_model)
        channels = [self.down.new_zeros(width, width) for _ in self.rows]
        for sample, derivatives in self._linearised():
            root = sample.weight.sqrt()[:, None]
            inputs += gram_matrix(root * sample.inputs)
            for channel, z in zip(channels, derivatives, strict=True):
                channel += gram_matrix(root * z)
        metric = self.share * (self.down @ self.down.T)
        return self.total(inputs) / self.curvature_weight, [self.total(channel).mul_(metric) for channel in channels]

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
