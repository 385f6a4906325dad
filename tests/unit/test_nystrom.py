"""Test the choice of MLP channels: ridge leverage and Nyström refit of the paper, backward elimination."""

from __future__ import annotations

import warnings

import pytest
import torch
from laws import MOMENTS, difference, eye, linear_moments, moment, normal, weighted_error
from torch import Tensor

from optimum_modegpt.decompositions.least_squares import centred_refit
from optimum_modegpt.decompositions.nystrom import (
    eliminate_rows,
    nystrom_refit,
    remaining,
    ridge_leverage,
    select_by_leverage,
)
from optimum_modegpt.decompositions.psd import damp, inverse
from optimum_modegpt.errors import IllConditionedWarning

SITUATIONS = pytest.mark.parametrize("situation", MOMENTS)


# ------------------------------------------------------------------------------------------------------------- leverage


@SITUATIONS
@pytest.mark.parametrize("ridge", [1e-2, 1.0, 100.0])
def test_leverage_is_between_zero_and_one_and_sums_to_the_effective_dimension(situation, ridge):
    matrix = moment(**MOMENTS[situation])
    leverage = ridge_leverage(matrix, ridge)
    assert leverage.min() >= -1e-12
    assert leverage.max() <= 1
    values, damping = torch.linalg.eigvalsh(matrix).clamp_min(0), ridge * matrix.trace() / 12
    effective = (values / (values + damping)).nan_to_num().sum()
    assert float(leverage.sum()) == pytest.approx(float(effective), rel=1e-9, abs=1e-9)


def test_leverage_matches_the_explicit_formula():
    matrix, ridge = moment(), 0.3
    damping = ridge * matrix.trace() / 12
    direct = (matrix @ torch.linalg.inv(matrix + damping * eye(12))).diagonal()
    assert difference(ridge_leverage(matrix, ridge), direct) < 1e-12


def test_channels_with_the_largest_inputs_are_kept_in_order():
    inputs = normal(40, 6) * torch.tensor([0.0, 3.0, 0.1, 2.0, 0.0, 1.0])
    assert select_by_leverage(inputs.T @ inputs, 3, ridge=1e-2).tolist() == [1, 3, 5]
    assert select_by_leverage(inputs.T @ inputs, 4, ridge=1e-2).tolist() == [1, 2, 3, 5]


@SITUATIONS
def test_full_rank_keeps_all_channels_and_weights(situation):
    matrix, down = moment(**MOMENTS[situation]), normal(12, 3)
    kept = select_by_leverage(matrix, 12, ridge=1e-2)
    assert kept.tolist() == list(range(12))
    refitted = nystrom_refit(matrix, kept, down)
    assert refitted.isfinite().all()
    assert weighted_error(matrix, refitted - down) <= 1e-8 * weighted_error(matrix, down)


def test_refit_is_exact_if_pruned_channels_are_combinations_of_kept_ones():
    inputs, kept = normal(40, 8), torch.tensor([0, 3, 4])
    inputs[:, [1, 2, 5, 6, 7]] = inputs[:, kept] @ normal(3, 5, seed=1)
    down = normal(8, 4, seed=2)
    refitted = nystrom_refit(inputs.T @ inputs, kept, down)
    assert difference(inputs[:, kept] @ refitted, inputs @ down) < 1e-6


def test_refit_is_the_least_squares_solution_for_the_output():
    inputs, kept, down = normal(40, 8), torch.tensor([0, 3, 4]), normal(8, 4, seed=2)
    best = torch.linalg.lstsq(inputs[:, kept], inputs @ down).solution
    assert difference(nystrom_refit(inputs.T @ inputs, kept, down), best) < 1e-6


def test_pruning_zero_channels_changes_no_output():
    inputs, down = torch.zeros(40, 8).double(), normal(8, 4, seed=2)
    inputs[:, [1, 2, 6]] = normal(40, 3)
    matrix = inputs.T @ inputs
    kept = select_by_leverage(matrix, 3, ridge=1e-2)
    assert difference(inputs[:, kept] @ nystrom_refit(matrix, kept, down), inputs @ down) < 1e-6


def test_mlp_with_zero_inputs_gets_finite_weights():
    matrix = moment(rank=0)
    kept = select_by_leverage(matrix, 5, ridge=1e-2)
    assert len(set(kept.tolist())) == 5
    assert torch.equal(nystrom_refit(matrix, kept, normal(12, 3)), torch.zeros(5, 3).double())


# ---------------------------------------------------------------------------------------------------------- elimination


def problem(width: int = 10, out: int = 3, *, seed: int = 0, ones: bool = False) -> tuple[Tensor, Tensor]:
    """Return a damped moment of correlated inputs and its least-squares weights."""
    mixing = eye(width) + 0.4 * normal(width, width, seed=seed + 1)
    inputs = normal(60, width, seed=seed) @ mixing
    moments = linear_moments(inputs, inputs @ normal(width, out, seed=seed + 2) + normal(60, out, seed=seed + 3) + ones)
    if ones:
        moments = linear_moments(inputs, inputs @ normal(width, out, seed=seed + 2) + 1, ones=True)
    hessian = moments.gram + moments.ridge(1e-4) * eye(len(moments.gram))
    return hessian, torch.linalg.solve(hessian, moments.cross)


def refitted_error(hessian: Tensor, weight: Tensor, kept: list[int]) -> float:
    """Return the increase of the quadratic form if only the rows `kept` remain, with their weights solved again."""
    best = torch.zeros_like(weight)
    best[kept] = torch.linalg.solve(hessian[kept][:, kept], (hessian @ weight)[kept])
    return weighted_error(hessian, best - weight)


def eliminate(hessian: Tensor, weight: Tensor, rank: int, *, protected: int = 0, rounds: int = 64) -> Tensor:
    """Return the `rank` remaining rows in increasing order."""
    width = len(hessian) - protected
    found = eliminate_rows(inverse(hessian), weight.clone(), width - rank, protected=protected, rounds=rounds)
    return remaining(found.order, width)


def greedy(hessian: Tensor, weight: Tensor, rank: int, *, protected: int = 0, rounds: int = 10**6) -> list[int]:
    """Eliminate backwards by solving every trial from scratch, with the same chunks as `eliminate`."""
    width = len(hessian) - protected
    everything, gone = set(range(len(hessian))), set()
    chunk = max(1, (width - rank) // rounds)

    def cost(row: int) -> float:
        return refitted_error(hessian, weight, sorted(everything - gone - {row}))

    while (excess := width - len(gone) - rank) > 0:
        candidates = sorted(set(range(width)) - gone, key=cost)[: 4 * chunk]
        for _ in range(min(chunk, excess)):
            gone.add(min(set(candidates) - gone, key=cost))
    return sorted(set(range(width)) - gone)


@pytest.mark.parametrize("seed", range(4))
def test_removing_one_by_one_matches_greedy_elimination(seed):
    hessian, weight = problem(seed=10 * seed)
    for rank in (7, 4, 1):
        assert eliminate(hessian, weight, rank).tolist() == greedy(hessian, weight, rank)


@pytest.mark.parametrize("seed", range(3))
def test_removing_in_chunks_matches_greedy_elimination(seed):
    hessian, weight = problem(18, seed=10 * seed)
    assert eliminate(hessian, weight, 4, rounds=4).tolist() == greedy(hessian, weight, 4, rounds=4)


@pytest.mark.parametrize("rounds", [1, 4, 64])
@pytest.mark.parametrize("ones", [False, True])
def test_costs_sum_to_the_increase_of_the_error_after_every_removal(rounds, ones):
    hessian, weight = problem(14, ones=ones)
    found = eliminate_rows(inverse(hessian), weight.clone(), 11, protected=int(ones), rounds=rounds)
    assert len(found.order) == len(found.costs) == 11
    for removed in range(1, 12):
        kept = sorted(set(range(len(hessian))) - set(found.order[:removed].tolist()))
        assert float(found.costs[:removed].sum()) == pytest.approx(refitted_error(hessian, weight, kept), rel=1e-8)


@pytest.mark.parametrize("rounds", [3, 64])
def test_constant_input_is_never_removed(rounds):
    hessian, weight = problem(ones=True)
    kept = eliminate(hessian, weight, 4, protected=1, rounds=rounds).tolist()
    assert kept == greedy(hessian, weight, 4, protected=1, rounds=rounds)
    assert len(kept) == 4
    assert max(kept) < 10


def test_cost_of_a_row_includes_the_protected_row():
    inputs = normal(200, 3) * torch.tensor([0.2, 1.0, 1.0])
    inputs[:, 0] += 1  # the constant explains most of it
    moments = linear_moments(inputs, inputs @ torch.ones(3, 1).double(), ones=True)
    hessian = moments.gram + moments.ridge(1e-9) * eye(4)
    weight = torch.linalg.solve(hessian, moments.cross)
    assert eliminate(hessian, weight, 2, protected=1).tolist() == [1, 2]


@pytest.mark.parametrize("rounds", [1, 2, 64])
def test_one_of_two_identical_channels_is_removed(rounds):
    inputs, target = normal(80, 6).repeat(1, 2), normal(80, 3, seed=1)
    moments = linear_moments(inputs, target)
    hessian = moments.gram + moments.ridge(1e-6) * eye(12)
    dense = torch.zeros(12, 3).double()
    weight = torch.linalg.solve(hessian, moments.cross)
    kept = eliminate(hessian, weight, 6, rounds=rounds)
    assert sorted(index % 6 for index in kept.tolist()) == list(range(6))
    ridge, small = moments.ridge(1e-6), moments.kept(kept)
    before = moments.relative_error(centred_refit(moments, dense, ridge))
    after = small.relative_error(centred_refit(small, dense[kept], ridge))
    assert after == pytest.approx(before, abs=1e-6)


@pytest.mark.parametrize("rounds", [1, 3, 64])
def test_order_of_the_channels_does_not_matter(rounds):
    hessian, weight = problem(16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    kept = eliminate(hessian[order][:, order], weight[order], 5, rounds=rounds)
    assert sorted(order[kept].tolist()) == eliminate(hessian, weight, 5, rounds=rounds).tolist()


@pytest.mark.parametrize("rounds", [1, 64])
def test_dead_channels_are_removed_first(rounds):
    inputs = normal(80, 10)
    inputs[:, [0, 4, 7]] = 0
    moments, dense = linear_moments(inputs, normal(80, 3, seed=1)), normal(10, 3, seed=2)
    hessian = moments.gram + moments.ridge(1e-4) * eye(10)
    weight = centred_refit(moments, dense, moments.ridge(1e-4))
    assert eliminate(hessian, weight, 7, rounds=rounds).tolist() == [1, 2, 3, 5, 6, 8, 9]


@pytest.mark.parametrize("rounds", [1, 2, 5, 64])
def test_chunks_do_not_change_an_easy_choice(rounds):
    weight = normal(20, 3)
    weight[::2] *= 1e-3
    assert eliminate(moment(20), weight, 10, rounds=rounds).tolist() == list(range(1, 20, 2))


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_scale_of_moments_and_weights_does_not_matter(scale):
    hessian, weight = problem(16)
    expected = eliminate(hessian, weight, 5).tolist()
    assert eliminate(scale * hessian, weight, 5).tolist() == expected
    assert eliminate(hessian, scale * weight, 5).tolist() == expected


@pytest.mark.parametrize("situation", MOMENTS)
def test_every_damped_moment_gives_the_requested_number_of_channels(situation):
    hessian = damp(moment(**MOMENTS[situation]), 1e-4)
    for rank in (12, 11, 5, 1):
        kept = eliminate(hessian, normal(12, 3), rank, rounds=3).tolist()
        assert len(set(kept)) == rank
        assert kept == sorted(kept)


def test_arguments_are_not_modified():
    hessian, weight = problem()
    copies = hessian.clone(), weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error", IllConditionedWarning)
        eliminate(hessian, weight, 3)
    assert torch.equal(hessian, copies[0])
    assert torch.equal(weight, copies[1])
