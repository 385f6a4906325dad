"""The model that is left when whole experts are removed: their number and its shapes, from the configuration alone."""

from __future__ import annotations

import copy

import torch

from optimum_modegpt.architectures import Architecture, read_blocks
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import InvalidConfig


def count_kept_experts(architecture: Architecture, config: ModeGPTConfig) -> int:
    """Return the number of experts that every block keeps.

    Raises:
        InvalidConfig: the model has no experts, or a router that cannot lose some, or too few would be left.
    """
    described, model_config = architecture.family.mlp.experts, architecture.model.config
    wanted = config.expert_sparsity
    if described is None:
        raise InvalidConfig(f"expert_sparsity={wanted}, but the blocks of this model have no experts; expected 0.")
    if described.groups is not None and getattr(model_config, described.groups) > 1:
        raise InvalidConfig(
            f"expert_sparsity={wanted}, but the router of this model chooses groups of experts "
            f"({described.groups}={getattr(model_config, described.groups)}), which must stay complete; expected 0."
        )
    count, least = getattr(model_config, described.count), getattr(model_config, described.chosen)
    kept = round(count * (1 - wanted))
    if kept < least:
        raise InvalidConfig(
            f"expert_sparsity={wanted} leaves {kept} of {count} experts, but the router chooses {least} for a token; "
            f"expected at most {1 - least / count:.3f}."
        )
    return kept


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
