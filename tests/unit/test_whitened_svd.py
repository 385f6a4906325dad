"""Test bases without rotary constraints: query/key, and value/output by the paper's joint SVD and by ours."""

from __future__ import annotations

import pytest
import torch
from laws import MOMENTS, difference, eye, moment, normal, subspace_gap, weighted_error
from torch import Tensor

from optimum_modegpt.decompositions.psd import ROOT_RIDGE, damp, roots
from optimum_modegpt.decompositions.whitened_svd import (
    block_diagonal,
    joint_value_output,
    tail_error,
    two_sided_basis,
    two_sided_energies,
    value_basis,
    value_energies,
)
from optimum_modegpt.errors import NumericalError

SITUATIONS = pytest.mark.parametrize("situation", MOMENTS)
D_MODEL, HEAD_DIM, RANK = 20, 6, 3


def damped(matrix: Tensor) -> Tensor:
    return damp(matrix, ROOT_RIDGE)


def tail(matrix: Tensor, rank: int) -> float:
    """Return Σ_{i>rank} σ_i²."""
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum())


# ----------------------------------------------------------------------------------------------------------- query, key


def logit_error(query: Tensor, key: Tensor, product: Tensor) -> float:
    """Return E (qᵀk − qᵀ product k)² over independent q and k, which is ‖C_Q^½ (I − product) C_K^½‖²."""
    gap = eye(len(query)) - product
    return float((gap.T @ query @ gap @ key).trace())


def heads(situation: str, seed: int = 0) -> Tensor:
    return torch.stack([moment(**MOMENTS[situation], seed=seed + group) for group in range(3)])


@SITUATIONS
def test_full_rank_basis_keeps_all_logits(situation):
    query_map, key_map = two_sided_basis(heads("well-posed"), heads(situation, 10), 12)
    assert difference(query_map.mT @ key_map, eye(12).expand(3, -1, -1)) < 1e-7


@SITUATIONS
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_error_of_the_logits_is_the_tail_of_the_singular_values(situation, rank):
    query, key = heads(situation), heads("well-posed", 10)
    query_map, key_map = two_sided_basis(query, key, rank)
    assert query_map.shape == key_map.shape == (3, rank, 12)
    relative, energies = tail_error(query, key, rank), two_sided_energies(query, key)
    for group in range(3):
        q, k = damped(query[group]), damped(key[group])
        total = logit_error(q, k, torch.zeros_like(q))
        error = logit_error(q, k, query_map[group].T @ key_map[group])
        best = tail(roots(query[group])[0] @ roots(key[group])[0], rank)
        assert error == pytest.approx(best, rel=1e-6, abs=1e-10 * total)
        assert float(energies[group, rank:].sum()) == pytest.approx(best, rel=1e-6, abs=1e-10 * total)
        if situation != "zero":
            assert float(relative[group]) == pytest.approx((best / total) ** 0.5, abs=1e-9)


def test_tail_error_matches_explicit_tokens():
    query, key = normal(30, 12), normal(40, 12, seed=1) @ moment(condition=100)
    moments = [(x.T @ x)[None] for x in (query, key)]
    query_map, key_map = two_sided_basis(*moments, 5)
    lost = query @ key.T - (query @ query_map[0].T) @ (key @ key_map[0].T).T
    assert float(lost.norm() / (query @ key.T).norm()) == pytest.approx(float(tail_error(*moments, 5)), rel=1e-4)


def test_nearby_coordinates_have_a_larger_error():
    query, key = heads("well-posed"), heads("well-posed", 10)
    query_map, key_map = two_sided_basis(query, key, 5)
    best = logit_error(query[0], key[0], query_map[0].T @ key_map[0])
    for seed in range(10):
        other = query_map[0] + 1e-2 * normal(5, 12, seed=seed)
        assert logit_error(query[0], key[0], other.T @ key_map[0]) > best


def test_compressed_query_and_key_have_equal_moments():
    query, key = heads("well-posed"), heads("scale 1e20", 10)
    query_map, key_map = two_sided_basis(query, key, 5)
    loudness = [(m @ damped(c) @ m.mT) for m, c in ((query_map, query), (key_map, key))]
    assert difference(*loudness) < 1e-6


def test_zero_heads_have_finite_maps_and_zero_error():
    silent = heads("zero")
    for query, key in ((silent, silent), (silent, heads("well-posed"))):
        assert all(m.isfinite().all() for m in two_sided_basis(query, key, 5))
        assert torch.equal(tail_error(query, key, 5), torch.zeros(3).double())
        assert torch.equal(tail_error(key, query, 5), torch.zeros(3).double())


# --------------------------------------------------------------------------------------------- value, output: the paper


def projections(per_group: int = 1, *, situation: str = "well-posed", seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return C (d_model, d_model), W_V (d_model, d) and the concatenated outputs of the heads (d, heads · d_model)."""
    arguments = MOMENTS[situation]
    return (
        moment(D_MODEL, **arguments, seed=seed),
        normal(D_MODEL, HEAD_DIM, seed=seed + 1),
        normal(HEAD_DIM, per_group * D_MODEL, seed=seed + 2),
    )


def test_one_head_matches_the_svd_of_the_paper_in_the_model_dimension():
    second_moment, value, output = projections()
    values, vectors = torch.linalg.eigh(second_moment)
    root, inverse_root = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    left, singular, right = torch.linalg.svd(root @ value, full_matrices=False)
    joint_left, joint, joint_right = torch.linalg.svd(singular[:, None] * right @ output, full_matrices=False)
    paper_value, paper_output = inverse_root @ left @ joint_left[:, :RANK], joint[:RANK, None] * joint_right[:RANK]
    basis, new_output = joint_value_output(value.T @ second_moment @ value, output, RANK)
    signs = ((value @ basis) * paper_value).sum(0).sign()
    assert difference(value @ basis * signs, paper_value) < 1e-8
    assert difference(new_output * signs[:, None], paper_output) < 1e-8


@SITUATIONS
@pytest.mark.parametrize("per_group", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, RANK, HEAD_DIM])
def test_error_of_the_group_is_the_tail_of_its_joint_singular_values(situation, per_group, rank):
    second_moment, value, output = projections(per_group, situation=situation)
    basis, new_output = joint_value_output(value.T @ second_moment @ value, output, rank)
    assert basis.isfinite().all()
    values, vectors = torch.linalg.eigh(second_moment)
    root = vectors * values.clamp_min(0).sqrt()
    total = tail(root.T @ value @ output, 0)
    error = weighted_error(second_moment, value @ (output - basis @ new_output))
    assert error == pytest.approx(tail(root.T @ value @ output, rank), rel=1e-6, abs=1e-12 * total)


def test_joint_basis_is_better_than_random_bases_and_the_basis_of_the_values():
    second_moment, value, output = projections(2)
    values = value.T @ second_moment @ value
    basis, new_output = joint_value_output(values, output, RANK)

    def best_error(candidate: Tensor) -> float:
        refit = torch.linalg.solve(candidate.T @ values @ candidate, candidate.T @ values @ output)
        return weighted_error(values, output - candidate @ refit)

    joint = weighted_error(values, output - basis @ new_output)
    assert joint == pytest.approx(best_error(basis))
    leading = torch.linalg.eigh(values).eigenvectors[:, -RANK:]
    for other in (leading, *(normal(HEAD_DIM, RANK, seed=seed) for seed in range(10))):
        assert best_error(other) > 1.01 * joint


def test_removing_dead_value_directions_changes_no_output():
    second_moment, value, output = projections()
    value[:, [1, 4]] = 0
    basis, new_output = joint_value_output(value.T @ second_moment @ value, output, 4)
    assert difference(value @ basis @ new_output, value @ output) < 1e-8


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_directions_without_tokens_do_not_give_large_weights(tokens):
    vectors, output = normal(tokens, HEAD_DIM), normal(HEAD_DIM, D_MODEL, seed=1)
    basis, new_output = joint_value_output(vectors.T @ vectors, output, 5)
    assert difference(vectors @ basis @ new_output, vectors @ output) < 1e-9
    assert basis.abs().max() < 100
    assert new_output.abs().max() < 100


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_raise(value):
    with pytest.raises(NumericalError, match="not finite"):
        joint_value_output(torch.full((HEAD_DIM, HEAD_DIM), value).double(), normal(HEAD_DIM, D_MODEL), RANK)


# ------------------------------------------------------------------------------------------------- value, output: ours


def refitted_error(inputs: Tensor, output: Tensor, basis: Tensor) -> float:
    """Return the error after the output is solved again on the basis."""
    refit = torch.linalg.solve(basis.T @ inputs @ basis, basis.T @ inputs @ output)
    return weighted_error(inputs, output - basis @ refit)


@pytest.mark.parametrize("situation", ["well-posed", "singular", "scale 1e-20", "scale 1e20"])
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_error_of_the_basis_of_one_head_is_the_tail_of_the_singular_values(situation, rank):
    inputs, output = damped(moment(**MOMENTS[situation])), normal(12, D_MODEL)
    basis = value_basis(moment(**MOMENTS[situation]), output, rank)
    root = roots(moment(**MOMENTS[situation]))[0]
    total = tail(root @ output, 0)
    lost = tail(root @ output, rank)
    assert refitted_error(inputs, output, basis) == pytest.approx(lost, rel=1e-6, abs=1e-9 * total)
    energies = value_energies(moment(**MOMENTS[situation]), output)
    assert float(energies[rank:].sum()) == pytest.approx(lost, rel=1e-6, abs=1e-9 * total)
    if rank == 12:
        assert refitted_error(inputs, output, basis) < 1e-9 * total


def test_basis_is_orthonormal_at_any_scale():
    for scale in (1.0, 1e-12):
        basis = value_basis(scale * moment(), normal(12, D_MODEL), 4)
        assert difference(basis.T @ basis, eye(4)) < 1e-9


def test_other_bases_of_one_head_have_a_larger_error():
    inputs, output = moment(condition=1e3), normal(12, D_MODEL)
    best = refitted_error(inputs, output, value_basis(inputs, output, 4))
    for seed in range(10):
        assert refitted_error(inputs, output, normal(12, 4, seed=seed)) > best
        nudged = value_basis(inputs, output, 4) + 1e-2 * normal(12, 4, seed=seed)
        assert refitted_error(inputs, output, nudged) > best


@pytest.mark.parametrize("situation", MOMENTS)
def test_basis_of_any_moment_is_finite(situation):
    basis = value_basis(moment(**MOMENTS[situation]), normal(12, D_MODEL), 4)
    assert basis.isfinite().all()
    assert torch.linalg.pinv(basis).isfinite().all()


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_scale_of_moments_and_weights_does_not_change_the_basis(scale):
    expected = value_basis(moment(), normal(12, D_MODEL), 4)
    assert subspace_gap(value_basis(scale * moment(), normal(12, D_MODEL), 4), expected) < 1e-7
    assert subspace_gap(value_basis(moment(), scale * normal(12, D_MODEL), 4), expected) < 1e-7


def test_block_diagonal_repeats_each_group_and_keeps_the_constant():
    bases = torch.stack((torch.full((2, 1), 1.0), torch.full((2, 1), 2.0))).double()
    expected = torch.zeros(9, 5).double()
    for head, value in enumerate((1.0, 1.0, 2.0, 2.0)):
        expected[2 * head : 2 * head + 2, head] = value
    expected[8, 4] = 1
    assert torch.equal(block_diagonal(bases, 2, ones=True), expected)
    assert torch.equal(block_diagonal(bases, 2, ones=False), expected[:8, :4])
