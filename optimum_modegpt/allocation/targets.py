"""Plans from a target sparsity per block: `uniform`, and `influence`, the paper's rule (Eq. 10 and 11)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from optimum_modegpt.allocation.plan import PartSize, Plan, Sizes


def uniform_targets(blocks: int, sparsity: float) -> list[float]:
    """The same sparsity for every block."""
    return [sparsity] * blocks


def influence_targets(influences: Sequence[float], sparsity: float, *, temperature: float, cap: float) -> list[float]:
    """φ_i = min(cap, c·exp(−s_i / ε)) with mean φ = `sparsity`: the exact optimum of Eq. 10 under the cap.

    Without an active cap this is the paper's L·φ_avg·softmax(−s/ε). The blocks are capped in order of influence; c
    follows from what is left for the others. Asks for `sparsity` ≤ `cap`.
    """
    order = sorted(range(len(influences)), key=lambda i: influences[i])
    for capped in range(len(order)):
        # Relative to the largest of those left: beside a capped block all others may underflow.
        weights = [math.exp((influences[order[capped]] - influences[i]) / temperature) for i in order[capped:]]
        scale = (sparsity * len(order) - cap * capped) / sum(weights)
        if scale <= cap:
            break
    else:
        capped, scale, weights = len(order), cap, []
    ranked = [cap] * capped + [scale * weight for weight in weights]
    return [target for _, target in sorted(zip(order, ranked, strict=True))]


def plan_from_targets(targets: Sequence[float], sizes: Sizes) -> Plan:
    """Widths from a target sparsity per block, equal in its parts before rounding.

    Head dims go to the nearest allowed width; the MLP takes what is left of the block's target, and what a block could
    not meet is carried to the next one, in the end back through all of them, so that the whole stays near its target.
    """
    plan: Plan = []
    carried = 0.0
    for target, block in zip(targets, sizes, strict=True):
        ranks = {part: block[part].nearest(block[part].dense * (1 - target)) for part in ("qk", "vo")}
        wanted = target * sum(size.weights for size in block.values()) + carried
        removed = sum((block[part].dense - rank) * block[part].weights_per_unit for part, rank in ranks.items())
        ranks["mlp"], carried = _absorb(block["mlp"], block["mlp"].dense, wanted - removed)
        plan.append(ranks)
    for ranks, block in zip(reversed(plan), reversed(sizes), strict=True):
        ranks["mlp"], carried = _absorb(block["mlp"], ranks["mlp"], carried)
    return plan


def _absorb(mlp: PartSize, width: int, weights: float) -> tuple[int, float]:
    """The MLP width after removing about `weights` weights more, and what of them is still left to remove."""
    nearest = mlp.nearest(width - weights / mlp.weights_per_unit)
    return nearest, weights - (width - nearest) * mlp.weights_per_unit
