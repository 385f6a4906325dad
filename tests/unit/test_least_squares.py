"""Compare the centred ridge regression on moments with explicit regressions on tokens."""

from __future__ import annotations

import pytest
import torch
from laws import difference, eye, linear_moments, normal

from optimum_modegpt.decompositions.least_squares import NOISE_RIDGE, LinearMoments, centred_refit

TOKENS, WIDTH, OUT = 50, 6, 4
ONES = pytest.mark.parametrize("ones", [False, True])


def tokens(*, rank: int = WIDTH, ones: bool = False):
    """Return inputs with a nonzero mean, targets, token weights, dense weights and the moments of these tokens."""
    inputs = normal(TOKENS, rank) @ normal(rank, WIDTH, seed=1) + 0.5
    target, weight = normal(TOKENS, OUT, seed=2), normal(TOKENS, seed=3).exp()
    dense = normal(WIDTH + ones, OUT, seed=4)
    return inputs, target, weight, dense, linear_moments(inputs, target, weight, ones=ones)


@ONES
@pytest.mark.parametrize("rank", [WIDTH, 2])
@pytest.mark.parametrize("relative", [1e-4, 1.0, 100.0])
def test_refit_is_the_ridge_regression_around_the_dense_weights(ones, rank, relative):
    inputs, target, weight, dense, moments = tokens(rank=rank, ones=ones)
    ridge = moments.ridge(relative)
    inputs = torch.cat((inputs, torch.ones(TOKENS, 1)), dim=1) if ones else inputs
    rows = torch.cat((weight.sqrt()[:, None] * inputs, ridge.sqrt() * eye(inputs.shape[1])))
    goals = torch.cat((weight.sqrt()[:, None] * target, ridge.sqrt() * dense))
    assert difference(centred_refit(moments, dense, ridge), torch.linalg.lstsq(rows, goals).solution) < 1e-9


@ONES
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_without_data_the_dense_weights_are_kept(ones, scale):
    dense = scale * normal(WIDTH + ones, OUT)
    nothing = linear_moments(torch.zeros(TOKENS, WIDTH).double(), torch.zeros(TOKENS, OUT).double(), ones=ones)
    nothing = LinearMoments(0 * nothing.gram, nothing.cross, nothing.energy, TOKENS, ones)
    refitted = centred_refit(nothing, dense, nothing.ridge(1e-4))
    assert difference(refitted, dense) < 1e-12
    assert nothing.relative_error(refitted) == 0


def test_directions_without_data_keep_the_dense_weights():
    inputs, dense = normal(TOKENS, WIDTH), normal(WIDTH, OUT, seed=1)
    inputs[:, 2] = 0
    moments = linear_moments(inputs, normal(TOKENS, OUT, seed=2))
    refitted = centred_refit(moments, dense, moments.ridge(1e-4))
    assert difference(refitted[2], dense[2]) < 1e-10
    assert difference(refitted[3], dense[3]) > 0.1


def test_constant_input_recovers_a_bias():
    inputs, weight, bias = normal(TOKENS, WIDTH) + 1, normal(WIDTH, OUT, seed=1), normal(1, OUT, seed=2)
    moments = linear_moments(inputs, inputs @ weight + bias, ones=True)
    refitted = centred_refit(moments, torch.zeros(WIDTH + 1, OUT).double(), moments.ridge(1e-13))
    assert difference(refitted, torch.cat((weight, bias))) < 1e-9


def test_ridge_is_relative_to_the_inputs_without_the_constant():
    inputs = 1e3 * normal(TOKENS, WIDTH)
    plain, extended = (linear_moments(inputs, normal(TOKENS, OUT), ones=ones) for ones in (False, True))
    assert plain.width == extended.width == WIDTH
    assert extended.ridge(1e-4) == plain.ridge(1e-4)
    assert plain.ridge(1e-4) == pytest.approx(1e-4 * float(inputs.square().sum()) / WIDTH)


def test_ridge_of_a_refit_adds_the_energy_of_a_fixed_number_of_tokens():
    inputs, target = normal(TOKENS, WIDTH), normal(TOKENS, OUT)
    energy = float(inputs.square().sum(1).mean())
    for repeats in (1, 100):
        moments = linear_moments(inputs.repeat(repeats, 1), target.repeat(repeats, 1))
        added = float(moments.refit_ridge(1e-4) - moments.ridge(1e-4))
        assert added == pytest.approx(NOISE_RIDGE * energy)


@ONES
def test_relative_error_equals_the_error_on_the_tokens(ones):
    inputs, target, weight, dense, moments = tokens(ones=ones)
    output = inputs @ dense[:WIDTH] + dense[WIDTH:].sum(0)
    lost = (weight[:, None] * (target - output).square()).sum()
    expected = (lost / (weight[:, None] * target.square()).sum()).sqrt()
    assert moments.relative_error(dense) == pytest.approx(float(expected))
    assert moments.relative_error(torch.zeros_like(dense)) == pytest.approx(1)


def test_relative_error_of_a_perfect_fit_is_not_negative():
    inputs, weight = normal(TOKENS, WIDTH), normal(WIDTH, OUT, seed=1)
    assert 0 <= linear_moments(inputs, inputs @ weight).relative_error(weight) < 1e-7


@ONES
def test_mapped_moments_are_the_moments_of_mapped_inputs(ones):
    inputs, target, weight, _, moments = tokens(ones=ones)
    mapping = normal(WIDTH, 3)
    expected = linear_moments(inputs @ mapping, target, weight, ones=ones)
    full = torch.block_diag(mapping, torch.ones(1, 1).double()) if ones else mapping
    _same(moments.mapped(full), expected)


@ONES
def test_kept_moments_are_the_moments_of_kept_inputs_and_the_constant(ones):
    inputs, target, weight, _, moments = tokens(ones=ones)
    index = torch.tensor([1, 4])
    _same(moments.kept(index), linear_moments(inputs[:, index], target, weight, ones=ones))
    assert moments.with_constant(index).tolist() == ([1, 4, WIDTH] if ones else [1, 4])


def _same(actual, expected):
    assert difference(actual.gram, expected.gram) < 1e-12
    assert difference(actual.cross, expected.cross) < 1e-12
    assert actual.energy == pytest.approx(float(expected.energy))
    assert actual.ones == expected.ones
    assert actual.width == expected.width


@ONES
def test_moments_of_two_parts_are_joined_and_separated(ones):
    inputs, target, weight, _, whole = tokens(ones=ones)
    first, second = (
        linear_moments(inputs[part], target[part], weight[part], ones=ones) for part in (slice(20), slice(20, None))
    )
    for found, expected in ((first.joined(second), whole), (whole.without(first), second)):
        assert found.tokens == expected.tokens
        assert found.ones == ones
        for name in ("gram", "cross", "energy"):
            assert difference(getattr(found, name), getattr(expected, name)) < 1e-12
