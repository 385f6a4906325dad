"""The compression methods and their costs, by name."""

from __future__ import annotations

from collections.abc import Sequence

from optimum_modegpt.architectures.shapes import Shapes
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.methods import published_cost, residual_matched_cost, sensitivity_cost
from optimum_modegpt.methods.cost import Extent, Peak, Work, block_forward
from optimum_modegpt.methods.method import Method
from optimum_modegpt.methods.published import Published
from optimum_modegpt.methods.residual_matched import ResidualMatched

METHODS = {"default": ResidualMatched, "paper": Published}
COSTS = {"default": residual_matched_cost, "paper": published_cost}


def method_of(config: ModeGPTConfig) -> Method:
    """Return the method that a configuration names."""
    return METHODS[config.method](config)


def work_of(
    shapes: Shapes,
    config: ModeGPTConfig,
    extent: Extent,
    widths: Sequence[int] | None = None,
    variants: int | None = None,
) -> dict[str, dict[str, Work]]:
    """Return the multiply-adds of all blocks together, by stage ("allocate" and "decompose") and step.

    `widths` are the kept widths of the MLPs, and `variants` the number of cut blocks that sensitivities were measured
    of. None estimates them. Work that the code repeats is counted once.
    """
    allocate = {}
    if config.sparsity and config.resolved_allocation == "sensitivity":
        allocate["sensitivities"] = sensitivity_cost.work(shapes, extent, variants)
    elif config.sparsity and config.resolved_allocation == "influence":
        allocate["influences"] = {"own": shapes.blocks * block_forward(shapes, extent.windows, extent.length)}
    if widths is None:
        widths = [int(shapes.mlp * (1 - config.sparsity))] * shapes.blocks
    return {"allocate": allocate, "decompose": COSTS[config.method].work(shapes, config, extent, widths)}


def peaks_of(shapes: Shapes, config: ModeGPTConfig, extent: Extent, keep_derivatives: bool) -> list[Peak]:
    """Return the moments that can be the peak of memory. `keep_derivatives` is that of `Placement`."""
    found = COSTS[config.method].peaks(shapes, config, extent, keep_derivatives)
    if config.sparsity and config.resolved_allocation == "sensitivity":
        found += sensitivity_cost.peaks(shapes, extent)
    return found
