"""The gain of a norm of the residual stream, in the way in which the family's norms store it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimum_modegpt.modeling.modegpt_family import Norm


def has_gain(norm: Any) -> bool:
    """Return whether a norm, or the place of a norm that a model lacks, has a gain."""
    return getattr(norm, "weight", None) is not None


def gain(norm: Any, kind: Norm) -> Tensor:
    """Return the factors (d_model,) of the normalised channels."""
    weight = norm.weight.detach()
    return weight + kind.offset if kind.offset else weight


def weight_of(factors: Tensor, kind: Norm) -> Tensor:
    """Return the weight of a norm with these factors of the normalised channels."""
    return factors - kind.offset if kind.offset else factors


def set_gain(norm: Any, kind: Norm, value: Tensor) -> None:
    """Set the factors of the normalised channels."""
    with torch.no_grad():
        norm.weight.copy_(weight_of(value, kind))
