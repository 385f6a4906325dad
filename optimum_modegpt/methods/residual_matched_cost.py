"""Multiply-adds and peak memory of `method="default"`."""

from __future__ import annotations

from collections.abc import Sequence

from optimum_modegpt.architectures.shapes import Shapes
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.psd import gram_work
from optimum_modegpt.decompositions.softmax import ITERATIONS
from optimum_modegpt.methods import cost
from optimum_modegpt.methods.cost import FLOAT32, FLOAT64, Extent, Peak, Work
from optimum_modegpt.methods.input_refit import REFIT_TOKENS, ROUNDS, curvature_stride, refits_inputs
from optimum_modegpt.methods.residual_matched import gain_tokens

CONJUGATE_VECTORS = 9
"""Tensors as large as gate and up during their refit: the rows, a few steps, residuals and directions."""


def work(shapes: Shapes, config: ModeGPTConfig, extent: Extent, widths: Sequence[int]) -> dict[str, Work]:
    """Return the multiply-adds of all blocks together, by step. `widths` are the kept widths of the MLPs.

    The refit of gate and up is counted with all its rounds and iterations, although it may end early.
    """
    blocks, d = shapes.blocks, shapes.d_model
    steps = {
        "residual streams": {"own": blocks * 2 * cost.block_forward(shapes, extent.windows, extent.length)},
        "moments": {"moments": blocks * extent.tokens * cost.moments_work(shapes)},
        "factorisations": {"exact": blocks * cost.factorisations_work(shapes)},
    }
    tokens = _refit_tokens(shapes, extent)
    cut = []
    for width in widths:
        if shapes.separable and width < shapes.mlp and refits_inputs(tokens, width, shapes.mlp_inputs, config):
            cut.append(width)
    if cut:
        width, rounds = sum(cut) / len(cut), len(cut) * ROUNDS * shapes.experts
        # The gradient and the moments afterwards; six products per iteration of conjugate gradients.
        token = (5 * shapes.mlp_inputs // 2 + 2) * d * width + gram_work(int(width))
        curved = 6 * config.refit_iterations * d * width + shapes.mlp_inputs * (d * width + gram_work(int(width)))
        factors = (1 + config.refit_iterations) * shapes.mlp_inputs * d * width * (width + d)
        raised = tokens * token + tokens / curvature_stride(tokens) * curved + factors
        steps["refit of gate and up"] = {"raised": rounds * raised, "exact": rounds * 2 * d * width**2}
    if config.sparsity:
        tokens = gain_tokens(extent.windows, extent.length, shapes.vocabulary)
        # Two products with the head per iteration, and a few around them.
        steps["final gain"] = {"raised": (2 * ITERATIONS + 6) * tokens * shapes.vocabulary * d}
    return steps


def _refit_tokens(shapes: Shapes, extent: Extent) -> int:
    """Return the number of tokens for the refit of gate and up; with experts, the mean number of each."""
    if shapes.experts == 1:
        return min(extent.tokens, REFIT_TOKENS)
    return extent.tokens * shapes.chosen // shapes.experts


def peaks(shapes: Shapes, config: ModeGPTConfig, extent: Extent, keep_derivatives: bool) -> list[Peak]:
    """Return the moments that can be the peak. `keep_derivatives` is that of `Placement`."""
    d, inputs, vocabulary = shapes.d_model, shapes.mlp_inputs, shapes.vocabulary
    refits = config.refit_iterations and shapes.separable
    sample = _refit_tokens(shapes, extent) if refits else 0
    stored = sample if shapes.experts == 1 or not refits else extent.tokens
    stream = extent.tokens * d * extent.element
    streams = {
        "residual streams": 7 * stream,
        "outputs of the heads": extent.tokens * shapes.heads * extent.element,
        "sample for the refit of gate and up": 2 * stored * d * FLOAT32,
    }
    # A block may lose less than the mean.
    removed = config.sparsity
    if config.resolved_allocation != "uniform":
        removed /= 2
    width = int(shapes.mlp * (1 - removed))
    vectors = CONJUGATE_VECTORS * inputs * FLOAT32 + 2 * FLOAT64 + FLOAT32
    refit = {
        "block, dense and compressed": 2 * shapes.weights * extent.element,
        "weights in float64 and float32": width * d * vectors,
        "moments of its channels, inverted": inputs * width**2 * FLOAT32,
        "one window of tokens": (3 * inputs + 2) * extent.length * width * FLOAT32,
    }
    if shapes.experts > 1:
        refit["other experts, with their moments"] = (shapes.experts - 1) * (
            (shapes.mlp**2 + shapes.mlp * d) * FLOAT64 + inputs * width * d * FLOAT32
        )
    if keep_derivatives:
        refit["derivatives of the hidden channels"] = inputs * (sample // curvature_stride(sample)) * width * FLOAT32
    tokens = gain_tokens(extent.windows, extent.length, vocabulary)
    gain = {
        "normalised streams": 5 * tokens * d * FLOAT32,
        "head": 2 * vocabulary * d * FLOAT32,
        "next-token distributions": 7 * tokens * vocabulary * FLOAT32,
    }
    found = [(needed, streams) for needed in (*cost.block_memory(shapes, extent), refit)]
    return [*found, (gain, {"residual streams": 3 * stream})]
