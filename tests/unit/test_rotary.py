"""Test rotary pairs of query and key: the selection, and the refit of the query."""

from __future__ import annotations

import pytest
import torch
from laws import MOMENTS, difference, eye, moment, normal, rotary_angles, turned
from torch import Tensor

from optimum_modegpt.decompositions.psd import ROOT_RIDGE, damp
from optimum_modegpt.decompositions.rotary import (
    eliminate_pairs,
    eliminate_pairs_alone,
    pair_indices,
    query_refit,
    select_coordinates,
    select_pairs,
    shared_order,
)

GROUPS, HEAD_DIM = 3, 12
PAIRS = HEAD_DIM // 2


def head_moments(seed: int = 0, situation: str = "well-posed") -> Tensor:
    """Return a moment per group, (groups, d, d), with coordinates of different scale."""
    result = []
    for group in range(GROUPS):
        loudness = normal(HEAD_DIM, seed=seed + 100 + group).exp().diag()
        result.append(loudness @ moment(HEAD_DIM, **MOMENTS[situation], seed=seed + group) @ loudness)
    return torch.stack(result)


def refit_error(metric: Tensor, query: Tensor, mapping: Tensor, kept: Tensor) -> float:
    """Return the loss in the metric: E (q − q̂)ᵀ F (q − q̂), with q̂ the mapped query on the kept coordinates."""
    gap = eye(len(query))
    gap[kept] -= mapping
    return float((metric * (gap @ query @ gap.T)).sum())


def complement(kept: Tensor) -> list[int]:
    return sorted(set(range(HEAD_DIM)) - set(kept.tolist()))


# ------------------------------------------------------------------------------------------------------------ selection


def test_pairs_are_first_halves_then_second_halves():
    assert pair_indices(torch.tensor([[0, 2], [1, 3]]), 8).tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_loudest_pairs_of_each_group_are_kept():
    query, key = head_moments(0), head_moments(50)
    score = [
        [(q[i, i] + q[i + PAIRS, i + PAIRS]) * (k[i, i] + k[i + PAIRS, i + PAIRS]) for i in range(PAIRS)]
        for q, k in zip(query, key, strict=True)
    ]
    expected = [sorted(sorted(range(PAIRS), key=lambda i, row=row: -row[i])[:3]) for row in score]
    assert select_pairs(query, key, 3).tolist() == expected
    assert expected[0] != expected[1]


@pytest.mark.parametrize("count", [1, 3, PAIRS])
def test_pairs_are_valid_and_increase(count):
    for pairs in (
        select_pairs(head_moments(0), head_moments(50), count),
        eliminate_pairs(head_moments(0), head_moments(50), count).after(count)[0],
    ):
        assert pairs.shape == (GROUPS, count)
        assert pairs.min() >= 0
        assert pairs.max() < PAIRS
        assert (pairs.diff(dim=1) > 0).all()


def test_rotation_by_position_changes_no_choice():
    length = 20
    query, key = (
        (normal(GROUPS, length, HEAD_DIM, seed=seed) * normal(GROUPS, 1, HEAD_DIM, seed=seed + 1).exp())
        for seed in (0, 5)
    )
    angles = rotary_angles(length, HEAD_DIM)
    before = select_pairs(query.mT @ query, key.mT @ key, 3)
    query, key = turned(query, angles), turned(key, angles)
    assert difference(query.mT @ query, key.mT @ key) > 0.1
    assert torch.equal(select_pairs(query.mT @ query, key.mT @ key, 3), before)


def test_without_rotation_coordinates_are_chosen_alone():
    query, key = torch.ones(1, 6).double(), torch.tensor([[5.0, 1.0, 4.0, 2.0, 6.0, 3.0]]).double()
    assert select_coordinates(query.diag_embed(), key.diag_embed(), 3).tolist() == [[0, 2, 4]]
    loud = torch.tensor([[1.0, 9.0, 1.0, 9.0, 1.0, 9.0]]).double()
    assert select_coordinates(loud.diag_embed(), key.diag_embed(), 3).tolist() == [[1, 3, 5]]


# ---------------------------------------------------------------------------------------------------------- elimination


def explicit_error(metric: Tensor, query: Tensor, kept: Tensor) -> float:
    """Compute tr(C_pp (F_pp − F_pk F_kk⁻¹ F_kp)) of the damped metric, for kept coordinates."""
    kept, metric, pruned = kept.tolist(), damp(metric, ROOT_RIDGE), complement(kept)
    across = metric[kept][:, pruned]
    schur = metric[pruned][:, pruned] - across.T @ torch.linalg.inv(metric[kept][:, kept]) @ across
    return float((query[pruned][:, pruned] @ schur).trace())


@pytest.mark.parametrize("situation", ["well-posed", "singular", "scale 1e-20", "scale 1e20"])
@pytest.mark.parametrize("count", [4, 2, 1])
def test_elimination_is_greedy_with_the_error_of_the_formula(situation, count):
    metric, query = head_moments(0, situation), head_moments(50)
    kept, errors = eliminate_pairs(metric, query, count).after(count)
    for group in range(GROUPS):
        pairs = list(range(PAIRS))
        while len(pairs) > count:

            def trial(gone: int, group: int = group, pairs: list[int] = pairs) -> float:
                left = torch.tensor([pair for pair in pairs if pair != gone])
                return explicit_error(metric[group], query[group], pair_indices(left, HEAD_DIM))

            pairs = [pair for pair in pairs if pair != min(pairs, key=trial)]
        assert kept[group].tolist() == pairs
        expected = explicit_error(metric[group], query[group], pair_indices(kept[group], HEAD_DIM))
        assert float(errors[group]) == pytest.approx(expected, rel=1e-6)


def test_error_is_the_loss_of_the_refitted_query():
    metric, query = head_moments(0), head_moments(50)
    kept, errors = eliminate_pairs(metric, query, 3).after(3)
    damped = damp(metric, ROOT_RIDGE)
    for group, mapping in enumerate(query_refit(damped, kept, ridge=1e-14)):
        index = pair_indices(kept[group], HEAD_DIM)
        assert refit_error(damped[group], query[group], mapping, index) == pytest.approx(float(errors[group]))


def test_pairs_without_a_refit_cost_their_own_part_of_the_query():
    metric, query = head_moments(0), head_moments(50)
    kept, errors = eliminate_pairs_alone(metric, query, 3).after(3)
    assert (kept.diff(dim=1) > 0).all()
    for group in range(GROUPS):
        index = pair_indices(kept[group], HEAD_DIM)
        expected = refit_error(metric[group], query[group], eye(HEAD_DIM)[index], index)
        assert float(errors[group]) == pytest.approx(expected)
        for pair in range(PAIRS):  # the first one is the cheapest
            other = pair_indices(torch.tensor([p for p in range(PAIRS) if p != pair]), HEAD_DIM)
            single = refit_error(metric[group], query[group], eye(HEAD_DIM)[other], other)
            assert single >= float(eliminate_pairs_alone(metric, query, PAIRS - 1).costs[group, 0])


def test_keeping_every_pair_costs_nothing_and_changes_nothing():
    kept, errors = eliminate_pairs(head_moments(0), head_moments(50), PAIRS).after(PAIRS)
    assert kept.tolist() == [list(range(PAIRS))] * GROUPS
    assert torch.equal(errors, torch.zeros(GROUPS).double())
    mapping = query_refit(head_moments(0), kept, ridge=1e-3)
    assert torch.equal(mapping, eye(HEAD_DIM).expand(GROUPS, -1, -1))


def test_pairs_that_the_metric_ignores_are_pruned_for_nothing():
    metric, query = head_moments(0), head_moments(50)
    silent = pair_indices(torch.tensor([1, 4]), HEAD_DIM)
    metric[1, silent], metric[1, :, silent] = 0, 0
    kept, errors = eliminate_pairs(metric, query, PAIRS - 2).after(PAIRS - 2)
    assert kept[1].tolist() == [0, 2, 3, 5]
    assert errors[1] < 1e-5 * (metric[1] * query[1]).sum().abs()
    assert errors[0] > 1e-5 * (metric[0] * query[0]).sum().abs()


def test_pairs_that_no_query_reads_are_pruned_for_nothing():
    metric, query = head_moments(0), head_moments(50)
    silent = pair_indices(torch.tensor([0, 3]), HEAD_DIM)
    query[2, silent], query[2, :, silent] = 0, 0
    kept, errors = eliminate_pairs(metric, query, PAIRS - 2).after(PAIRS - 2)
    assert kept[2].tolist() == [1, 2, 4, 5]
    assert errors[2] == 0


@pytest.mark.parametrize("situation", MOMENTS)
def test_any_metric_gives_pairs_and_a_finite_refit(situation):
    metric = head_moments(0, situation)
    kept, errors = eliminate_pairs(metric, head_moments(50), 2).after(2)
    assert errors.isfinite().all()
    assert (kept.diff(dim=1) > 0).all()
    assert query_refit(metric, kept, ridge=1e-3).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------- refit


def test_refit_is_exact_where_pruned_keys_are_combinations_of_kept_ones():
    pairs = torch.tensor([[0, 2, 5]])
    kept = pair_indices(pairs, HEAD_DIM)[0]
    keys, query = torch.zeros(60, HEAD_DIM).double(), normal(10, HEAD_DIM, seed=1)
    keys[:, kept] = normal(60, 6)
    keys[:, complement(kept)] = keys[:, kept] @ normal(6, 6, seed=2)
    metric = (keys.T @ keys)[None]
    mapping = query_refit(metric, pairs, ridge=1e-13)[0]
    assert difference((query @ mapping.T) @ keys[:, kept].T, query @ keys.T) < 1e-10
    assert (
        refit_error(metric[0], query.T @ query, mapping, kept)
        < 1e-18 * float((metric[0] * (query.T @ query)).sum().abs()) + 1e-9
    )


def test_refit_is_exact_up_to_a_constant_in_each_row():
    pairs = torch.tensor([[1, 3, 4]])
    kept = pair_indices(pairs, HEAD_DIM)[0]
    keys, query = torch.zeros(60, HEAD_DIM).double(), normal(10, HEAD_DIM, seed=1)
    keys[:, kept] = normal(60, 6)
    # The pruned coordinates also have a constant, which does not change the softmax.
    keys[:, complement(kept)] = keys[:, kept] @ normal(6, 6, seed=2) + normal(1, 6, seed=3)
    centred = keys - keys.mean(0)
    mapping = query_refit((centred.T @ centred)[None], pairs, ridge=1e-13)[0]
    gap = (query @ mapping.T) @ keys[:, kept].T - query @ keys.T
    assert difference(gap, gap.mean(1, keepdim=True).expand_as(gap)) < 1e-9
    assert gap.abs().mean() > 0.1


def test_no_other_map_of_the_query_loses_less():
    metric, query, pairs = head_moments(0)[:1], head_moments(50)[0], torch.tensor([[0, 3]])
    kept, mapping = pair_indices(pairs, HEAD_DIM)[0], query_refit(metric, pairs, ridge=1e-13)[0]
    best = refit_error(metric[0], query, mapping, kept)
    for seed in range(10):
        other = mapping + 1e-2 * normal(*mapping.shape, seed=seed)
        assert refit_error(metric[0], query, other, kept) > best
    assert best < refit_error(metric[0], query, eye(HEAD_DIM)[kept], kept)


def test_large_ridge_leaves_the_kept_query_rows_alone():
    metric, pairs = head_moments(0), torch.tensor([[0, 3]] * GROUPS)
    mapping = query_refit(metric, pairs, ridge=1e12)
    assert difference(mapping, eye(HEAD_DIM)[pair_indices(pairs, HEAD_DIM)]) < 1e-9


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_scale_of_the_moments_does_not_matter(scale):
    metric, query = head_moments(0), head_moments(50)
    kept, errors = eliminate_pairs(metric, query, 3).after(3)
    scaled_kept, scaled_errors = eliminate_pairs(scale * metric, scale * query, 3).after(3)
    assert torch.equal(scaled_kept, kept)
    assert difference(scaled_errors, scale * scale * errors) < 1e-9
    assert difference(query_refit(scale * metric, kept, ridge=1e-3), query_refit(metric, kept, ridge=1e-3)) < 1e-9


# --------------------------------------------------------------------------------------------------------- shared pairs


ELIMINATIONS = pytest.mark.parametrize("eliminate", [eliminate_pairs, eliminate_pairs_alone])


@ELIMINATIONS
def test_one_group_shares_its_pairs_with_itself(eliminate):
    metric, query = head_moments(0)[:1], head_moments(50)[:1]
    own, shared = eliminate(metric, query, 1), eliminate(metric, query, 1, shared=True)
    assert torch.equal(shared.order, own.order)
    assert torch.equal(shared.costs, own.costs)


@ELIMINATIONS
def test_a_given_order_has_the_costs_of_the_same_choice(eliminate):
    metric, query = head_moments(0), head_moments(50)
    for shared in (False, True):
        chosen = eliminate(metric, query, 1, shared=shared)
        given = eliminate(metric, query, 1, order=chosen.order)
        assert torch.equal(given.order, chosen.order)
        torch.testing.assert_close(given.costs, chosen.costs)


@pytest.mark.parametrize("refit", [True, False])
def test_all_groups_lose_the_pair_of_least_total_cost(refit):
    metric, query = head_moments(0), head_moments(50)
    eliminate = eliminate_pairs if refit else eliminate_pairs_alone
    found = eliminate(metric, query, PAIRS - 2, shared=True)
    assert (found.order == found.order[:1]).all()
    assert len(set(eliminate(metric, query, PAIRS - 1).order.flatten().tolist())) > 1, "the groups would agree anyway"
    gone: list[int] = []
    for step in range(2):
        totals = []
        for pair in range(PAIRS):
            if pair in gone:
                totals.append(float("inf"))
                continue
            kept = pair_indices(torch.tensor([each for each in range(PAIRS) if each not in (*gone, pair)]), HEAD_DIM)
            total = 0.0
            for own, moments in zip(metric, query, strict=True):
                damped = damp(own[None], ROOT_RIDGE)[0]
                pairs = kept[: len(kept) // 2][None]
                mapping = query_refit(damped[None], pairs, ridge=0.0)[0] if refit else eye(HEAD_DIM)[kept]
                total += refit_error(damped if refit else own, moments, mapping, kept)
            totals.append(total)
        gone.append(min(range(PAIRS), key=totals.__getitem__))
        assert found.order[0, : step + 1].tolist() == gone
        assert float(found.costs[:, : step + 1].sum()) == pytest.approx(totals[gone[-1]], rel=1e-6)


def test_a_loud_group_does_not_choose_the_shared_pairs_alone():
    query, key = head_moments(0), head_moments(50)
    louder = torch.tensor([1e6, 1.0, 1.0], dtype=query.dtype)[:, None, None]
    assert torch.equal(shared_order(louder * query, key), shared_order(query, key))
    one = slice(0, 1)
    assert torch.equal(shared_order(query[one], key[one])[-3:].sort().values, select_pairs(query[one], key[one], 3)[0])
