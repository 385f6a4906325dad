"""Multiply-adds and peak memory of measuring the sensitivities."""

from __future__ import annotations

from optimum_modegpt.architectures.shapes import Shapes
from optimum_modegpt.methods import cost, sensitivity
from optimum_modegpt.methods.cost import FLOAT32, FLOAT64, Extent, Peak, Work
from optimum_modegpt.report import PARTS


def work(shapes: Shapes, extent: Extent) -> Work:
    """Return the multiply-adds."""
    used, blocks = sensitivity.budget(shapes, extent.windows, extent.length), shapes.blocks
    variants = blocks * len(PARTS) * len(used.ratios)
    passed = variants * (blocks + 1) / 2 + blocks  # a variant passes half of the blocks, on average
    own = passed * cost.block_forward(shapes, used.divergence_windows, used.divergence_length)
    own += blocks * cost.block_forward(shapes, used.moment_windows, extent.length)
    own += variants * used.divergence_windows * used.divergence_length * shapes.vocabulary * shapes.d_model
    moments = blocks * used.moment_windows * extent.length * cost.moments_work(shapes)
    return {"own": own, "moments": moments, "exact": blocks * cost.factorisations_work(shapes)}


def peaks(shapes: Shapes, extent: Extent) -> list[Peak]:
    """Return the moments that can be the peak: the logits after a sweep, and a block while its variants are cut."""
    used = sensitivity.budget(shapes, extent.windows, extent.length)
    variant = shapes.weights * extent.element
    cuts = sensitivity.sweep_length(shapes.blocks) * len(PARTS) * len(used.ratios)
    windows = extent.windows + 2 * used.moment_windows + 2 * used.divergence_windows
    window = extent.length * shapes.d_model * extent.element
    streams = {
        "residual streams": windows * window,
        "streams of the variants": cuts * used.divergence_windows * window,
    }
    rows = min(extent.batch, sensitivity.LOGITS_AT_ONCE // shapes.vocabulary)
    logits = {
        "head": shapes.vocabulary * shapes.d_model * extent.element,
        "next-token distributions": rows * shapes.vocabulary * (4 * FLOAT32 + extent.element),
    }
    # The down projection is refitted while the moments of all channels are in memory.
    left = int(shapes.mlp * (1 - min(used.ratios)))
    float64, float32 = 2 * shapes.mlp + 5 * left, shapes.mlp_inputs * (shapes.mlp + left)
    refit = {
        "block, dense and compressed": 2 * variant,
        "moments of the MLP, and their factorisation": (shapes.mlp**2 + 3 * left**2) * FLOAT64,
        "weights in float64 and float32": shapes.d_model * (float64 * FLOAT64 + float32 * FLOAT32),
    }
    works = [logits, refit, *cost.block_memory(shapes, extent)]
    return [({**needed, "variant": variant}, streams) for needed in works]
