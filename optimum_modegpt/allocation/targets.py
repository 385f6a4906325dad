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
    sizes: Sequence[float] | None = None,
) -> list[float]:
    """Compute φ_i = min(cap, c·exp(−s_i / ε)) with mean φ = `sparsity`, the exact optimum of Eq. 10 under the cap.

    Without an active cap, this is the paper's L·φ_avg·softmax(−s/ε). Blocks are capped in order of increasing
    influence, and c follows from the sparsity that remains for the others. Requires `sparsity` ≤ `cap`. The mean is
    weighted by the `sizes` of the blocks; None if they are equal.
    """
    shares = [1.0] * len(influences) if sizes is None else [size / max(sizes) for size in sizes]
    order = sorted(range(len(influences)), key=lambda i: influences[i])
    for capped in range(len(order)):
        # Relative to the largest of the remaining weights: relative to a capped block, all others may underflow.
        weights = [math.exp((influences[order[capped]] - influences[i]) / temperature) for i in order[capped:]]
        removed = sparsity * sum(shares) - cap * sum(shares[i] for i in order[:capped])
        scale = removed / sum(shares[i] * weight for i, weight in zip(order[capped:], weights, strict=True))
        if scale <= cap:
            break
    else:
        capped, scale, weights = len(order), cap, []
    targets = [cap] * len(order)
    for index, weight in zip(order[capped:], weights, strict=True):
        targets[index] = scale * weight
    return targets


def plan_from_targets(targets: Sequence[float], sizes: Sizes) -> Plan:
    """Choose widths from a target sparsity per block, which is equal in all parts before rounding.

    Head dims are rounded to the nearest allowed width, and the MLP removes the rest of the block's target. Weights that
    a block could not remove are carried to the next block, and after the last one back through all of them. If then no
    MLP can change, the head dims remove the rest. The total therefore stays near its target.
    """
    kept: list[dict[str, int]] = []
    carried = 0.0
    for target, block in zip(targets, sizes, strict=True):
        widths, removed = {}, 0
        for part, size in block.items():
            if part == "mlp":
                continue
            widths[part] = size.nearest(size.dense * (1 - target))
            removed += (size.dense - widths[part]) * size.weights_per_unit
        wanted = target * sum(size.weights for size in block.values()) + carried
        widths["mlp"], carried = _absorb(block["mlp"], block["mlp"].dense, wanted - removed)
        kept.append(widths)
    for widths, block in zip(reversed(kept), reversed(sizes), strict=True):
        widths["mlp"], carried = _absorb(block["mlp"], widths["mlp"], carried)
    if all(
        widths["mlp"] in (block["mlp"].floor, block["mlp"].dense) for widths, block in zip(kept, sizes, strict=True)
    ):
        _cut_heads(kept, sizes, carried)
    return Plan.from_list(kept)


def _cut_heads(kept: Sequence[dict[str, int]], sizes: Sizes, carried: float) -> None:
    """Change the head dims of blocks, one after another, until about `carried` more weights are removed."""
    for widths, block in zip(kept, sizes, strict=True):
        for part in [part for part in widths if part != "mlp"]:
            widths[part], carried = _absorb(block[part], widths[part], carried)


def _absorb(size: PartSize, width: int, weights: float) -> tuple[int, float]:
    """Return the width of a part after removing about `weights` more weights, and the number still to remove."""
    nearest = size.nearest(width - weights / size.weights_per_unit)
    return nearest, weights - (width - nearest) * size.weights_per_unit
