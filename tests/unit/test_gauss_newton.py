"""Test the Gauss–Newton steps on the MLP's input weights: exact for a linear MLP, never worse than the start."""

from __future__ import annotations

import pytest
import torch
from laws import difference, normal
from torch import Tensor, nn

from optimum_modegpt.decompositions.gauss_newton import (
    TokenSample,
    _Linearised,
    hidden_channels,
    refit_inputs,
    split_windows,
)
from optimum_modegpt.decompositions.scattered import scattered

TOKENS, D_MODEL, WIDTH = 40, 5, 4
ACTIVATIONS = {"silu": nn.SiLU(), "relu": nn.ReLU(), "gelu": nn.GELU(), "tanh gelu": nn.GELU("tanh")}
EVERY = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=list(ACTIVATIONS))
SHAPES = pytest.mark.parametrize("matrices", [1, 2], ids=["plain", "gated"])


def identity(x: Tensor) -> Tensor:
    return x * 1.0


def rows_of(matrices: int, width: int = WIDTH, seed: int = 0) -> tuple[Tensor, ...]:
    return tuple(normal(width, D_MODEL, seed=seed + 10 * i) for i in range(matrices))


def windows(
    rows: tuple[Tensor, ...], down: Tensor, activation, *, count: int = 8, noise: float = 0.0, seed: int = 0
) -> list[TokenSample]:
    """Return windows whose targets are the outputs of the MLP of `rows` and `down`."""
    result = []
    for index in range(count):
        inputs = normal(TOKENS, D_MODEL, seed=seed + index)
        target = hidden_channels(rows, inputs, activation) @ down
        target = target + noise * normal(*target.shape, seed=seed + 50 + index)
        result.append(TokenSample(inputs, target, normal(TOKENS, seed=seed + 100 + index).exp()))
    return result


def error(rows, down, samples, activation) -> float:
    """Return Σ w ‖target − output‖²."""
    total = 0.0
    for sample in samples:
        gap = sample.target - hidden_channels(rows, sample.inputs, activation) @ down
        total += float((sample.weight[:, None] * gap.square()).sum())
    return total


def problem(matrices: int, activation, *, seed: int = 0) -> tuple[tuple[Tensor, ...], Tensor, list[TokenSample]]:
    """Return the rows of 4 of 6 channels, and the windows of all 6 that they are to approximate."""
    wide, down = rows_of(matrices, 6, seed), normal(6, D_MODEL, seed=seed + 30)
    samples = windows(wide, down, activation, seed=seed)
    return tuple(row[:WIDTH] for row in wide), down[:WIDTH], samples


def refit(rows, down, samples, activation, **settings) -> tuple[Tensor, ...]:
    """Refit on all windows but the first two, which are held out. Fewer than 4 windows are both fitted and held out."""
    held_out, fitted = (samples[:2], samples[2:]) if len(samples) >= 4 else (samples, samples)
    return refit_inputs(rows, down, fitted, held_out, activation, **settings)


# ------------------------------------------------------------------------------------------------------ linear problem


@pytest.mark.parametrize("out", [WIDTH, 7])
def test_linear_mlp_is_solved_exactly(out):
    wanted, down = rows_of(1, seed=3), normal(WIDTH, out, seed=1)
    samples = windows(wanted, down, identity)
    (refitted,) = refit(rows_of(1), down, samples, identity, ridge=1e-12, iterations=60)
    assert difference(refitted, wanted[0]) < 1e-6


def test_linear_mlp_is_solved_as_by_least_squares():
    rows, down = rows_of(1), normal(WIDTH, 3, seed=1)
    samples = windows(rows_of(1, seed=3), down, identity, count=3, noise=1.0)
    (refitted,) = refit(rows, down, samples, identity, ridge=1e-12, iterations=80)
    root = torch.cat([s.weight.sqrt() for s in samples])[:, None]
    inputs = root * torch.cat([s.inputs for s in samples])
    target = root * torch.cat([s.target for s in samples])
    best = torch.linalg.lstsq(inputs, target).solution  # (d_model, 3); Dᵀ W can take every value
    assert difference(refitted.T @ down, best) < 1e-6


def test_last_column_of_the_rows_is_the_bias():
    wanted, down = normal(WIDTH, D_MODEL + 1, seed=3), normal(WIDTH, 6, seed=1)
    samples = []
    for index in range(8):
        inputs = torch.cat((normal(TOKENS, D_MODEL, seed=index), torch.ones(TOKENS, 1).double()), dim=1)
        samples.append(TokenSample(inputs, inputs @ wanted.T @ down, torch.ones(TOKENS).double()))
    start = wanted.clone()
    start[:, -1] = 0
    (refitted,) = refit((start,), down, samples, identity, ridge=1e-12, iterations=60)
    assert difference(refitted[:, -1], wanted[:, -1]) < 1e-6


@SHAPES
def test_larger_ridge_keeps_the_rows_closer_to_the_start(matrices):
    rows, down, samples = problem(matrices, nn.SiLU())
    moves = []
    for ridge in (1e-3, 1.0, 10.0, 1e6):
        moved = refit(rows, down, samples, nn.SiLU(), ridge=ridge, iterations=4)
        moves.append(sum(float((a - b).square().sum()) for a, b in zip(moved, rows, strict=True)) ** 0.5)
    assert moves[0] > moves[1] > moves[2] > moves[3]
    assert moves[3] == 0, "expected no change for a negligible gain"


# --------------------------------------------------------------------------------------------------------- derivatives


@SHAPES
@EVERY
def test_hidden_channels_match_their_definition(activation, matrices):
    rows, inputs = rows_of(matrices), normal(3, D_MODEL, seed=1)
    for t, y in enumerate(inputs):
        for k in range(WIDTH):
            value = activation(rows[0][k] @ y) * (rows[1][k] @ y if matrices == 2 else 1.0)
            assert hidden_channels(rows, inputs, activation)[t, k] == pytest.approx(float(value), abs=1e-12)


@SHAPES
@EVERY
def test_gradient_matches_finite_differences(activation, matrices):
    rows, down, samples = problem(matrices, activation)
    gradients = _Linearised(rows, down, samples, samples, activation, 0.1)._gradient()
    step = 1e-6
    for index, gradient in enumerate(gradients):
        for k in range(WIDTH):
            for j in range(D_MODEL):
                errors = []
                for sign in (1, -1):
                    moved = [row.clone() for row in rows]
                    moved[index][k, j] += sign * step
                    errors.append(error(moved, down, samples, activation))
                slope = -(errors[0] - errors[1]) / (4 * step)  # −½ dE/dW
                assert float(gradient[k, j]) == pytest.approx(slope, rel=1e-4, abs=1e-5 * float(gradient.abs().max()))


@SHAPES
@EVERY
def test_curvature_matches_the_linearised_output(activation, matrices):
    rows, down, samples = problem(matrices, activation)
    linearised = _Linearised(rows, down, samples, samples, activation, 0.1)
    direction = [normal(WIDTH, D_MODEL, seed=70 + i) for i in range(matrices)]
    step, form = 1e-6, 0.0
    ahead = [row + step * d for row, d in zip(rows, direction, strict=True)]
    behind = [row - step * d for row, d in zip(rows, direction, strict=True)]
    for s in samples:
        change = hidden_channels(ahead, s.inputs, activation) - hidden_channels(behind, s.inputs, activation)
        slope = change @ down / (2 * step)
        form += float((s.weight[:, None] * slope.square()).sum())
    form += sum(mu * float(d.square().sum()) for mu, d in zip(linearised.damping, direction, strict=True))
    product = linearised._normal_product(direction)
    assert sum(float((p * d).sum()) for p, d in zip(product, direction, strict=True)) == pytest.approx(form, rel=1e-5)


@SHAPES
def test_preconditioner_is_the_kronecker_product_of_the_damped_factors(matrices):
    ridge, activation = 0.1, nn.SiLU()
    rows, down, samples = problem(matrices, activation)
    inputs, weight = torch.cat([s.inputs for s in samples]), torch.cat([s.weight for s in samples])
    before = inputs @ rows[0].T
    value = activation(before)
    slope = torch.stack([torch.autograd.functional.jacobian(activation, b).diagonal() for b in before])
    derivatives = [slope * (inputs @ rows[1].T), value] if matrices == 2 else [slope]
    linearised = _Linearised(rows, down, samples, samples, activation, ridge)
    gradient = [normal(WIDTH, D_MODEL, seed=80 + i) for i in range(matrices)]
    result = linearised._precondition(gradient)
    right = inputs.T @ (weight[:, None] * inputs) / weight.sum()
    for z, matrix, solved, mu in zip(derivatives, gradient, result, linearised.damping, strict=True):
        left = (down @ down.T) * (z.T @ (weight[:, None] * z))
        scales = left.diagonal().mean(), right.diagonal().mean()
        assert mu == pytest.approx(float(ridge * scales[0] * scales[1]))
        factors = [m + ridge * s * torch.eye(len(m)).double() for m, s in zip((left, right), scales, strict=True)]
        assert difference(factors[0] @ solved @ factors[1], matrix) < 1e-9


# ---------------------------------------------------------------------------------------------------------- acceptance


@SHAPES
@EVERY
@pytest.mark.parametrize("seed", [0, 200, 400])
def test_error_on_held_back_windows_never_rises(activation, matrices, seed):
    rows, down, samples = problem(matrices, activation, seed=seed)
    refitted = refit(rows, down, samples, activation, ridge=0.1, iterations=4)
    before, after = (error(r, down, samples[:2], activation) for r in (rows, refitted))
    assert after <= before
    assert after < 0.95 * before  # these problems can be improved


@SHAPES
def test_rows_that_meet_the_target_are_not_changed(matrices):
    rows, down = rows_of(matrices), normal(WIDTH, D_MODEL, seed=30)
    refitted = refit(rows, down, windows(rows, down, nn.SiLU()), nn.SiLU(), ridge=0.1, iterations=4)
    assert all(torch.equal(a, b) for a, b in zip(refitted, rows, strict=True))


@SHAPES
def test_best_iterate_on_held_back_windows_is_returned(matrices):
    rows, down, samples = problem(matrices, nn.SiLU())
    noisy = samples[:2]
    for i, s in enumerate(samples[2:5]):
        noisy.append(TokenSample(s.inputs, s.target + 3 * normal(*s.target.shape, seed=i), s.weight))
    steps = list(_Linearised(rows, down, noisy[2:], noisy[2:], nn.SiLU(), 1e-3).iterates(20))
    errors = []
    for step in steps:
        moved = [row + change for row, change in zip(rows, step, strict=True)]
        errors.append(error(moved, down, noisy[:2], nn.SiLU()))
    best = min(range(20), key=errors.__getitem__)
    assert best < 19
    refitted = refit(rows, down, noisy, nn.SiLU(), ridge=1e-3, iterations=20)
    assert error(refitted, down, noisy[:2], nn.SiLU()) <= errors[best] * (1 + 1e-9)


def test_overshooting_step_is_halved_until_it_reduces_the_error():
    # The output x² is to become 1, from x = 0.1. The linear step of 4.95 gives an output of 25, a quarter of it 1.8.
    samples = [TokenSample(*(torch.ones(1, 1).double() for _ in range(2)), torch.ones(1).double())] * 6
    (refitted,) = refit(
        (torch.full((1, 1), 0.1).double(),), torch.ones(1, 1).double(), samples, torch.square, ridge=1e-12, iterations=1
    )
    assert float(refitted) == pytest.approx(0.1 + 4.95 / 4)


@SHAPES
def test_conjugate_gradients_stop_when_the_held_back_error_rises(matrices, monkeypatch):
    rows, down, samples = problem(matrices, nn.SiLU())
    noisy = samples[:2]
    for i, s in enumerate(samples[2:5]):
        noisy.append(TokenSample(s.inputs, s.target + 3 * normal(*s.target.shape, seed=i), s.weight))
    products = []
    product = _Linearised._normal_product

    def noted(linearised, direction):
        products.append(direction)
        return product(linearised, direction)

    monkeypatch.setattr(_Linearised, "_normal_product", noted)
    refit(rows, down, noisy, nn.SiLU(), ridge=1e-3, iterations=20)
    assert 1 <= len(products) < 20


def test_step_that_never_reduces_the_error_is_rejected():
    rows, down, samples = problem(2, nn.SiLU())
    output = [hidden_channels(rows, s.inputs, nn.SiLU()) @ down for s in samples]
    # The held-back windows have the opposite error of the fitted ones.
    against = list(samples)
    for index in range(2):
        s = samples[index]
        against[index] = TokenSample(s.inputs, output[index] - (s.target - output[index]), s.weight)
    refitted = refit(rows, down, against, nn.SiLU(), ridge=0.1, iterations=4)
    assert all(torch.equal(a, b) for a, b in zip(refitted, rows, strict=True))


@pytest.mark.parametrize(("count", "held"), [(4, [1, 2]), (15, [3, 7]), (24, [4, 8, 21])])
def test_an_eighth_of_the_windows_is_held_out(count, held):
    samples = windows(rows_of(1), normal(WIDTH, D_MODEL, seed=30), identity, count=count)
    held_out, fitted = split_windows(samples)
    assert [id(each) for each in held_out] == [id(samples[index]) for index in held]
    assert [id(each) for each in fitted] == [id(each) for i, each in enumerate(samples) if i not in held]


@pytest.mark.parametrize("shares", [(5, 19), (0, 24), (24, 0)])
def test_ranks_hold_out_the_same_windows_as_one_process(shares):
    samples = windows(rows_of(1), normal(WIDTH, D_MODEL, seed=30), identity, count=24)
    first, second = (
        split_windows(part, before=before, total=lambda _: 24)
        for part, before in ((samples[: shares[0]], 0), (samples[shares[0] :], shares[0]))
    )
    for own, other, whole in zip(first, second, split_windows(samples), strict=True):
        assert [id(each) for each in own + other] == [id(each) for each in whole]


@pytest.mark.parametrize("count", [0, 3])
def test_few_windows_are_fitted_and_held_out(count):
    samples = windows(rows_of(1), normal(WIDTH, D_MODEL, seed=30), identity, count=count)
    held_out, fitted = split_windows(samples)
    assert held_out is samples
    assert fitted is samples


def test_step_with_a_negligible_gain_is_rejected():
    rows, down = rows_of(1), normal(WIDTH, WIDTH, seed=30)
    samples = windows(rows, down, identity, noise=1.0, count=80)
    # The rows are almost the best ones for targets that are their outputs with noise.
    (same,) = refit(rows, down, samples, identity, ridge=1e-3, iterations=4)
    assert same is rows[0]


@SHAPES
@pytest.mark.parametrize("stride", [2, 3])
def test_curvature_of_some_windows_is_scaled_to_all(matrices, stride):
    rows, down, samples = problem(matrices, nn.SiLU())
    twice = [sample for sample in samples for _ in range(stride)]  # every window is among the measured ones
    expected = refit_inputs(rows, down, twice, samples[:2], nn.SiLU(), ridge=0.1, iterations=4)
    refitted = refit_inputs(rows, down, twice, samples[:2], nn.SiLU(), ridge=0.1, iterations=4, stride=stride)
    for a, b in zip(refitted, expected, strict=True):
        assert difference(a, b) < 1e-9


@SHAPES
def test_ranks_measure_the_curvature_on_the_same_windows_as_one_process(matrices, monkeypatch):
    rows, down, samples = problem(matrices, nn.SiLU())
    seen = []
    built = _Linearised.__init__

    def noted(linearised, rows, down, fitted, curvature, *others):
        seen.append([id(sample) for sample in curvature])
        built(linearised, rows, down, fitted, curvature, *others)

    def all_windows(value):
        return len(samples) if isinstance(value, int) else value

    monkeypatch.setattr(_Linearised, "__init__", noted)
    settings = {"ridge": 0.1, "iterations": 1, "stride": 3, "total": all_windows}
    for part, before in ((samples, 0), (samples[:4], 0), (samples[4:], 4)):
        refit_inputs(rows, down, part, samples[:2], nn.SiLU(), **settings, before=before)
    assert seen[0] == [id(samples[index]) for index in sorted(scattered(len(samples), -(-len(samples) // 3)))]
    assert seen[1] + seen[2] == seen[0]


@pytest.mark.parametrize("count", [1, 3])
def test_few_windows_are_all_used(count):
    rows, down, samples = problem(2, nn.SiLU())
    refitted = refit(rows, down, samples[:count], nn.SiLU(), ridge=0.1, iterations=4)
    assert error(refitted, down, samples[:count], nn.SiLU()) < error(rows, down, samples[:count], nn.SiLU())


# ---------------------------------------------------------------------------------------------------------- invariance


@SHAPES
def test_weight_of_a_token_acts_as_its_number_of_repetitions(matrices):
    rows, down, samples = problem(matrices, nn.SiLU())
    times = [torch.arange(TOKENS) % 3 + 1] * len(samples)
    weighted = [TokenSample(s.inputs, s.target, n.double()) for s, n in zip(samples, times, strict=True)]
    repeated = []
    for s, n in zip(samples, times, strict=True):
        inputs, target = s.inputs.repeat_interleave(n, 0), s.target.repeat_interleave(n, 0)
        repeated.append(TokenSample(inputs, target, torch.ones(int(n.sum())).double()))
    expected = refit(rows, down, repeated, nn.SiLU(), ridge=0.1, iterations=4)
    refitted = refit(rows, down, weighted, nn.SiLU(), ridge=0.1, iterations=4)
    for a, b in zip(refitted, expected, strict=True):
        assert difference(a, b) < 1e-10


@SHAPES
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_scale_of_the_token_weights_does_not_matter(matrices, scale):
    rows, down, samples = problem(matrices, nn.SiLU())
    scaled = [TokenSample(s.inputs, s.target, scale * s.weight) for s in samples]
    expected = refit(rows, down, samples, nn.SiLU(), ridge=0.1, iterations=4)
    refitted = refit(rows, down, scaled, nn.SiLU(), ridge=0.1, iterations=4)
    for a, b in zip(refitted, expected, strict=True):
        assert difference(a, b) < 1e-9


@SHAPES
def test_order_of_the_channels_does_not_matter(matrices):
    rows, down, samples = problem(matrices, nn.SiLU())
    order = torch.tensor([2, 0, 3, 1])
    expected = refit(rows, down, samples, nn.SiLU(), ridge=0.1, iterations=4)
    refitted = refit([row[order] for row in rows], down[order], samples, nn.SiLU(), ridge=0.1, iterations=4)
    for a, b in zip(refitted, expected, strict=True):
        assert difference(a, b[order]) < 1e-9


@SHAPES
def test_dead_channels_and_zero_inputs_keep_their_weights(matrices):
    rows, down, samples = problem(matrices, nn.SiLU())
    down[1] = 0
    samples = [TokenSample(s.inputs * torch.tensor([1.0, 0, 1, 1, 1]), s.target, s.weight) for s in samples]
    refitted = refit(rows, down, samples, nn.SiLU(), ridge=0.1, iterations=4)
    for a, b in zip(refitted, rows, strict=True):
        assert a.isfinite().all()
        assert difference(a[1], b[1]) < 1e-9
        assert difference(a[:, 1], b[:, 1]) < 1e-9
        assert difference(a, b) > 1e-3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_result_is_deterministic_and_independent_of_gradient_mode(mode):
    rows, down, samples = problem(2, nn.SiLU())
    expected = refit(rows, down, samples, nn.SiLU(), ridge=0.1, iterations=4)
    with mode():
        once, again = (refit(rows, down, samples, nn.SiLU(), ridge=0.1, iterations=4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert all(difference(a, b) < 1e-12 for a, b in zip(once, expected, strict=True))


def test_float32_rows_give_nearly_the_same():
    rows, down, samples = problem(2, nn.SiLU())
    expected = refit(rows, down, samples, nn.SiLU(), ridge=0.1, iterations=4)
    refitted = refit([row.float() for row in rows], down.float(), samples, nn.SiLU(), ridge=0.1, iterations=4)
    for a, b in zip(refitted, expected, strict=True):
        assert a.dtype == torch.float32
        assert difference(a, b) < 1e-3


@SHAPES
def test_kept_and_recomputed_derivatives_give_the_same_result(matrices):
    rows, down, samples = problem(matrices, nn.SiLU())
    calls = []

    class Noted(nn.SiLU):
        def forward(self, input):
            calls.append(input.shape)
            return super().forward(input)

    kept, again = [], []
    for results, keep in ((kept, True), (again, False)):
        calls.clear()
        results.append(refit(rows, down, samples, Noted(), ridge=0.1, iterations=1, keep_derivatives=keep))
        results.append(len(calls))
    assert all(torch.equal(a, b) for a, b in zip(kept[0], again[0], strict=True))
    fitted = len(samples) - max(2, len(samples) // 8)
    assert again[1] - kept[1] == fitted, "expected one more pass over the fitted windows for the iteration"
