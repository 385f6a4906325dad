"""The coordinate pairs of a head that rotate together, and the tables that rotate them.

Compressed models have one order of coordinates: i and i + d / 2 are a pair, and the pairs that do not rotate are the
last ones. Dense models have it too, unless their pairs are interleaved or only a part of a head rotates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimum_modegpt.errors import UnsupportedModel
from optimum_modegpt.modeling.modegpt_attention import rotates
from optimum_modegpt.modeling.modegpt_family import Family


def rotary_width(attention: Any, family: Family) -> int:
    """Return how many coordinates of a head rotate in an attention, dense or compressed.

    Raises:
        UnsupportedModel: an odd number of coordinates rotates, or does not.
    """
    if not rotates(attention, family):
        return 0
    head_dim = getattr(attention, family.attention.head_dim)
    positions, width = family.attention.positions, head_dim
    if positions.width is not None:
        width = getattr(attention, positions.width)
    elif positions.partial:
        width = int(head_dim * attention.config.rope_parameters.get("partial_rotary_factor", 1.0))
    if width % 2 or head_dim % 2:
        raise UnsupportedModel(f"{width} of {head_dim} coordinates of a head rotate; expected even numbers.")
    return width


def canonical_order(attention: Any, family: Family) -> Tensor | None:
    """Return a head's dense coordinates (head_dim,) in the order of compressed models, or None if it is the same."""
    width, head_dim = rotary_width(attention, family), getattr(attention, family.attention.head_dim)
    interleaved = family.attention.positions.pairs == "interleaved"
    if width == 0 or (width == head_dim and not interleaved):
        return None
    return pair_coordinates(head_dim, width, interleaved=interleaved).T.flatten()


def pair_coordinates(head_dim: int, width: int, *, interleaved: bool) -> Tensor:
    """Return the dense coordinates (head_dim / 2, 2) of every pair, of which the first `width` / 2 rotate."""
    rotated = torch.arange(width)
    rotated = rotated.view(-1, 2) if interleaved else rotated.view(2, -1).T
    return torch.cat((rotated, torch.arange(width, head_dim).view(-1, 2)))
