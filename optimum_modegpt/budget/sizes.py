"""The sizes of the parts of every block, and the largest sparsity that they allow."""

from __future__ import annotations

from collections.abc import Collection

from optimum_modegpt.allocation.plan import (
    PartSize,
    Sizes,
    expert_step,
    head_step,
    largest_sparsity,
    mlp_step,
    part_size,
    stock_head_step,
)
from optimum_modegpt.architectures import Architecture, Block
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import InvalidConfig
from optimum_modegpt.layouts.limits import WideParts, wide_parts
from optimum_modegpt.modeling.modegpt_family import Part

SPARSITY_TOLERANCE = 0.005
"""A plan that misses the requested sparsity by more is a warning."""


def part_sizes(architecture: Architecture, config: ModeGPTConfig, wide: WideParts | None = None) -> Sizes:
    """Return dense width, weights per unit of width and grid of allowed widths, by block and part.

    Args:
        architecture: the dense model.
        config: the settings.
        wide: the parts that stay at full width, if the caller has asked `wide_parts` for them.

    Raises:
        UnsupportedModel: the model has no result in the layout of the configuration.
    """

    def sizes(block: Block, wide: Collection[Part]) -> dict[str, PartSize]:
        dense, cap = block.dense_widths, config.max_sparsity
        step = (mlp_step if block.experts is None else expert_step)(dense.mlp, config.round_to)
        parts = {"mlp": part_size(dense.mlp, block.mlp_channel_weights, step, cap)}
        if dense.shared:
            parts["shared"] = part_size(dense.shared, 3 * block.d_model, mlp_step(dense.shared, config.round_to), cap)
        if block.attends:
            qk_step = head_step(dense.qk, config.round_to, pairs=block.paired)
            vo_step = head_step(dense.vo, config.round_to, pairs=False)
            if config.layout == "stock":
                qk_step = vo_step = stock_head_step(dense.qk, block.heads, config.round_to)
            parts["qk"] = part_size(dense.qk, _head_weights(block, "qk"), qk_step, cap)
            parts["vo"] = part_size(dense.vo, _head_weights(block, "vo"), vo_step, cap)
        for part in wide:
            if part in parts:
                size = parts[part]
                parts[part] = PartSize(size.dense, size.weights_per_unit, step=size.dense, floor=size.dense)
        return parts

    if wide is None:
        wide = wide_parts(architecture, config.layout)
    return [sizes(block, own) for block, own in zip(architecture.blocks, wide, strict=True)]


def _head_weights(block: Block, part: Part) -> int:
    """Return the weights of one coordinate of a part, in all heads."""
    heads = sum(block.count(projection.unit) for projection in block.family.projections if projection.part == part)
    return heads * block.d_model


def check_reachable(config: ModeGPTConfig, sizes: Sizes) -> None:
    """Raise if the sparsity is above the largest one that the widths allow."""
    if (limit := largest_sparsity(sizes)) + SPARSITY_TOLERANCE < config.sparsity:
        raise InvalidConfig(
            f"sparsity={config.sparsity} cannot be reached: with max_sparsity={config.max_sparsity} and "
            f"round_to={config.round_to!r} at most {limit:.3f} can be removed from this model."
        )
