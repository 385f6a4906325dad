"""The model that is left when whole experts are removed: their number and its shapes, from the configuration alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from optimum_modegpt.architectures import Architecture, read_blocks
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import InvalidConfig
from optimum_modegpt.modeling.modegpt_family import Experts

SCORED_EXPERTS = 2
"""Number of experts whose scores a router with groups adds up to choose a group."""


def count_kept_experts(architecture: Architecture, config: ModeGPTConfig) -> int:
    """Return the number of experts that every block keeps, the same in all groups of a router that has groups.

    Raises:
        InvalidConfig: the model has no experts, or too few would be left, or all.
    """
    described, model_config = architecture.family.mlp.experts, architecture.model.config
    wanted = config.expert_sparsity
    if described is None:
        raise InvalidConfig(f"expert_sparsity={wanted}, but the blocks of this model have no experts; expected 0.")
    count, groups = getattr(model_config, described.count), described.count_groups(model_config)
    kept = groups * round(count * (1 - wanted) / groups)
    least = groups * _fewest_in_group(described, model_config)
    if kept < least:
        in_groups = f" in each of {groups} groups" if groups > 1 else ""
        raise InvalidConfig(
            f"expert_sparsity={wanted} leaves {kept // groups} of {count // groups} experts{in_groups}, but the router "
            f"chooses {getattr(model_config, described.chosen)} for a token, so it needs {least // groups}{in_groups}; "
            f"expected at most {1 - least / count:.3f}."
        )
    if kept == count:
        raise InvalidConfig(
            f"expert_sparsity={wanted} removes none of {count} experts, because a block loses a multiple of "
            f"{groups}; expected {groups / count:.3f} or more."
        )
    return kept


def _fewest_in_group(described: Experts, model_config: Any) -> int:
    """Return the fewest experts of a group from which the router can choose those of a token."""
    chosen = getattr(model_config, described.chosen)
    if described.count_groups(model_config) == 1:
        return chosen
    assert described.chosen_groups is not None
    return max(SCORED_EXPERTS, math.ceil(chosen / getattr(model_config, described.chosen_groups)))


def with_kept_experts(architecture: Architecture, config: ModeGPTConfig) -> Architecture:
    """Return the architecture without the experts that `config` removes, on the meta device; itself if it removes none.

    Raises:
        InvalidConfig: as `count_kept_experts`.
    """
    if not config.expert_sparsity:
        return architecture
    kept, described = count_kept_experts(architecture, config), architecture.family.mlp.experts
    assert described is not None
    model = architecture.model
    model_config = copy.deepcopy(model.config)
    setattr(model_config, described.count, kept)
    with torch.device("meta"):
        fewer = type(model)(model_config)
    return read_blocks(fewer.to(model.dtype), architecture.classes)  # pyright: ignore[reportArgumentType]
