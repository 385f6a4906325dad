"""Test solves and roots of moments: well-posed, singular, zero, badly scaled, not finite."""

from __future__ import annotations

import warnings

import pytest
import torch
from laws import MOMENTS, difference, eye, moment, normal
from torch.utils.flop_counter import FlopCounterMode

from optimum_modegpt.decompositions import psd
from optimum_modegpt.decompositions.psd import (
    PRODUCT_NOISE,
    ROOT_RIDGE,
    add_diagonal,
    damp,
    gram_matrix,
    gram_work,
    inverse,
    mean_diagonal,
    require_finite,
    roots,
    solve,
    to_float64,
)
from optimum_modegpt.errors import IllConditionedWarning, NumericalError

SITUATIONS = pytest.mark.parametrize("situation", MOMENTS)
REGULAR = pytest.mark.parametrize("situation", ["well-posed", "condition 1e12", "scale 1e-20", "scale 1e20"])


@pytest.fixture(autouse=True)
def _strict():
    with warnings.catch_warnings():
        warnings.simplefilter("error", IllConditionedWarning)
        yield


@REGULAR
def test_regular_moment_is_solved_without_a_warning(situation):
    matrix, right = moment(**MOMENTS[situation]), normal(12, 3)
    solution = solve(matrix, right)
    residual = (matrix @ solution - right).norm() / (matrix.norm() * solution.norm())
    assert residual < 1e-14
    if situation != "condition 1e12":
        assert difference(solution, torch.linalg.inv(matrix) @ right) < 1e-10


@REGULAR
def test_inverse_is_symmetric_and_accurate(situation):
    matrix = moment(**MOMENTS[situation])
    result = inverse(matrix)
    assert torch.equal(result, result.T)
    tolerance = 1e-3 if situation == "condition 1e12" else 1e-11
    assert difference(matrix @ result, eye(12)) < tolerance


def test_batch_is_solved_matrix_by_matrix():
    batch, right = torch.stack([moment(seed=seed) for seed in range(3)]), normal(3, 12, 2)
    singles = torch.stack([solve(matrix, column) for matrix, column in zip(batch, right, strict=True)])
    assert difference(solve(batch, right), singles) < 1e-12
    assert difference(inverse(batch) @ batch, eye(12).expand(3, -1, -1)) < 1e-11


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_solving_a_singular_moment_warns_and_is_exact_in_its_range(scale):
    matrix = scale * torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    with pytest.warns(IllConditionedWarning, match="3-wide"):
        solution = solve(matrix, matrix @ normal(3, 2))
    assert difference(solution[:2], normal(3, 2)[:2]) < 1e-12
    with pytest.warns(IllConditionedWarning):
        floored = solve(matrix, eye(3))
    assert floored[2, 2] * scale == pytest.approx(1 / (2 * PRODUCT_NOISE))


def test_moment_with_a_tiny_negative_eigenvalue_is_treated_as_singular():
    matrix = torch.diag(torch.tensor([1.0, -1e-17], dtype=torch.float64))
    with pytest.warns(IllConditionedWarning):
        assert solve(matrix, eye(2))[1, 1] == pytest.approx(1 / PRODUCT_NOISE)


def test_singular_moment_in_a_batch_does_not_affect_the_others():
    batch = torch.stack((moment(4), torch.zeros(4, 4, dtype=torch.float64)))
    right = torch.stack((normal(4, 1), torch.zeros(4, 1, dtype=torch.float64)))
    with pytest.warns(IllConditionedWarning):
        solution = solve(batch, right)
    assert difference(solution[0], torch.linalg.solve(batch[0], right[0])) < 1e-10
    assert torch.equal(solution[1], right[1])


def test_damped_zero_moment_can_be_inverted():
    damped = damp(moment(rank=0), 1e-8)
    assert inverse(damped).isfinite().all()
    assert difference(inverse(damped) @ damped, eye(12)) < 1e-12


@SITUATIONS
def test_roots_of_any_moment_are_finite_and_consistent(situation):
    matrix = moment(**MOMENTS[situation])
    root, inverse_root = roots(matrix)
    assert root.isfinite().all()
    assert inverse_root.isfinite().all()
    assert difference(root @ inverse_root, eye(12)) < 1e-9
    if situation != "zero":
        assert difference(root @ root, damp(matrix, ROOT_RIDGE)) < 1e-12
        assert difference(root, root.T) < 1e-12


def test_roots_of_a_batch_are_computed_at_the_scale_of_each_matrix():
    batch = torch.stack((moment(4), moment(4, scale=1e-20), moment(4, scale=1e20)))
    root, _ = roots(batch)
    for squared, matrix in zip(root @ root, damp(batch, ROOT_RIDGE), strict=True):
        assert difference(squared, matrix) < 1e-12


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("function", [roots, inverse, require_finite, lambda m: solve(m, m)])
def test_non_finite_moment_raises(function, value):
    matrix = moment()
    matrix[3, 4] = value
    with pytest.raises(NumericalError, match="not finite"):
        function(matrix)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_right_side_raises(value):
    right = normal(12, 2)
    right[3, 1] = value
    with pytest.raises(NumericalError, match="not finite"):
        solve(moment(), right)


def test_damping_is_relative_to_the_mean_diagonal_of_each_matrix():
    batch = torch.stack((eye(3), 4 * eye(3)))
    assert torch.equal(mean_diagonal(batch), torch.tensor([1.0, 4.0], dtype=torch.float64))
    assert torch.allclose(damp(batch, 0.5).diagonal(dim1=-2, dim2=-1)[:, 0], torch.tensor([1.5, 6.0]).double())
    assert torch.equal(add_diagonal(batch, 1.0)[1], 5 * eye(3))
    assert torch.equal(add_diagonal(batch, 1.0)[1].fill_diagonal_(0), torch.zeros(3, 3).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_conversion_to_float64_keeps_the_values(dtype):
    x = normal(5).to(dtype)
    assert to_float64(x).dtype == torch.float64
    assert torch.equal(to_float64(x).to(dtype), x)


class _NoFloat64:
    """Act as a tensor on a device without float64."""

    def __init__(self, message: str) -> None:
        self.message = message

    def to(self, dtype):
        raise TypeError(self.message)

    def cpu(self):
        return normal(2)


def test_device_without_float64_falls_back_to_the_cpu():
    assert torch.equal(to_float64(_NoFloat64("the framework doesn't support float64")), normal(2))
    with pytest.raises(TypeError, match="something else"):
        to_float64(_NoFloat64("something else"))


@pytest.mark.parametrize("width", [1, 5, 64, 200, 256, 333])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_matrix_equals_the_product_at_lower_cost(
    width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psd, "GRAM_WIDTH", 64)
    rows = torch.randn(50, width, generator=torch.Generator().manual_seed(0), dtype=dtype)
    with FlopCounterMode(display=False) as counter:
        found = gram_matrix(rows)
    torch.testing.assert_close(found, rows.T @ rows)
    assert counter.get_total_flops() == 2 * len(rows) * gram_work(width)
    assert width <= 64 or gram_work(width) < 0.8 * width**2
