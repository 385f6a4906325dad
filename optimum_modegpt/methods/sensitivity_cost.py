"""Multiply-adds and peak memory of measuring the sensitivities."""

from __future__ import annotations

import torch

from optimum_modegpt.architectures.shapes import Shapes
from optimum_modegpt.calibration.gradients import LOGITS_AT_ONCE
from optimum_modegpt.methods import cost, sensitivity
from optimum_modegpt.methods.cost import FLOAT32, FLOAT64, Extent, Peak, Work


def work(shapes: Shapes, extent: Extent) -> Work:
    """Return the multiply-adds."""
    used, blocks = sensitivity.budget(shapes, extent.windows, extent.length), shapes.blocks
    later = sensitivity.later_work(shapes, used.length)
    own = later * cost.block_forward(shapes, used.divergence_windows, used.length)
    # Of a copy, only the half with the cut part runs.
    block = cost.block_forward(shapes, used.gradient_windows, used.length)
    passed = shapes.chosen * (shapes.mlp_inputs + 1) * shapes.mlp * shapes.d_model
    mlp = used.gradient_windows * used.length * passed
    own += blocks * (block + len(sensitivity.RATIOS) * ((shapes.parts - 2) * mlp + 2 * (block - mlp)))
    own += blocks * cost.block_forward(shapes, used.moment_windows, extent.length)
    moments = blocks * used.moment_windows * extent.length * cost.moments_work(shapes)
    factorisations = blocks * (cost.factorisations_work(shapes) + cost.metrics_work(shapes))
    return {"own": own, "moments": moments, "exact": factorisations}


def gradients_work(shapes: Shapes, extent: Extent) -> Work:
    """Return the multiply-adds of the gradients: two forward passes and a backward pass, also through the head."""
    used = sensitivity.budget(shapes, extent.windows, extent.length)
    passes = 3 * shapes.blocks * cost.block_forward(shapes, used.gradient_windows, used.length)
    return {"own": passes + 2 * used.gradient_windows * used.length * shapes.vocabulary * shapes.d_model}


def gradients_memory(shapes: Shapes, extent: Extent) -> int:
    """Return the bytes of the gradients of all blocks: at the outputs of query, output and down."""
    used = sensitivity.budget(shapes, extent.windows, extent.length)
    tokens = used.gradient_windows * used.length
    return shapes.blocks * tokens * (shapes.heads + 2 * shapes.d_model) * torch.bfloat16.itemsize


def gradients_peaks(shapes: Shapes, extent: Extent) -> list[Peak]:
    """Return the moments of the gradients that can be the peak: the backward passes of the head and of a block."""
    used = sensitivity.budget(shapes, extent.windows, extent.length)
    tokens = min(extent.batch // extent.length, used.gradient_windows) * used.length
    rows = min(used.length, max(1, LOGITS_AT_ONCE // shapes.vocabulary))
    head = {
        "head": shapes.vocabulary * shapes.d_model * extent.element,
        "logits and their gradients": 6 * rows * shapes.vocabulary * FLOAT32,
    }
    block = {
        "block, dense and separate": 2 * shapes.weights * extent.element,
        "scores of the attention, and their gradients": 4 * tokens * used.length * shapes.head_count * FLOAT32,
        "activations": 2
        * tokens
        * (shapes.chosen * (2 + shapes.mlp_inputs) * shapes.mlp + 4 * shapes.heads)
        * extent.element,
    }
    streams = {"residual streams": extent.tokens * shapes.d_model * extent.element}
    return [(head, streams), (block, streams)]


def peaks(shapes: Shapes, extent: Extent) -> list[Peak]:
    """Return the moments that can be the peak: the logits after a sweep, and a block while its variants are cut."""
    used = sensitivity.budget(shapes, extent.windows, extent.length)
    variant = shapes.weights * extent.element
    # The blocks with copies in memory are at most those of one sweep.
    exact = min(len(used.blocks), sensitivity.sweep_length(shapes.blocks))
    cuts = exact * shapes.parts * len(sensitivity.RATIOS)
    token = shapes.d_model * extent.element
    shorter = (2 * used.gradient_windows + cuts * used.divergence_windows) * used.length
    streams = {
        "residual streams": (extent.windows + 2 * used.moment_windows) * extent.length * token,
        "streams of the variants": shorter * token,
    }
    rows = min(extent.batch, LOGITS_AT_ONCE // shapes.vocabulary)
    logits = {
        "head": shapes.vocabulary * shapes.d_model * extent.element,
        "next-token distributions": rows * shapes.vocabulary * (4 * FLOAT32 + extent.element),
    }
    # The down projection is refitted while the moments of all channels are in memory.
    left = int(shapes.mlp * (1 - min(sensitivity.RATIOS)))
    float64, float32 = 2 * shapes.mlp + 5 * left, shapes.mlp_inputs * (shapes.mlp + left)
    refit = {
        "block, dense and compressed": 2 * variant,
        "moments of the MLP, and their factorisation": (shapes.experts * shapes.mlp**2 + 3 * left**2) * FLOAT64,
        "weights in float64 and float32": shapes.experts * shapes.d_model * (float64 * FLOAT64 + float32 * FLOAT32),
    }
    works = [logits, refit, *cost.block_memory(shapes, extent)]
    return [({**needed, "variant": variant}, streams) for needed in works]
