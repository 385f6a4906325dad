"""Test the selection of value coordinates against least squares that are solved again for every choice."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from optimum_modegpt.decompositions.coordinates import eliminate_coordinates, selection

GROUPS, HEADS, WIDTH, OUT = 2, 3, 5, 4


def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(GROUPS, HEADS, 40, WIDTH, generator=generator, dtype=torch.float64)
    moments = samples.mT @ samples
    return moments, torch.randn(GROUPS, HEADS, WIDTH, OUT, generator=generator, dtype=torch.float64)


def loss(moment: Tensor, output: Tensor, kept: list[int]) -> Tensor:
    """Return the least ‖X W − X_kept R‖² over R, from the moment of X."""
    refitted = torch.linalg.solve(moment[kept][:, kept], moment[kept] @ output)
    difference = output.index_add(0, torch.tensor(kept), refitted, alpha=-1)
    return (difference * (moment @ difference)).sum()


def test_costs_are_the_losses_of_all_heads_of_a_group() -> None:
    moments, output = problem()
    found = eliminate_coordinates(moments, output, 2)
    for group in range(GROUPS):
        for count in (4, 3, 2):
            kept = found.kept(count)[group].tolist()
            expected = sum(loss(moments[group, head], output[group, head], kept) for head in range(HEADS))
            torch.testing.assert_close(found.costs[group, : WIDTH - count].sum(), expected, rtol=1e-3, atol=1e-6)


def test_the_first_removal_is_the_cheapest_for_all_heads_together() -> None:
    moments, output = problem()
    found = eliminate_coordinates(moments, output, 4)
    for group in range(GROUPS):
        losses = {}
        for kept in itertools.combinations(range(WIDTH), 4):
            parts = [loss(moments[group, head], output[group, head], list(kept)) for head in range(HEADS)]
            losses[kept] = float(sum(parts))
        assert tuple(found.kept(4)[group].tolist()) == min(losses, key=lambda kept: losses[kept])


def test_a_selection_takes_coordinates() -> None:
    values = torch.randn(2, WIDTH, dtype=torch.float64)
    kept = torch.tensor([[0, 3], [2, 4]])
    assert torch.equal((values[:, None] @ selection(kept, WIDTH))[:, 0], values.gather(1, kept))
