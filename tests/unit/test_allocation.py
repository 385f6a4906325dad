"""Test the distribution of sparsity: targets from influences, widths from targets, widths from measured curves."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest

from optimum_modegpt.allocation.plan import (
    PartSize,
    Plan,
    head_step,
    largest_sparsity,
    mlp_step,
    part_size,
    plan_sparsity,
    stock_head_step,
    total_weights,
)
from optimum_modegpt.allocation.sensitivity import (
    curve_from_losses,
    divergences_of,
    interpolate,
    lower_hull,
    plan_from_curves,
    with_losses,
)
from optimum_modegpt.allocation.targets import influence_targets, plan_from_targets
from optimum_modegpt.modeling.modegpt_family import Widths

PARTS = ("mlp", "qk", "vo")
Curves = dict[tuple[int, str], list[tuple[float, float]]]
INFLUENCES = {
    "falling": [0.9, 0.5, 0.3, 0.2, 0.1],
    "equal": [0.3] * 5,
    "one block differs": [0.01, 1.4, 1.5, 1.5, 1.6],
    "two extremes": [0.0, 0.0, 2.0, 2.0],
    "one block": [0.4],
}
EVERY = pytest.mark.parametrize("influences", INFLUENCES.values(), ids=list(INFLUENCES))
TEMPERATURES = pytest.mark.parametrize("temperature", [1e-3, 0.1, 1.0, 100.0])


# ------------------------------------------------------------------------------------------------------------- targets


@EVERY
@TEMPERATURES
@pytest.mark.parametrize("cap", [0.95, 0.6])
@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.6])
def test_mean_is_the_sparsity_and_no_block_exceeds_the_cap(influences, temperature, cap, sparsity):
    targets = influence_targets(influences, sparsity, temperature=temperature, cap=cap)
    assert sum(targets) / len(targets) == pytest.approx(sparsity, abs=1e-12)
    assert max(targets) <= cap * (1 + 1e-12)
    assert min(targets) >= 0
    for (a, first), (b, second) in itertools.combinations(zip(influences, targets, strict=True), 2):
        assert first >= second - 1e-12 or a > b  # the less influential block loses more
        assert first <= second + 1e-12 or a < b


@TEMPERATURES
def test_without_a_cap_targets_are_the_softmax_of_the_paper(temperature):
    influences = INFLUENCES["falling"]
    targets = influence_targets(influences, 0.1, temperature=temperature, cap=1.0)
    lowest = min(influences)
    weights = [math.exp(-(influence - lowest) / temperature) for influence in influences]
    assert targets == pytest.approx([5 * 0.1 * weight / sum(weights) for weight in weights])


@EVERY
@TEMPERATURES
@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_targets_are_the_optimum_under_the_cap(influences, temperature, sparsity):
    """Check the optimality conditions of max −Σ s φ + ε H(φ) under Σ φ = const, φ ≤ cap.

    s_i + ε log φ_i is the same for every block below the cap, and no higher for a capped block.
    """
    cap = 0.7
    targets = influence_targets(influences, sparsity, temperature=temperature, cap=cap)
    free, capped = [], []
    for influence, target in zip(influences, targets, strict=True):
        if target <= 1e-300:
            continue
        level = influence + temperature * math.log(target)
        if target >= cap * (1 - 1e-12):
            capped.append(level)
        else:
            free.append(level)
    assert max(free, default=0) - min(free, default=0) < 1e-9
    if free:
        assert max(capped, default=free[0]) <= free[0] + 1e-9


def test_the_mean_is_weighted_by_the_sizes_of_blocks():
    for sizes in ([1.0, 3.0, 2.0], [5.0, 1.0, 1.0]):
        targets = influence_targets([0.1, 0.3, 0.2], 0.4, temperature=0.1, cap=0.6, sizes=sizes)
        assert max(targets) <= 0.6
        mean = sum(size * target for size, target in zip(sizes, targets, strict=True)) / sum(sizes)
        assert mean == pytest.approx(0.4)


def test_equal_influences_give_equal_targets():
    assert influence_targets([0.3] * 4, 0.25, temperature=0.01, cap=0.9) == pytest.approx([0.25] * 4)


def test_low_temperature_fills_one_block_after_another():
    assert influence_targets([0.1, 0.9, 0.5], 0.5, temperature=1e-3, cap=0.8) == pytest.approx([0.8, 0, 0.7])


def test_low_temperature_fills_further_blocks_if_the_target_needs_them():
    assert influence_targets([0.0, 1.0, 2.0], 0.5, temperature=1e-4, cap=0.9) == pytest.approx([0.9, 0.6, 0])
    assert influence_targets([0.0, 1.0, 1.0], 0.5, temperature=1e-4, cap=0.9) == pytest.approx([0.9, 0.3, 0.3])


def test_high_temperature_gives_uniform_targets():
    assert influence_targets([0.1, 0.9, 0.5], 0.5, temperature=1e6, cap=0.8) == pytest.approx([0.5] * 3, abs=1e-6)


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("head_dim", "round_to", "pairs", "step"),
    [
        (128, "auto", True, 8),
        (64, "auto", False, 8),
        (32, "auto", True, 8),
        (30, "auto", True, 2),
        (30, "auto", False, 1),
        (64, 1, True, 2),
        (64, 1, False, 1),
        (64, 16, True, 16),
        (64, 3, True, 6),
        (64, 3, False, 3),
    ],
)
def test_head_step(head_dim, round_to, pairs, step):
    assert head_step(head_dim, round_to, pairs=pairs) == step


@pytest.mark.parametrize(
    ("head_dim", "heads", "round_to", "step"),
    [
        (64, 32, "auto", 8),
        (64, 14, "auto", 16),  # Qwen2.5-0.5B: 14 × 48 is a multiple of 32, 14 × 56 is not
        (64, 9, "auto", 32),  # SmolLM2-135M: 9 × 32
        (80, 9, "auto", 8),  # the dense rows are no multiple of 32 either
        (128, 32, "auto", 16),
        (128, 25, "auto", 32),
        (30, 16, "auto", 2),
        (64, 9, 4, 4),
    ],
)
def test_rows_of_the_output_projection_stay_quantizable(head_dim, heads, round_to, step):
    assert stock_head_step(head_dim, heads, round_to) == step


@pytest.mark.parametrize(
    ("width", "round_to", "step"),
    [
        (14336, "auto", 128),
        (3200, "auto", 128),
        (3199, "auto", 64),
        (1600, "auto", 64),
        (1599, "auto", 32),
        (800, "auto", 32),
        (799, "auto", 16),
        (512, "auto", 16),
        (511, "auto", 1),
        (14336, 256, 256),
        (48, 8, 8),
    ],
)
def test_mlp_step(width, round_to, step):
    assert mlp_step(width, round_to) == step


@pytest.mark.parametrize(
    ("dense", "step", "max_sparsity", "floor"),
    [
        (64, 8, 0.95, 8),
        (64, 8, 0.75, 16),
        (64, 8, 0.7, 24),
        (64, 1, 0.95, 4),
        (6, 8, 0.5, 6),
        (100, 1, 0.9, 10),
        (20, 1, 0.95, 1),
    ],
)
def test_floor_respects_the_largest_sparsity_and_the_step(dense, step, max_sparsity, floor):
    size = part_size(dense, 10, step, max_sparsity)
    assert size.floor == floor
    assert size.weights == 10 * dense
    assert size.widths()[0] == dense
    assert size.widths()[-1] == floor
    assert all(width % step == 0 for width in size.widths()[1:])
    assert size.widths() == sorted(set(size.widths()), reverse=True)


def test_dense_width_is_allowed_if_it_is_no_multiple_of_the_step():
    size = part_size(30, 1, 8, 0.9)
    assert size.widths() == [30, 24, 16, 8]
    assert [size.nearest(width) for width in (31, 28, 26, 11, -5)] == [30, 30, 24, 8, 8]


def block_sizes(blocks: int = 3, *, step: int = 8, mlp_step: int = 16, cap: float = 0.95):
    return [
        {
            "mlp": part_size(352, 3 * 128, mlp_step, cap),
            "qk": part_size(64, 4 * 128, step, cap),
            "vo": part_size(64, 4 * 128, step, cap),
        }
        for _ in range(blocks)
    ]


def test_sparsity_counts_the_weights_of_all_parts():
    sizes = block_sizes(2)
    assert total_weights(sizes) == 2 * (352 * 384 + 2 * 64 * 512)
    plan = Plan.from_list([{"mlp": 176, "qk": 64, "vo": 64}, {"mlp": 352, "qk": 32, "vo": 64}])
    assert plan_sparsity(plan, sizes) == pytest.approx((176 * 384 + 32 * 512) / total_weights(sizes))


def test_largest_sparsity_is_reached_at_the_floors():
    sizes = block_sizes(2)
    floors = 2 * (32 * 384 + 2 * 8 * 512)  # 17.6 and 3.2 rounded up to the step
    assert largest_sparsity(sizes) == pytest.approx(1 - floors / total_weights(sizes))
    assert largest_sparsity(block_sizes(2, cap=0.5)) == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------- widths from targets


@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.2, 0.3, 0.5, 0.7])
@pytest.mark.parametrize(("step", "mlp_step"), [(8, 16), (2, 1), (16, 64)])
@pytest.mark.parametrize("temperature", [0.3, None])
def test_total_is_met_within_half_a_step(sparsity, step, mlp_step, temperature):
    sizes, blocks = block_sizes(5, step=step, mlp_step=mlp_step), 5
    targets = [sparsity] * blocks
    if temperature:
        targets = influence_targets(INFLUENCES["falling"], sparsity, temperature=temperature, cap=0.8)
    plan = plan_from_targets(targets, sizes)
    half = max(size.step * size.weights_per_unit for size in sizes[0].values()) / 2  # all blocks are equal
    assert abs(plan_sparsity(plan, sizes) - sparsity) <= half / total_weights(sizes) + 1e-12
    _check_widths(plan, sizes)
    if sparsity == 0:
        assert plan == Plan.dense(sizes)


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_total_is_met_up_to_the_largest_sparsity_with_and_without_heads(heads, share, temperature):
    sizes = block_sizes(5, step=16, mlp_step=4)
    if not heads:  # as in layout mlp
        wide = {part: PartSize(64, 4 * 128, 64, 64) for part in ("qk", "vo")}
        sizes = [{**block, **wide} for block in sizes]
    sparsity = share * largest_sparsity(sizes)
    plan = plan_from_targets(
        influence_targets(INFLUENCES["falling"], sparsity, temperature=temperature, cap=0.95), sizes
    )
    half = max(size.step * size.weights_per_unit for part, size in sizes[0].items() if heads or part == "mlp") / 2
    assert abs(plan_sparsity(plan, sizes) - sparsity) <= half / total_weights(sizes) + 1e-12
    _check_widths(plan, sizes)


def test_every_part_gets_the_target_of_its_block():
    plan = plan_from_targets([0.25, 0.5], block_sizes(2, step=1, mlp_step=1))
    assert plan.to_list() == [{"qk": 48, "vo": 48, "mlp": 264}, {"qk": 32, "vo": 32, "mlp": 176}]


def test_mlp_compensates_for_heads_that_cannot_be_cut():
    sizes = [{"mlp": PartSize(100, 10, 1, 1), "qk": PartSize(10, 10, 10, 10), "vo": PartSize(10, 10, 10, 10)}]
    assert plan_from_targets([0.25], sizes).to_list() == [{"qk": 10, "vo": 10, "mlp": 70}]


def test_next_block_compensates_for_a_block_that_misses_its_target():
    stiff = {part: PartSize(10, 10, 10, 10) for part in PARTS}
    soft = {"mlp": PartSize(100, 10, 1, 1), "qk": PartSize(10, 10, 10, 10), "vo": PartSize(10, 10, 10, 10)}
    assert plan_from_targets([0.5, 0.25], [stiff, soft]).widths[1].mlp == 100 - 15 - 30


# -------------------------------------------------------------------------------------------------- widths from curves


CURVES = {
    "convex": [(0.25, 0.1), (0.5, 0.4), (0.75, 1.6)],
    "concave": [(0.25, 1.0), (0.5, 1.5), (0.75, 1.6)],
    "not monotone": [(0.25, 0.2), (0.5, 0.1), (0.75, 0.9)],
    "flat": [(0.25, 0.0), (0.75, 0.0)],
    "negative noise": [(0.1, -0.01), (0.5, 0.3)],
    "unsorted with a duplicate": [(0.75, 1.0), (0.25, 0.2), (0.25, 0.3)],
    "nothing measured": [],
}


@pytest.mark.parametrize("curve", CURVES.values(), ids=list(CURVES))
def test_hull_is_the_largest_convex_monotone_curve_below_the_running_maximum(curve):
    hull = lower_hull(curve)
    assert hull[0] == (0.0, 0.0)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(hull)]
    assert slopes == sorted(slopes)
    assert all(slope >= 0 for slope in slopes)
    for sparsity, _ in curve:
        highest = max(max(d for s, d in curve if s <= sparsity), 0)
        assert interpolate(hull, sparsity) <= highest + 1e-12
    if curve:  # its corners are points of the running maximum
        for sparsity, divergence in hull[1:]:
            before = [d for s, d in curve if s < sparsity]
            least = min(d for s, d in curve if s == sparsity)
            assert divergence == max(least, 0, *before)


def test_hull_of_a_convex_curve_is_the_curve_itself():
    assert lower_hull(CURVES["convex"]) == [(0.0, 0.0), *CURVES["convex"]]
    assert lower_hull(CURVES["concave"]) == [(0.0, 0.0), (0.75, 1.6)]


def test_hull_is_interpolated_and_extrapolated_linearly():
    hull = lower_hull(CURVES["convex"])
    for sparsity, expected in [(0, 0), (0.125, 0.05), (0.25, 0.1), (0.625, 1.0), (0.75, 1.6), (1.0, 2.8)]:
        assert interpolate(hull, sparsity) == pytest.approx(expected)
    assert interpolate([(0.0, 0.0)], 0.5) == 0


def cost(plan, curves, sizes) -> float:
    """Sum the divergence of a plan over all parts."""
    total = 0.0
    for (block, part), curve in curves.items():
        removed = 1 - getattr(plan.widths[block], part) / sizes[block][part].dense
        total += interpolate(lower_hull(curve), removed)
    return total


def changed(plan, block, part, width) -> Plan:
    """Return the plan with another width of one part of one block."""
    widths = list(plan.widths)
    widths[block] = dataclasses.replace(widths[block], **{part: width})
    return Plan(tuple(widths))


def cheapest(curves, sizes, removed: float) -> float:
    """Return the least divergence of all plans that remove at least this share of the weights, by enumeration."""
    least = {0: 0.0}  # weights removed -> least divergence, over the parts so far
    for (block, part), curve in curves.items():
        size, hull, longer = sizes[block][part], lower_hull(curve), {}
        for width in size.widths():
            here = interpolate(hull, 1 - width / size.dense)
            for weights, divergence in least.items():
                key = weights + (size.dense - width) * size.weights_per_unit
                longer[key] = min(longer.get(key, math.inf), divergence + here)
        least = longer
    return min(
        divergence for weights, divergence in least.items() if weights >= (removed - 1e-12) * total_weights(sizes)
    )


def equal_curves(blocks: int, curve: list[tuple[float, float]]) -> Curves:
    """Return the same curve for every part of every block."""
    return {(block, part): curve for block, part in itertools.product(range(blocks), PARTS)}


def random_curves(blocks: int, random_numbers: random.Random) -> Curves:
    """Return a random curve for every part of every block."""
    curves = {}
    for block, part in itertools.product(range(blocks), PARTS):
        power, factor = random_numbers.uniform(1, 4), random_numbers.expovariate(1)
        curves[block, part] = [(s, factor * s**power) for s in (0.15, 0.3, 0.45, 0.6, 0.75, 0.95)]
    return curves


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sparsity", [0.1, 0.37, 0.5, 0.8])
def test_plan_has_the_least_divergence(seed, sparsity):
    random_numbers = random.Random(seed)
    sizes = [{part: PartSize(8, 5, 2, 2) for part in PARTS} for _ in range(2)]
    curves = random_curves(2, random_numbers)
    plan = plan_from_curves(curves, sizes, sparsity)
    removed = plan_sparsity(plan, sizes)
    assert abs(removed - sparsity) <= 10 / total_weights(sizes) / 2 + 1e-12 or removed == largest_sparsity(sizes)
    assert cost(plan, curves, sizes) == pytest.approx(cheapest(curves, sizes, removed))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sparsity", [0.2, 0.45, 0.7])
def test_plan_for_parts_of_different_sizes_is_within_one_step_of_the_least_divergence(seed, sparsity):
    random_numbers = random.Random(seed)
    sizes = [{"mlp": PartSize(24, 3, 2, 2), "qk": PartSize(8, 4, 2, 2), "vo": PartSize(8, 4, 1, 1)} for _ in range(1)]
    sizes += [{"mlp": PartSize(12, 6, 2, 2), "qk": PartSize(8, 4, 2, 2), "vo": PartSize(8, 4, 4, 4)}]
    curves = random_curves(2, random_numbers)
    plan = plan_from_curves(curves, sizes, sparsity)
    removed, found = plan_sparsity(plan, sizes), cost(plan, curves, sizes)
    largest_step = 0.0
    for block, parts in enumerate(sizes):
        for part, size in parts.items():
            planned = getattr(plan.widths[block], part)
            for width in size.widths():
                if planned - size.step <= width < planned:
                    step = cost(changed(plan, block, part, width), curves, sizes) - found
                    largest_step = max(largest_step, step)
    assert found <= cheapest(curves, sizes, removed) + largest_step + 1e-12
    _check_widths(plan, sizes)


@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.2, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("blocks", [2, 8])
@pytest.mark.parametrize("seed", range(3))
def test_target_is_met_with_the_steps_of_kernels(sparsity, blocks, seed):
    random_numbers, sizes = random.Random(seed), block_sizes(blocks)
    curves = random_curves(blocks, random_numbers)
    plan = plan_from_curves(curves, sizes, sparsity)
    finest = 8 * 512 / total_weights(sizes)
    assert abs(plan_sparsity(plan, sizes) - sparsity) <= max(finest / 2 if blocks == 2 else 0, 0.005)
    _check_widths(plan, sizes)


@pytest.mark.parametrize("curve", CURVES.values(), ids=list(CURVES))
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9])
def test_any_curve_gives_a_plan_that_meets_the_target(curve, sparsity):
    sizes = block_sizes(6, step=1, mlp_step=1)
    curves = equal_curves(6, curve)
    plan = plan_from_curves(curves, sizes, sparsity)
    assert plan_sparsity(plan, sizes) == pytest.approx(sparsity, abs=0.001)
    _check_widths(plan, sizes)


def test_equal_parts_are_cut_evenly():
    sizes = [{part: PartSize(10, 1, 1, 1) for part in PARTS} for _ in range(4)]
    curves = equal_curves(4, [(0.9, 1.0)])
    plan = plan_from_curves(curves, sizes, 0.5)
    assert set(plan.widths) == {Widths(5, 5, 5)}


def test_sparsity_zero_keeps_every_part_dense():
    sizes = block_sizes(2)
    curves = equal_curves(2, CURVES["flat"])
    plan = plan_from_curves(curves, sizes, 0.0)
    assert plan == Plan.dense(sizes)
    assert plan_sparsity(plan, sizes) == 0


def test_sparsity_above_the_largest_gives_the_floors():
    sizes = block_sizes(2, cap=0.5)
    curves = equal_curves(2, CURVES["convex"])
    plan = plan_from_curves(curves, sizes, 0.8)
    assert plan_sparsity(plan, sizes) == largest_sparsity(sizes)
    _check_widths(plan, sizes)


def test_curve_has_the_shape_of_the_losses_and_passes_the_measured_points():
    losses = [(0.1, 1.0), (0.2, 3.0), (0.4, 8.0), (0.6, 15.0), (0.8, 40.0)]
    curve = dict(curve_from_losses(losses, [(0.2, 0.3), (0.6, 3.0)]))
    assert curve[0.2] == pytest.approx(0.3)
    assert curve[0.6] == pytest.approx(3.0)
    assert curve[0.1] == pytest.approx(0.1), "proportional to the loss below the first measurement"
    assert curve[0.8] == pytest.approx(8.0), "and above the last"
    assert curve[0.4] == pytest.approx(8.0 * 0.15), "with the mean ratio halfway"


def test_curve_of_a_part_without_loss_is_the_measured_point():
    assert curve_from_losses([(0.25, 0.0), (0.5, 0.0)], [(0.5, 0.1)]) == [(0.5, 0.1)]


SECOND_ORDERS = {(block, part): [(0.3, 1.0 + block), (0.9, 4.0)] for block in range(4) for part in ("mlp", "qk")}
"""Second orders of four blocks."""


def test_divergence_of_a_measured_block_is_its_second_order_times_its_own_ratio():
    ratios = {(0, "mlp"): [(0.3, 2.0), (0.9, 0.5)], (3, "mlp"): [(0.9, 0.25), (0.3, 1.0)]}
    found = divergences_of(SECOND_ORDERS, ratios)
    assert found[0, "mlp"] == [(0.3, 2.0), (0.9, 2.0)]
    assert found[3, "mlp"] == [(0.3, 4.0), (0.9, 1.0)], "in any order of the points"


@pytest.mark.parametrize("changed", [0.1, 1.2, 10.0])
def test_ratio_of_another_block_is_the_median_of_the_same_part(changed):
    ratios = {
        (0, "mlp"): [(0.3, 1.0), (0.9, 0.5)],
        (2, "mlp"): [(0.3, changed), (0.9, changed)],
        (3, "mlp"): [(0.3, 1.5), (0.9, 0.5)],
        (0, "qk"): [(0.3, 100.0), (0.9, 100.0)],
    }
    found = divergences_of(SECOND_ORDERS, ratios)
    assert found[1, "mlp"] == [(0.3, pytest.approx(2 * sorted([1.0, changed, 1.5])[1])), (0.9, 4.0 * 0.5)]
    assert found[1, "qk"] == [(0.3, pytest.approx(200.0)), (0.9, pytest.approx(400.0))]
    assert found.keys() == SECOND_ORDERS.keys()


def test_ratio_is_interpolated_between_the_sparsities_and_constant_outside():
    second_orders = {(0, "vo"): [(0.1, 1.0), (0.45, 1.0), (1.0, 1.0)]}
    found = divergences_of(second_orders, {(5, "vo"): [(0.3, 1.0), (0.6, 3.0)]})
    assert found[0, "vo"] == [(0.1, 1.0), (0.45, pytest.approx(2.0)), (1.0, 3.0)]


def test_divergence_without_any_ratio_is_the_second_order():
    assert divergences_of(SECOND_ORDERS, {}) == SECOND_ORDERS
    assert divergences_of(SECOND_ORDERS, {(0, "vo"): [(0.3, 7.0)]}) == SECOND_ORDERS


def test_insensitive_part_is_cut_before_a_sensitive_one():
    sizes = [{part: PartSize(10, 1, 1, 1) for part in PARTS}]
    curves = {(0, "mlp"): [(0.9, 9.0)], (0, "qk"): [(0.9, 0.01)], (0, "vo"): [(0.9, 1.0)]}
    assert plan_from_curves(curves, sizes, 0.4).to_list() == [{"mlp": 10, "qk": 1, "vo": 7}]


def test_divergence_is_compared_per_weight_not_per_unit_of_width():
    sizes = [{"mlp": PartSize(10, 30, 1, 1), "qk": PartSize(10, 1, 1, 1), "vo": PartSize(10, 1, 1, 1)}]
    curves = equal_curves(1, [(0.9, 1.0)])
    assert plan_from_curves(curves, sizes, 90 / 320).to_list() == [{"mlp": 7, "qk": 10, "vo": 10}]


def _check_widths(plan, sizes):
    for ranks, block in zip(plan.to_list(), sizes, strict=True):
        assert set(ranks) == set(block)
        for part, size in block.items():
            assert ranks[part] in size.widths()
            assert type(ranks[part]) is int


def test_the_divergence_of_another_cut_follows_its_losses() -> None:
    curve, losses = [(0.25, 0.1), (0.5, 0.3), (0.75, 1.0)], [(0.25, 2.0), (0.5, 4.0), (0.75, 8.0)]
    found = with_losses([(0.0, 0.0), *curve], [(0.0, 0.0), *losses], [4.0, 6.0, 8.0, 9.0], step=0.25)
    assert found == [(0.0, 0.0), (0.25, 0.2), (0.5, pytest.approx(0.45)), (0.75, 1.0)]
