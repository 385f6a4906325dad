"""Read the projections of a dense block, however it stores them, and write them back.

No other module knows how weights are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
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


def stored_tensors(
    block: nn.Module, family: Family, config: Any, tensors: Mapping[str, Tensor], parts: Collection[Part] = PARTS
) -> dict[str, Tensor]:
    """Return the tensors of a dense block by name, from those of a compressed block at full width.

    This reverses `dense_weights` and `reorder_head_norms`. `block`, which may be on the meta device, only says how the
    dense model stores them.
    """
    found, order = dict(tensors), _order(block, family, parts)
    if order is not None:
        _restore_order(found, family, config, order.argsort())
    stored: dict[str, list[Projection]] = {}
    for projection in projections_of(block, family, parts):
        stored.setdefault(projection.dense_path, []).append(projection)
    for path, projections in stored.items():
        for leaf in ("weight", "bias"):
            rows = {each.path: found.pop(name) for each in projections if (name := f"{each.path}.{leaf}") in found}
            if rows:
                joined = rows[path] if path in rows else _joined(block, family, config, projections[0], rows)
                transposed = leaf == "weight" and projections[0].storage.transposed
                found[f"{path}.{leaf}"] = joined.T.contiguous() if transposed else joined
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
    groups, shares = _shares(block, family, config, storage)
    place = list(shares).index(projection.path)

    def share(rows: Tensor) -> Tensor:
        parts = rows.unflatten(0, (groups, sum(shares.values()), -1))  # (groups, Σ shares, rows of a share, …)
        return parts.split(list(shares.values()), dim=1)[place].flatten(0, 2)

    return stored.mapped(share)


def _joined(
    block: nn.Module, family: Family, config: Any, projection: Projection, rows: Mapping[str, Tensor]
) -> Tensor:
    """Return the rows of the module that holds a projection and others, from the rows of each by its path."""
    if projection.part == "mlp":
        return torch.cat([rows[path] for path in family.mlp.inputs])
    groups, shares = _shares(block, family, config, projection.storage)
    return torch.cat([rows[path].unflatten(0, (groups, share, -1)) for path, share in shares.items()], 1).flatten(0, 2)


def _shares(block: nn.Module, family: Family, config: Any, storage: Storage) -> tuple[int, dict[str, int]]:
    """Return the number of equal groups of rows in a module of several projections, and their shares of a group.

    The shares are by the path of the projection, in the order of the rows.
    """
    counts = count_heads(block.get_submodule(family.attention.module), family, config)
    heads, kv_heads = counts["heads"], counts["kv_heads"]
    groups, roles = _roles(storage, heads, kv_heads)
    return groups, {getattr(family.attention, role): share for role, share in roles.items()}


def _roles(storage: Storage, heads: int, kv_heads: int) -> tuple[int, dict[str, int]]:
    """Return the same with the shares by role."""
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


def _restore_order(tensors: dict[str, Tensor], family: Family, config: Any, order: Tensor) -> None:
    """Bring query, key and their norms, among the tensors of a block by name, in the dense order of coordinates."""
    norms = family.attention.norms_of(config)
    normed = () if norms is None else (norms.query, norms.key)
    for name, values in tensors.items():
        if name.rpartition(".")[0] in (family.attention.query, family.attention.key):
            tensors[name] = _in_order(values, order)
        elif name.startswith(tuple(f"{path}." for path in normed)):
            tensors[name] = values.unflatten(-1, (-1, len(order)))[..., order].flatten(-2)
