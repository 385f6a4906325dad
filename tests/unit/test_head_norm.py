"""Test the factors of the rows of a narrow, normalised head."""

from __future__ import annotations

import pytest
import torch
from laws import difference, eye, normal
from torch import Tensor

from optimum_modegpt.decompositions.head_norm import SMALLEST, row_factors

HEADS, TOKENS, DIM = 3, 400, 12
KEPT = torch.tensor([0, 2, 3, 6, 8, 9])  # pairs 0, 2 and 3 of 6
EPS = 0.3


def own(value: Tensor) -> Tensor:
    return value


def selection() -> Tensor:
    return eye(DIM)[KEPT].expand(HEADS, -1, -1)


def divisor(rows: Tensor) -> Tensor:
    """Return the divisor of a norm, (heads, tokens, 1)."""
    return (rows.square().mean(-1, keepdim=True) + EPS).sqrt()


def narrow(vectors: Tensor, maps: Tensor, *, rotated: bool = False, joint: bool = False) -> Tensor:
    """Return the rows of the narrow heads."""
    return vectors @ (row_factors(vectors, maps, own, rotated=rotated, joint=joint)[..., None] * maps).mT


@pytest.mark.parametrize("kind", [{}, {"rotated": True}, {"joint": True}])
def test_divisor_is_exact_if_the_removed_coordinates_are_silent(kind):
    vectors = normal(HEADS, TOKENS, DIM)
    vectors[..., [1, 4, 5, 7, 10, 11]] = 0
    found, expected = narrow(vectors, selection(), **kind), vectors
    if "joint" in kind:  # the mean over all heads
        found, expected = found.transpose(0, 1).flatten(1), expected.transpose(0, 1).flatten(1)
    assert difference(divisor(found), divisor(expected)) < 1e-3


def test_joint_divisor_counts_every_head():
    vectors = normal(HEADS, TOKENS, DIM)
    vectors[:, :, [1, 4, 5, 7, 10, 11]] = torch.tensor([0.5, 1.0, 2.0])[:, None, None] * vectors[:, :, KEPT]
    found, expected = (each.transpose(0, 1).flatten(1) for each in (narrow(vectors, selection(), joint=True), vectors))
    assert difference(divisor(found), divisor(expected)) < 1e-2


def test_divisor_is_exact_if_a_kept_coordinate_shows_the_removed_ones():
    vectors = normal(HEADS, TOKENS, DIM)
    vectors[..., [1, 4, 5, 7, 10, 11]] = vectors[..., 3:4] * normal(6, seed=1)
    assert difference(divisor(narrow(vectors, selection())), divisor(vectors)) < 1e-2


def test_divisor_is_right_on_average_if_nothing_shows_the_removed_coordinates():
    vectors = normal(HEADS, TOKENS, DIM)
    ratio = narrow(vectors, selection()).square().mean(-1) / vectors.square().mean(-1)
    assert float(ratio.mean()) == pytest.approx(1, abs=0.2)


def test_both_coordinates_of_a_pair_have_one_factor_after_a_rotation():
    vectors = normal(HEADS, TOKENS, DIM) * normal(DIM, seed=1).exp()
    first, second = row_factors(vectors, selection(), own, rotated=True, joint=False).chunk(2, dim=1)
    assert torch.equal(first, second)
    first, second = row_factors(vectors, selection(), own, rotated=False, joint=False).chunk(2, dim=1)
    assert difference(first, second) > 0.01


def test_sum_over_ranks_gives_the_factors_of_all_tokens():
    vectors = normal(HEADS, TOKENS, DIM)
    parts, sums = vectors.split(150, dim=1), []
    for part in parts:
        row_factors(part, selection(), lambda value: sums.append(value) or value, rotated=False, joint=False)
    both = iter([sum(sums[0::2]), sum(sums[1::2])])
    shared = row_factors(parts[0], selection(), lambda _: next(both), rotated=False, joint=False)
    assert difference(shared, row_factors(vectors, selection(), own, rotated=False, joint=False)) < 1e-12


def test_factors_are_positive_and_finite():
    vectors = normal(HEADS, TOKENS, DIM)
    vectors[..., 6] = 0  # a kept coordinate
    vectors[..., 5] = 30 / (0.1 + vectors[..., 0].abs())  # kept coordinate 0 is small if the head is long
    vectors[0] = 0  # a silent head
    factors = row_factors(vectors, selection(), own, rotated=False, joint=False)
    assert factors.isfinite().all()
    assert (factors >= 0).all()
    assert (factors[1:] > 0).all()
    assert float(factors[1:].min() / factors[1:].max()) >= SMALLEST


@pytest.mark.parametrize("rotated", [False, True])
def test_shared_factors_are_equal_in_all_heads_and_better_than_none(rotated: bool) -> None:
    vectors = normal(HEADS, TOKENS, DIM) * normal(1, 1, DIM, seed=1).exp()  # the coordinates have different scales
    factors = row_factors(vectors, selection(), own, rotated=rotated, joint=False, shared=True)
    assert torch.equal(factors, factors[:1].expand_as(factors))
    if rotated:
        assert torch.equal(factors[:, :3], factors[:, 3:])
    kept = vectors @ selection().mT
    found, none = divisor(kept * factors[:, None, :]), divisor(kept)
    assert difference(found, divisor(vectors)) < 0.8 * difference(none, divisor(vectors))
    for head in range(HEADS):
        assert difference(found[head], divisor(vectors)[head]) < difference(none[head], divisor(vectors)[head])


def test_shared_factors_of_equal_heads_are_their_own() -> None:
    vectors = normal(1, TOKENS, DIM).expand(HEADS, -1, -1)
    options = {"rotated": False, "joint": False}
    shared = row_factors(vectors, selection(), own, shared=True, **options)
    torch.testing.assert_close(shared, row_factors(vectors, selection(), own, **options))
