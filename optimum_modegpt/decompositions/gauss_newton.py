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
from typing import Any, TypeVar

import torch
from torch import Tensor

from optimum_modegpt.decompositions.least_squares import Total, complete
from optimum_modegpt.decompositions.psd import damp, gram_matrix, inverse, mean_diagonal, to_float64

Activation = Callable[[Tensor], Tensor]

Item = TypeVar("Item")

FEWEST_WINDOWS = 4
"""Fewest windows of which some are held out."""

STRONGER, ATTEMPTS = 4.0, 4
"""Factor between the dampings that are tried, and their largest number."""


@dataclass(frozen=True)
class TokenSample:
    """Normalised inputs y (n, d), targets (n, m) and weights (n,) of one window's tokens. y ends in 1 for biases."""

    inputs: Tensor
    target: Tensor
    weight: Tensor

    def to(self, place: Any) -> TokenSample:
        """Return the sample on a device, or with the device and dtype of a tensor."""
        return TokenSample(self.inputs.to(place), self.target.to(place), self.weight.to(place))


@dataclass(frozen=True)
class Step:
    """A step on the input rows.

    Attributes:
        rows: the rows after it.
        ridge: the damping that was used.
        gain: the share by which the error on held-out windows falls.
    """

    rows: tuple[Tensor, ...]
    ridge: float
    gain: float


def hidden_channels(rows: Sequence[Tensor], inputs: Tensor, activation: Activation) -> Tensor:
    """Compute φ(G y)∘(U y) for rows (G, U), or φ(W y) for rows (W,). Rows (k, d) and `inputs` (n, d) to (n, k)."""
    hidden = activation(inputs @ rows[0].T)
    return hidden * (inputs @ rows[1].T) if len(rows) == 2 else hidden


def hold_out(samples: Sequence[Item], windows: int, before: int = 0) -> tuple[list[Item], list[Item]]:
    """Divide the samples into those to fit and those to hold out: an eighth, at least 2, at equal distances.

    Of fewer than `FEWEST_WINDOWS`, none is held out.

    Args:
        samples: one per window.
        windows: number of windows of all ranks.
        before: number of windows of other ranks that come before `samples`.
    """
    if windows < FEWEST_WINDOWS:
        return list(samples), []
    fitted: list[Item] = []
    held_out: list[Item] = []
    count = max(2, windows // 8)
    for number, sample in enumerate(samples, before):
        is_held_out = (number + 1) * count // windows > number * count // windows
        (held_out if is_held_out else fitted).append(sample)
    return fitted, held_out


def refit_inputs(  # noqa: PLR0913 - each is part of the formula or of its computation
    rows: tuple[Tensor, ...],
    down: Tensor,
    fitted: Iterable[TokenSample],
    held_out: Sequence[TokenSample],
    activation: Activation,
    *,
    ridge: float,
    iterations: int,
    curvature: float = 1.0,
    keep_derivatives: bool = True,
    total: Total = complete,
) -> Step | None:
    """Take one Gauss–Newton step, as long as the true error on held-out windows falls.

    The conjugate gradients stop when this error no longer falls. If that is before the last iteration, they start again
    with `STRONGER` times the damping, as long as the error falls further.

    Args:
        rows: (G, U) or (W,), each (k, d), in the order of `hidden_channels`.
        down: D (k, m). It must not be fitted to the held-out windows, because every other MLP would seem worse on them.
        fitted, held_out: one sample per window. They are moved to the rows' device one at a time.
        activation: φ.
        ridge: damping of both factors and of the objective, as a fraction (0.1 by default in `Recipe`).
        iterations: most conjugate-gradient iterations, at least 1.
        curvature: share of the tokens that JᵀJ is measured on. The gradient uses all of them.
        keep_derivatives: whether to keep z of these tokens (tokens × rows numbers) between iterations. Otherwise z is
            recomputed, which costs a third more products.
        total: completes a sum over samples with the sums of other ranks.

    Returns:
        The step with the lowest error. None if no step lowers it.
    """
    problem = _Linearised(rows, down, fitted, activation, curvature, total, keep_derivatives)
    unmoved = problem.true_error(rows, held_out)
    best, lowest = None, unmoved
    for _ in range(ATTEMPTS):
        found, reached, falls = rows, unmoved, True
        for step in problem.iterates(iterations, ridge):
            moved = tuple(_moved(rows, 1.0, step))
            error = problem.true_error(moved, held_out)
            falls = error < reached
            if not falls:
                break
            found, reached = moved, error
        if reached < lowest:
            best, lowest = Step(found, ridge, 1 - reached / unmoved), reached
        elif best is not None:  # the weaker damping was better
            break
        if falls:
            break
        ridge *= STRONGER
    return best


def important(scores: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Choose about `share` of the tokens, those with a high score (n,) more often than others.

    The tokens are chosen at equal distances of the cumulated probability, which is at least half of `share`.

    Returns:
        The indices of the chosen tokens, and the probabilities of these.
    """
    chances = share * (1 + scores / scores.mean().clamp_min(torch.finfo(scores.dtype).tiny)) / 2
    chances = chances.clamp_max(1)
    passed = (to_float64(chances).cumsum(0) + 0.5).floor()
    chosen = passed.diff(prepend=passed.new_zeros(1)).nonzero()[:, 0].to(scores.device)
    return chosen, chances[chosen]


class _Linearised:
    """The damped least-squares problem, linearised at `rows`. Its sums loop over the windows.

    The gradient Jᵀ r is a sum over all tokens. JᵀJ is a sum over some tokens, each divided by the probability that it
    was chosen. Tokens with large derivatives are chosen more often, because few of them can make up most of JᵀJ.
    """

    def __init__(
        self,
        rows: tuple[Tensor, ...],
        down: Tensor,
        samples: Iterable[TokenSample],
        activation: Activation,
        curvature: float = 1.0,
        total: Total = complete,
        keep_derivatives: bool = False,
    ) -> None:
        self.rows, self.down, self.activation, self.total = rows, down, activation, total
        self.curvature, self.keep_derivatives = curvature, keep_derivatives
        self.measured: list[tuple[Tensor, Tensor]] = []
        self.derivatives: list[list[Tensor]] = []
        self._sum(samples)

    def damp(self, ridge: float) -> None:
        """Damp the objective and both factors of the preconditioner."""
        scale = mean_diagonal(self.input_moment)
        self.damping = [float(ridge * mean_diagonal(moment) * scale) for moment in self.output_moments]
        self.input_inverse = inverse(damp(self.input_moment, ridge))
        self.output_inverses = [inverse(damp(moment, ridge)) for moment in self.output_moments]

    def iterates(self, iterations: int, ridge: float) -> Iterator[tuple[Tensor, ...]]:
        """Yield the conjugate-gradient iterates with this damping, one tensor per matrix."""
        self.damp(ridge)
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
        for index, (inputs, weight) in enumerate(self.measured):
            derivatives = self.derivatives[index] if self.keep_derivatives else self._derivatives(inputs)[0]
            hidden = [z * (inputs @ d.T) for z, d in zip(derivatives, direction, strict=True)]
            outputs = functools.reduce(torch.add, hidden) @ self.down
            self._add_transposed(sums, inputs, derivatives, weight[:, None] * outputs)
        return [self.total(each) + mu * d for each, mu, d in zip(sums, self.damping, direction, strict=True)]

    def _add_transposed(
        self, sums: list[Tensor], inputs: Tensor, derivatives: Sequence[Tensor], outputs: Tensor
    ) -> None:
        """Add Jᵀ v of some tokens, with the rows of v (n, m) from `outputs`, to `sums`."""
        back = outputs @ self.down.T
        for each, z in zip(sums, derivatives, strict=True):
            each.addmm_((z * back).T, inputs)

    def _sum(self, samples: Iterable[TokenSample]) -> None:
        """Sum the gradient at the current rows, and the moments Σ w yyᵀ / Σ w, and (DDᵀ)∘Σ w zzᵀ per matrix.

        The moments are used only for preconditioning, so float32 sums suffice.
        """
        width, d_model = self.rows[0].shape
        gradient = [torch.zeros_like(row) for row in self.rows]
        moment, weights = self.down.new_zeros(d_model, d_model), self.down.new_zeros(())
        channels = [self.down.new_zeros(width, width) for _ in self.rows]
        norms = self.down.square().sum(1)
        for sample in self._on_device(samples):
            inputs, weight = sample.inputs, sample.weight
            derivatives, hidden = self._derivatives(inputs)
            self._add_transposed(gradient, inputs, derivatives, weight[:, None] * (sample.target - hidden @ self.down))
            if self.curvature < 1:
                scores = torch.stack([z.square() @ norms for z in derivatives]).sum(0)
                chosen, chances = important(weight * inputs.square().sum(1) * scores, self.curvature)
                inputs, weight = inputs[chosen], weight[chosen] / chances
                derivatives = [z[chosen] for z in derivatives]
            root = weight.sqrt()[:, None]
            moment += gram_matrix(root * inputs)
            weights += weight.sum()
            for channel, z in zip(channels, derivatives, strict=True):
                channel += gram_matrix(root * z)
            self.measured.append((inputs, weight))
            if self.keep_derivatives:
                self.derivatives.append(derivatives)
        metric = self.down @ self.down.T
        self.gradient = [self.total(each) for each in gradient]
        self.input_moment = self.total(moment) / self.total(weights)
        self.output_moments = [self.total(each).mul_(metric) for each in channels]

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
