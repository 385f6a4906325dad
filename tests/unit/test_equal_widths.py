"""Test plans with the same widths in all blocks."""

from __future__ import annotations

import itertools
import random

import pytest

from optimum_modegpt.allocation.equal import equal_plan, equal_plan_from_curves
from optimum_modegpt.allocation.plan import PartSize, Plan, Sizes, part_size, plan_sparsity
from optimum_modegpt.allocation.sensitivity import Curves, interpolate, lower_hull

D_MODEL, HEAD_DIM = 32, 12
SPARSITIES = pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.55])
MLPS = {"dense": [48] * 3, "experts in the first block": [40, 48, 48], "experts in the last blocks": [48, 128, 128]}
EVERY = pytest.mark.parametrize("mlps", MLPS.values(), ids=list(MLPS))


def sizes_of(mlps: list[int], *, head_step: int = 2, attends: tuple[int, ...] = (0, 1, 2)) -> Sizes:
    """Return the sizes of blocks with these MLP widths. Only the blocks `attends` have heads."""
    blocks = []
    for index, width in enumerate(mlps):
        block = {"mlp": part_size(width, 3 * D_MODEL, 1, 0.95)}
        if index in attends:
            block |= {part: part_size(HEAD_DIM, 6 * D_MODEL, head_step, 0.95) for part in ("qk", "vo")}
        blocks.append(block)
    return blocks


def random_curves(sizes: Sizes, seed: int) -> Curves:
    """Return convex curves, some of them hundreds of times as steep as others."""
    draw, curves = random.Random(seed), {}
    for index, block in enumerate(sizes):
        for part in block:
            scale = 10 ** draw.uniform(-2, 1)
            curves[index, part] = [(removed, scale * removed**2) for removed in (0.0, 0.25, 0.5, 0.75, 0.95)]
    return curves


def divergence(plan: Plan, curves: Curves, sizes: Sizes) -> float:
    total = 0.0
    for (index, part), curve in curves.items():
        size = sizes[index][part]
        total += interpolate(lower_hull(curve), 1 - getattr(plan.widths[index], part) / size.dense)
    return total


def step_of(sizes: Sizes) -> float:
    """Return the share of all weights that one channel of every MLP has."""
    return sum(block["mlp"].weights_per_unit for block in sizes) / sum(
        size.weights for block in sizes for size in block.values()
    )


def check(plan: Plan, sizes: Sizes, sparsity: float) -> None:
    """Check that a plan has one head dim, MLPs cut by one share, and the sparsity up to a step."""
    heads = {getattr(plan.widths[index], part) for index, block in enumerate(sizes) for part in block if part != "mlp"}
    assert len(heads) <= 1
    shares = [widths.mlp / block["mlp"].dense for widths, block in zip(plan.widths, sizes, strict=True)]
    assert max(shares) - min(shares) <= 0.5 / min(block["mlp"].dense for block in sizes) + 1e-9
    assert abs(plan_sparsity(plan, sizes) - sparsity) <= step_of(sizes)
    for widths, block in zip(plan.widths, sizes, strict=True):
        assert all(getattr(widths, part) in size.widths() for part, size in block.items())


@EVERY
@SPARSITIES
def test_all_blocks_have_the_same_widths_and_the_sparsity_is_met(mlps: list[int], sparsity: float) -> None:
    for attends in ((0, 1, 2), (1,), ()):
        sizes = sizes_of(mlps, attends=attends)
        check(equal_plan(sizes, sparsity), sizes, sparsity)
        check(equal_plan_from_curves(random_curves(sizes, 0), sizes, sparsity), sizes, sparsity)


@SPARSITIES
@pytest.mark.parametrize("seed", range(4))
def test_no_other_equal_widths_that_remove_as_much_diverge_less(sparsity: float, seed: int) -> None:
    sizes = sizes_of(MLPS["dense"])
    curves = random_curves(sizes, seed)
    best, others = divergence(equal_plan_from_curves(curves, sizes, sparsity), curves, sizes), []
    for head, mlp in itertools.product(sizes[0]["qk"].widths(), sizes[0]["mlp"].widths()):
        plan = Plan.from_list([{"qk": head, "vo": head, "mlp": mlp}] * 3)
        if 0 <= plan_sparsity(plan, sizes) - sparsity <= step_of(sizes):
            others.append(divergence(plan, curves, sizes))
    assert min(others) >= best
    assert max(others) > 1.05 * best or sparsity == 0.05  # there only the MLPs are cut


def test_curves_decide_between_heads_and_mlps() -> None:
    sizes = sizes_of(MLPS["dense"])
    kept = {}
    for cheap in ("mlp", "qk"):
        curves: Curves = {}
        for index, block in enumerate(sizes):
            for part in block:
                slope = 0.01 if (part == "mlp") == (cheap == "mlp") else 1.0
                curves[index, part] = [(0.0, 0.0), (0.95, slope)]
        kept[cheap] = equal_plan_from_curves(curves, sizes, 0.3).widths[0]
    assert kept["mlp"].qk == HEAD_DIM
    assert kept["qk"].qk == 6
    assert kept["qk"].mlp > 40
    alike = equal_plan(sizes, 0.3).widths[0]
    assert (alike.qk, alike.vo) == (8, 8)
    assert 0.2 < 1 - alike.mlp / 48 < 0.3


def test_heads_that_stay_wide_leave_the_sparsity_to_the_mlps() -> None:
    sizes = sizes_of(MLPS["dense"], head_step=HEAD_DIM)
    plan = equal_plan(sizes, 0.3)
    assert {(widths.qk, widths.vo) for widths in plan.widths} == {(HEAD_DIM, HEAD_DIM)}
    check(plan, sizes, 0.3)


def test_the_nearest_width_is_the_nearest_of_all_allowed_ones() -> None:
    draw = random.Random(0)
    for _ in range(300):
        step = draw.randint(1, 9)
        floor = step * draw.randint(1, 5)
        size = PartSize(floor + draw.randint(0, 40), 1, step, floor)
        for width in (draw.uniform(0, 60), float(draw.randint(0, 60))):
            assert size.nearest(width) == min(size.widths(), key=lambda allowed: abs(allowed - width))
