"""Read the projections of a dense block, however it stores them. No other module knows how weights are stored."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from optimum_modegpt.architectures.positions import canonical_order
from optimum_modegpt.modeling.modegpt_config import count_heads
from optimum_modegpt.modeling.modegpt_experts import projections_of
from optimum_modegpt.modeling.modegpt_family import PARTS, Family, Part, Projection, Storage


class Weights(NamedTuple):
    """The weight (out, in) and the bias (out,), if any, of a projection."""

    weight: Tensor
    bias: Tensor | None

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Weights:
        """Apply a function of the rows to both."""
        return Weights(function(self.weight), None if self.bias is None else function(self.bias))


def dense_weights(block: nn.Module, family: Family, config: Any, parts: Collection[Part] = PARTS) -> dict[str, Weights]:
    """Return the weights of the projections of a dense block with these parts, by their path in the compressed block.

    The coordinates of query and key heads are in the order of compressed models: i and i + d / 2 are a pair.
    Projections that both models store in the same way are left out.
    """
    order = _order(block, family, parts)
    found: dict[str, Weights] = {}
    for projection in projections_of(block, family, parts):
        reordered = order is not None and projection.part == "qk"
        if projection.storage.plain and not reordered:
            continue
        weights = _stored(block, family, projection, config)
        if reordered:
            assert order is not None
            weights = weights.mapped(partial(_in_order, order=order))
        found[projection.path] = weights
    return found


def is_separate(block: nn.Module, family: Family, parts: Collection[Part]) -> bool:
    """Return whether a dense block with these parts stores its projections as a compressed one does."""
    plain = all(projection.storage.plain for projection in projections_of(block, family, parts))
    return plain and _order(block, family, parts) is None


def reorder_head_norms(block: nn.Module, family: Family, parts: Collection[Part]) -> None:
    """Bring the parameters of a dense block's query and key norms, if any, in the order of compressed models."""
    order = _order(block, family, parts)
    if order is None:
        return
    attention: Any = block.get_submodule(family.attention.module)
    norms = family.attention.norms_of(attention.config)
    if norms is None:
        return
    for path in (norms.query, norms.key):
        for parameter in block.get_submodule(path).parameters():
            with torch.no_grad():
                reordered = parameter.unflatten(-1, (-1, len(order)))[..., order]
                parameter.copy_(reordered.flatten(-2))


def _order(block: nn.Module, family: Family, parts: Collection[Part]) -> Tensor | None:
    """Return `canonical_order` of the block's attention, or None if that is not one of its parts."""
    return canonical_order(block.get_submodule(family.attention.module), family) if "qk" in parts else None


def _stored(block: nn.Module, family: Family, projection: Projection, config: Any) -> Weights:
    """Return the weights of one projection, with the coordinates of heads in their own order."""
    storage, module = projection.storage, block.get_submodule(projection.dense_path)
    weight: Tensor = module.weight.detach()  # pyright: ignore[reportAssignmentType, reportCallIssue]
    bias: Any = None if module.bias is None else module.bias.detach()  # pyright: ignore[reportCallIssue]
    stored = Weights(weight.T if storage.transposed else weight, bias)
    if projection.dense_path == projection.path:
        return stored
    if projection.part == "mlp":
        inputs = family.mlp.inputs
        return stored.mapped(lambda rows: rows.chunk(len(inputs))[inputs.index(projection.path)])
    counts = count_heads(block.get_submodule(family.attention.module), family, config)
    groups, shares = _shares(storage, counts["heads"], counts["kv_heads"])
    place = [getattr(family.attention, role) for role in shares].index(projection.path)

    def share(rows: Tensor) -> Tensor:
        parts = rows.unflatten(0, (groups, sum(shares.values()), -1))  # (groups, Σ shares, rows of a share, …)
        return parts.split(list(shares.values()), dim=1)[place].flatten(0, 2)

    return stored.mapped(share)


def _shares(storage: Storage, heads: int, kv_heads: int) -> tuple[int, dict[str, int]]:
    """Return the number of equal groups of rows in a module of several projections, and their shares of a group.

    The shares are by role, in the order of the rows.
    """
    if storage.layout == "gated":
        return heads, {"query": 1, "gate": 1}
    if storage.layout == "stacked":
        groups, shares = storage.slices, {"query": heads, "key": kv_heads, "value": kv_heads}
    else:  # "per head" is "per group" with one head in each group
        groups, shares = kv_heads, {"query": heads // kv_heads, "key": 1, "value": 1}
    return groups, {role: shares[role] for role in storage.order}


def _in_order(rows: Tensor, order: Tensor) -> Tensor:
    """Return the rows (heads · head_dim, …) with the coordinates of every head in another order."""
    return rows.unflatten(0, (-1, len(order)))[:, order.to(rows.device)].flatten(0, 1)
