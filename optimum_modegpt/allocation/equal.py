"""Make plans with the same widths in all blocks, for the layout "stock", and for uniform MLPs (ours)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from optimum_modegpt.allocation.plan import PartSize, Plan, Sizes, plan_sparsity
from optimum_modegpt.allocation.sensitivity import Curves, interpolate, lower_hull
from optimum_modegpt.modeling.modegpt_family import HEAD_PARTS


def equal_plan(sizes: Sizes, sparsity: float) -> Plan:
    """Choose one head dim and one MLP width for all blocks, cut by shares as similar as the allowed widths permit."""

    def difference(plan: Plan) -> float:
        return sum(abs(removed - sparsity) * size.weights for _, size, removed in _removed(plan, sizes))

    return min(_candidates(sizes, sparsity), key=difference)


def equal_plan_from_curves(curves: Curves, sizes: Sizes, sparsity: float) -> Plan:
    """Choose the head dim and the MLP width of all blocks with the least Σ divergence for the weights removed."""
    hulls = {key: lower_hull(curve) for key, curve in curves.items()}

    def divergence(plan: Plan) -> float:
        return sum(interpolate(hulls[key], removed) for key, _, removed in _removed(plan, sizes) if key in hulls)

    return min(_candidates(sizes, sparsity), key=divergence)


def _candidates(sizes: Sizes, sparsity: float) -> list[Plan]:
    """Return a plan for every allowed head dim, whose MLP width comes nearest to the sparsity.

    Query, key and value have the same head dim. MLPs of different dense widths, as with experts in some blocks, are cut
    by the same share. Plans that miss the sparsity by more than a step of the MLPs are left out if there are others.
    """
    plans = [_with_head_dim(sizes, sparsity, head_dim) for head_dim in _head_dims(sizes)]
    misses = [abs(plan_sparsity(plan, sizes) - sparsity) for plan in plans]
    allowed = max(min(misses), _share_of_step(sizes))
    return [plan for plan, miss in zip(plans, misses, strict=True) if miss <= allowed]


def _head_dims(sizes: Sizes) -> Sequence[int | None]:
    """Return the head dims that query, key and value of all blocks may have. None if no block has heads to cut."""
    heads = [size.widths() for block in sizes for part, size in block.items() if part in HEAD_PARTS]
    return sorted(set(heads[0]).intersection(*heads), reverse=True) if heads else [None]


def _with_head_dim(sizes: Sizes, sparsity: float, head_dim: int | None) -> Plan:
    """Return the plan with this head dim that comes nearest to the sparsity."""
    widest = max((block["mlp"] for block in sizes), key=lambda size: size.dense)
    widths = widest.widths()

    def plan(width: int) -> Plan:
        return _plan(sizes, 1 - width / widest.dense, head_dim)

    enough = bisect_left(widths, sparsity, key=lambda width: plan_sparsity(plan(width), sizes))
    nearest = map(plan, widths[max(0, enough - 1) : enough + 1])
    return min(nearest, key=lambda each: abs(plan_sparsity(each, sizes) - sparsity))


def _plan(sizes: Sizes, mlp_sparsity: float, head_dim: int | None) -> Plan:
    blocks = []
    for block in sizes:
        widths: dict[str, int] = {}
        for part, size in block.items():
            if part not in HEAD_PARTS:
                widths[part] = size.nearest(size.dense * (1 - mlp_sparsity))
            elif head_dim is not None:
                widths[part] = head_dim
        blocks.append(widths)
    return Plan.from_list(blocks)


def _share_of_step(sizes: Sizes) -> float:
    """Return the share of all weights that one step of all MLPs removes."""
    step = sum(block["mlp"].step * block["mlp"].weights_per_unit for block in sizes)
    return step / sum(size.weights for block in sizes for size in block.values())


def _removed(plan: Plan, sizes: Sizes) -> Iterator[tuple[tuple[int, str], PartSize, float]]:
    """Yield (block, part), size and the removed share of every part."""
    for index, (widths, block) in enumerate(zip(plan.widths, sizes, strict=True)):
        for part, size in block.items():
            yield (index, part), size, 1 - getattr(widths, part) / size.dense
