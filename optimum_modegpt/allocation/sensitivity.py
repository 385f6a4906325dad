"""Make a plan from measured curves: the least total divergence for the weights removed, by marginal cost (ours)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from statistics import median

from optimum_modegpt.allocation.plan import PartSize, Plan, Sizes, total_weights

Curve = Sequence[tuple[float, float]]
"""Points (sparsity, divergence) of one part of one block."""
Curves = Mapping[tuple[int, str], Curve]
"""Curves by block index and part."""


def curve_from_losses(losses: Curve, measured: Curve) -> list[tuple[float, float]]:
    """Return a curve of the shape of `losses` that passes through the `measured` points.

    To second order, the divergence is proportional to the energy of the part's output that is lost. Their ratio is
    interpolated linearly between the measured points, and constant outside of them.
    """
    ratios = _ratios(measured, losses)
    if not ratios:
        return list(measured)
    return [(sparsity, loss * _within(ratios, sparsity)) for sparsity, loss in losses]


def with_losses(curve: Curve, losses: Curve, others: Sequence[float], step: float) -> list[tuple[float, float]]:
    """Return the curve of another cut of the same part, whose divergence grows in proportion to its losses.

    Args:
        curve: the divergence of a part by its sparsity.
        losses: the energy of the part's output that is lost at these sparsities.
        others: the energy that the other cut has lost after each of its equal steps, at least up to the last point of
            `curve`.
        step: the sparsity that each of these steps adds.
    """
    lost, found = dict(losses), []
    for sparsity, divergence in curve:
        steps = round(sparsity / step)
        ratio = others[steps - 1] / lost[sparsity] if steps and lost[sparsity] > 0 else 1.0
        found.append((sparsity, divergence * ratio))
    return found


def divergences_of(second_orders: Curves, ratios: Curves) -> dict[tuple[int, str], Curve]:
    """Return the divergence of every part of every block, from its second order and the ratio of both in some blocks.

    Elsewhere, the ratio is the median of those of the same part.
    """
    divergences = {}
    for (block, part), curve in second_orders.items():
        known = [ratios[key] for key in ratios if key == (block, part)]
        known = known or [ratios[key] for key in ratios if key[1] == part]
        points = []
        for sparsity, second_order in curve:
            ratio = median(_within(sorted(each), sparsity) for each in known) if known else 1.0
            points.append((sparsity, second_order * ratio))
        divergences[block, part] = points
    return divergences


def lower_hull(curve: Curve) -> list[tuple[float, float]]:
    """Return the lower convex hull of (0, 0) and the curve made non-decreasing, by increasing sparsity."""
    highest, hull = 0.0, [(0.0, 0.0)]
    for sparsity, divergence in sorted(curve):
        highest = max(highest, divergence)
        if sparsity <= hull[-1][0]:
            continue
        while len(hull) > 1 and _slope(hull[-2], (sparsity, highest)) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append((sparsity, highest))
    return hull


def interpolate(hull: Sequence[tuple[float, float]], sparsity: float) -> float:
    """Interpolate linearly between the points. Beyond the last point, extrapolate with the last slope."""
    if len(hull) == 1:
        return hull[0][1]
    left, right = hull[0], hull[1]
    for left, right in itertools.pairwise(hull):  # noqa: B007 - the last pair, if there is no break
        if sparsity <= right[0]:
            break
    return left[1] + _slope(left, right) * (sparsity - left[0])


def plan_from_curves(curves: Curves, sizes: Sizes, sparsity: float) -> Plan:
    """Choose the widths on the grid with the least Σ divergence for the weights removed.

    The curves are convex, so steps are taken in order of divergence per weight until the target is met. This is the
    water-level rule, applied to the allowed widths. A step that would overshoot the target is skipped in favour of
    smaller ones, with all later steps of its part. In the end, one skipped step is taken if it ends nearer to the
    target.
    """
    steps: list[tuple[float, int, int, str, int]] = []
    for (block, part), curve in curves.items():
        steps += _steps(block, part, sizes[block][part], lower_hull(curve))
    kept = Plan.dense(sizes).to_list()
    left = sparsity * total_weights(sizes)
    blocked: dict[tuple[int, str], int] = {}
    for _, _, block, part, width in sorted(steps):
        if (block, part) in blocked:
            continue
        removed = (kept[block][part] - width) * sizes[block][part].weights_per_unit
        if removed <= left:
            kept[block][part] = width
            left -= removed
        else:
            blocked[block, part] = width
    _take_nearest(kept, blocked, sizes, left)
    return Plan.from_list(kept)


def _take_nearest(
    kept: list[dict[str, int]], blocked: Mapping[tuple[int, str], int], sizes: Sizes, left: float
) -> None:
    """Take the blocked step that ends nearest to the target, if it ends nearer than taking none."""

    def miss(key: tuple[int, str]) -> float:
        block, part = key
        return abs((kept[block][part] - blocked[key]) * sizes[block][part].weights_per_unit - left)

    best = min(blocked, key=miss, default=None)
    if best is not None and miss(best) < left:
        block, part = best
        kept[block][part] = blocked[best]


def _steps(
    block: int, part: str, size: PartSize, hull: Sequence[tuple[float, float]]
) -> list[tuple[float, int, int, str, int]]:
    """Return (divergence per weight, ordinal, block, part, width after) of every step down the grid."""
    widths = size.widths()
    costs = [interpolate(hull, 1 - width / size.dense) for width in widths]
    steps, slope = [], 0.0
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        # Rounding errors must not move a later step of a part before an earlier one.
        slope = max(slope, (costs[i + 1] - costs[i]) / ((before - after) * size.weights_per_unit))
        steps.append((slope, i, block, part, after))
    return steps


def _ratios(numerators: Curve, denominators: Curve) -> list[tuple[float, float]]:
    """Return the ratios of two curves at the points of the first, without those at which the second is 0."""
    below = dict(denominators)
    return sorted((sparsity, value / below[sparsity]) for sparsity, value in numerators if below[sparsity] > 0)


def _within(points: Curve, at: float) -> float:
    """Interpolate linearly between the points. Outside of them, the result is constant."""
    return interpolate(points, min(max(at, points[0][0]), points[-1][0]))


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])
