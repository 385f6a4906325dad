"""Make plans from a target sparsity per block, as by `influence`, the paper's rule (Eq. 10 and 11)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from optimum_modegpt.allocation.plan import PartSize, Plan, Sizes


def influence_targets(
    influences: Sequence[float],
    sparsity: float,
    *,
    temperature: float,
    cap: float,
    weights: Sequence[int] | None = None,
) -> list[float]:
    """Compute φ_i = min(cap, c·exp(−s_i / ε)) with mean φ = `sparsity`, the exact optimum of Eq. 10 under the cap.

    The mean is weighted with the number of `weights` of each block. None is for equal blocks, as in the paper.
    Without an active cap, this is the paper's L·φ_avg·softmax(−s/ε). Blocks are capped in order of increasing
    influence, and c follows from the sparsity that remains for the others. Requires `sparsity` ≤ `cap`.
    """
    weights = weights or [1] * len(influences)
    shares = [own * len(weights) / sum(weights) for own in weights]
    order = sorted(range(len(influences)), key=lambda i: influences[i])
    for capped in range(len(order)):
        # Relative to the largest of the remaining weights: relative to a capped block, all others may underflow.
        factors = [math.exp((influences[order[capped]] - influences[i]) / temperature) for i in order[capped:]]
        removed = cap * sum(shares[i] for i in order[:capped])
        total = sum(shares[i] * factor for i, factor in zip(order[capped:], factors, strict=True))
        scale = (sparsity * len(order) - removed) / total
        if scale <= cap:
            break
    else:
        capped, scale, factors = len(order), cap, []
    targets = [cap] * len(order)
    for index, factor in zip(order[capped:], factors, strict=True):
        targets[index] = scale * factor
    return targets


def plan_from_targets(targets: Sequence[float], sizes: Sizes) -> Plan:
    """Choose widths from a target sparsity per block, which is equal in all parts before rounding.

    Head dims are rounded to the nearest allowed width, and the MLP removes the rest of the block's target. Weights that
    a block could not remove are carried to the next block, and after the last one back through all of them. The total
    therefore stays near its target.
    """
    kept: list[dict[str, int]] = []
    carried = 0.0
    for target, block in zip(targets, sizes, strict=True):
        widths, removed = {}, 0
        for part in ("qk", "vo"):
            size = block[part]
            widths[part] = size.nearest(size.dense * (1 - target))
            removed += (size.dense - widths[part]) * size.weights_per_unit
        wanted = target * sum(size.weights for size in block.values()) + carried
        widths["mlp"], carried = _absorb(block["mlp"], block["mlp"].dense, wanted - removed)
        kept.append(widths)
    for widths, block in zip(reversed(kept), reversed(sizes), strict=True):
        widths["mlp"], carried = _absorb(block["mlp"], widths["mlp"], carried)
    return Plan.from_list(kept)


def _absorb(mlp: PartSize, width: int, weights: float) -> tuple[int, float]:
    """Return the MLP width after removing about `weights` more weights, and the number of them still to remove."""
    nearest = mlp.nearest(width - weights / mlp.weights_per_unit)
    return nearest, weights - (width - nearest) * mlp.weights_per_unit
