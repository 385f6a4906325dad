"""Test the curvature of the attention distribution, against loops over tokens and against divergences."""

from __future__ import annotations

import pytest
import torch
from laws import HEADS, attention_block, difference, normal, rotary_angles, rotary_tables, turned
from torch import Tensor

from optimum_modegpt.calibration.moments import AttentionCurvatureSum, HeadMomentSum

BATCH, LENGTH, HEAD_DIM = 2, 11, 6


def vectors(heads: int, seed: int = 0) -> Tensor:
    return normal(BATCH, LENGTH, heads, HEAD_DIM, seed=seed)


def arguments():
    return {"position_embeddings": rotary_tables(LENGTH, HEAD_DIM)}


def row(query: Tensor, keys: Tensor, t: int, window: int | None) -> tuple[Tensor, Tensor]:
    """Return the probabilities (s,) of query `t`, and the keys (s, d) rotated into its frame; keys (length, d)."""
    first = 0 if window is None else max(0, t - window + 1)
    angles = rotary_angles(LENGTH, HEAD_DIM)
    z = torch.stack([turned(keys[s], angles[s] - angles[t]) for s in range(first, t + 1)])
    return (z @ query * HEAD_DIM**-0.5).softmax(0), z


def scatter(probabilities: Tensor, z: Tensor) -> Tensor:
    """Compute Σ_s p (z − μ)(z − μ)ᵀ."""
    centred = z - probabilities @ z
    return (probabilities[:, None] * centred).T @ centred


def direct(query: Tensor, key: Tensor, *, stride: int, window: int | None) -> Tensor:
    """Compute F of every key-value group, one query row at a time."""
    heads, kv_heads = query.shape[2], key.shape[2]
    total = torch.zeros(kv_heads, HEAD_DIM, HEAD_DIM).double()
    rows = range(stride - 1, LENGTH, stride) if stride <= LENGTH else [LENGTH - 1]
    for batch in range(len(query)):
        for head in range(heads):
            group = head // (heads // kv_heads)
            for t in rows:
                total[group] += scatter(*row(query[batch, t, head], key[batch, :, group], t, window))
    return total


@pytest.mark.parametrize("heads", HEADS.values(), ids=list(HEADS))
@pytest.mark.parametrize(("stride", "window"), [(1, None), (4, None), (1, 3), (3, 5), (1, 1), (100, None)])
def test_every_row_counts_as_in_the_definition(heads, stride, window):
    query, key = vectors(heads[0]), vectors(heads[1], seed=1)
    total = AttentionCurvatureSum(attention_block(HEAD_DIM, window), stride=stride)
    total.add(query, key, arguments())
    expected = direct(query, key, stride=stride, window=window)
    assert total.value().dtype == torch.float64
    if window == 1:  # one visible key: nothing to distribute
        assert total.value().abs().max() < 1e-4
    else:
        assert difference(total.value(), expected) < 1e-5


def test_batches_add_up():
    query, key = vectors(4), vectors(2, seed=1)
    together, apart = (AttentionCurvatureSum(attention_block(HEAD_DIM)) for _ in range(2))
    together.add(query, key, arguments())
    for index in range(BATCH):
        apart.add(query[index : index + 1], key[index : index + 1], arguments())
    assert difference(apart.value(), together.value()) < 1e-6


def test_curvature_is_unmoved_by_a_key_that_all_positions_share():
    query, key = torch.zeros(BATCH, LENGTH, 2, HEAD_DIM).double(), vectors(1, seed=1)
    shared = turned(normal(HEAD_DIM, seed=2).expand(LENGTH, -1), -rotary_angles(LENGTH, HEAD_DIM))[None, :, None]
    before, after = (AttentionCurvatureSum(attention_block(HEAD_DIM)) for _ in range(2))
    before.add(query, key, arguments())
    after.add(query, key + shared, arguments())
    assert difference(after.value(), before.value()) < 1e-5


def test_divergence_of_a_softmax_row_is_the_quadratic_form_to_second_order():
    query, keys, change = normal(HEAD_DIM), vectors(1, seed=1)[0, :, 0], normal(HEAD_DIM, seed=2)
    p, z = row(query, keys, LENGTH - 1, None)
    form = 0.5 * HEAD_DIM**-1.0 * change @ scatter(p, z) @ change
    remainders = []
    for step in (1e-2, 1e-3):
        q = (z @ (query + step * change) * HEAD_DIM**-0.5).softmax(0)
        divergence = (p * (p.log() - q.log())).sum()
        remainders.append(float((divergence - step**2 * form).abs() / step**2))
    assert form > 1e-3
    assert remainders[1] < 0.2 * remainders[0]
    assert remainders[1] < 1e-2 * form


def test_divergence_when_key_coordinates_are_cut_is_that_of_the_schur_complement():
    """No other query on the kept coordinates of a row has a smaller second-order divergence."""
    query, keys, scale = normal(HEAD_DIM), vectors(1, seed=1)[0, :, 0], 1e-3
    query[[1, 4]] *= scale  # the pruned coordinates are small, so higher orders vanish
    p, z = row(query, keys, LENGTH - 1, None)
    curvature, kept, pruned = scatter(p, z), [0, 2, 3, 5], [1, 4]
    across = curvature[kept][:, pruned]
    shift = torch.linalg.solve(curvature[kept][:, kept], across)
    refitted = query[kept] + shift @ query[pruned]
    q = (z[:, kept] @ refitted * HEAD_DIM**-0.5).softmax(0)
    divergence = (p * (p.log() - q.log())).sum()
    schur = curvature[pruned][:, pruned] - across.T @ shift
    assert float(divergence) == pytest.approx(float(query[pruned] @ schur @ query[pruned] / (2 * HEAD_DIM)), rel=0.02)


@pytest.mark.parametrize("heads", HEADS.values(), ids=list(HEADS))
def test_head_moments_are_summed_over_the_query_heads_of_a_group(heads):
    query = vectors(heads[0])
    total = HeadMomentSum(heads[1])
    total.add(query)
    total.add(query)
    expected = torch.zeros(heads[1], HEAD_DIM, HEAD_DIM).double()
    for token in query.flatten(0, 1):
        for head, vector in enumerate(token):
            expected[head // (heads[0] // heads[1])] += 2 * torch.outer(vector, vector)
    assert difference(total.value(), expected) < 1e-6
