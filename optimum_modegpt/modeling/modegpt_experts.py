"""The packed experts of a block: find them, and replace their weights. Their classes are those of transformers.

This file is also remote code: it is copied next to the weights. It imports only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from .modegpt_family import Family, Part, Projection

CHANNEL_AXES = {"gate_up_proj": 1, "gate_up_proj_bias": 1, "down_proj": 2}
"""The axis of each parameter (experts, out, in) or (experts, out) that holds hidden channels.

Two neighbouring axes are exchanged if the module is transposed.
"""


def experts_of(block: nn.Module, family: Family) -> Any:
    """Return the module that holds the packed experts of a block, or None if the block has none."""
    experts = family.mlp.experts
    if experts is None:
        return None
    parent, _, name = experts.packed.rpartition(".")
    return getattr(block.get_submodule(parent), name, None)


def projections_of(block: nn.Module, family: Family, parts: Collection[Part]) -> tuple[Projection, ...]:
    """Return the projections of a block that has these parts, without those of experts."""
    return family.projections_of(parts, experts=experts_of(block, family) is not None)


def packed_shape(experts: Any) -> tuple[int, int]:
    """Return the width of the residual stream and the number of hidden channels of an expert."""
    _, *shape = experts.down_proj.shape
    d_model, width = reversed(shape) if experts.is_transposed else shape
    return d_model, width


def channel_axis(experts: Any, name: str) -> int:
    """Return the axis of a parameter of the experts that holds hidden channels."""
    axis = CHANNEL_AXES[name]
    return 3 - axis if experts.is_transposed and not name.endswith("bias") else axis


def packed_names(experts: Any) -> tuple[str, ...]:
    """Return the names of the parameters that hold hidden channels."""
    return tuple(name for name in CHANNEL_AXES if not name.endswith("bias") or experts.has_bias)


def install_packed(experts: Any, name: str, values: Tensor) -> None:
    """Replace a parameter of the experts by one of other values, in its dtype and on its device."""
    old = getattr(experts, name)
    setattr(experts, name, nn.Parameter(values.to(old), requires_grad=old.requires_grad))


def narrow_experts(experts: Any, width: int) -> None:
    """Replace the parameters of the experts by uninitialised ones of this width."""
    for name in packed_names(experts):
        old = getattr(experts, name)
        shape = list(old.shape)
        shape[channel_axis(experts, name)] = width * (2 if name.startswith("gate_up") else 1)
        install_packed(experts, name, torch.empty(shape, dtype=old.dtype, device=old.device))
