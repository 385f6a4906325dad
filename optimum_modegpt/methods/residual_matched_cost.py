"""Multiply-adds and peak memory of `method="default"`."""

from __future__ import annotations

from collections.abc import Sequence

from optimum_modegpt.architectures.shapes import Shapes
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.psd import gram_work
from optimum_modegpt.decompositions.softmax import ITERATIONS
from optimum_modegpt.methods import cost
from optimum_modegpt.methods.cost import FLOAT32, FLOAT64, Extent, Peak, Work
from optimum_modegpt.methods.input_refit import CURVATURE, FINAL_ROUNDS, REFIT_TOKENS, refits_inputs
from optimum_modegpt.methods.residual_matched import gain_tokens

FITTED = 7 / 8
"""Share of the windows that gate and up are fitted to. The others are held out."""
CONJUGATE_VECTORS = 9
"""Tensors as large as gate and up during their refit: the rows, a few steps, residuals and directions."""


def work(shapes: Shapes, config: ModeGPTConfig, extent: Extent, widths: Sequence[int]) -> dict[str, Work]:
    """Return the multiply-adds of all blocks together, by step. `widths` are the kept widths of the MLPs.

    The refit of gate and up is counted with all its rounds and iterations, although it may end early, and with
    the first damping only.
    """
    blocks, d = shapes.blocks, shapes.d_model
    steps = {
        "residual streams": {"own": blocks * 2 * cost.block_forward(shapes, extent.windows, extent.length)},
        "moments": {"moments": blocks * extent.tokens * cost.moments_work(shapes)},
        "factorisations": {"exact": blocks * cost.factorisations_work(shapes)},
    }
    cut = []
    for width in widths:
        if (
            shapes.experts == 1
            and width < shapes.mlp
            and refits_inputs(extent.tokens, width, shapes.mlp_inputs, config)
        ):
            cut.append(width)
    if cut:
        width, tokens = sum(cut) // len(cut), min(extent.tokens, REFIT_TOKENS)
        halfway = (width + shapes.mlp) // 2
        raised = exact = 0.0
        for left in (halfway, *[width] * FINAL_ROUNDS):
            raised += _refit_work(shapes, config, tokens, left)
            exact += 2 * d * left**2 + left**3 / 3
        # The held-out windows before and after the rounds, or all tokens at the end.
        raised += (1 - FITTED) * tokens * _hidden_work(shapes, shapes.mlp)
        last = (1 - FITTED) * tokens if extent.tokens <= REFIT_TOKENS else extent.tokens
        raised += last * _hidden_work(shapes, width)
        steps["refit of gate and up"] = {"raised": len(cut) * raised, "exact": len(cut) * exact}
    if config.sparsity:
        tokens = gain_tokens(extent.windows, extent.length, shapes.vocabulary)
        # Two products with the head per iteration, and a few around them.
        steps["final gain"] = {"raised": (2 * ITERATIONS + 6) * tokens * shapes.vocabulary * d}
    return steps


def _hidden_work(shapes: Shapes, width: int) -> float:
    """Return the multiply-adds per token of the moments of `width` hidden channels."""
    return (shapes.mlp_inputs + 1) * shapes.d_model * width + gram_work(width)


def _refit_work(shapes: Shapes, config: ModeGPTConfig, tokens: int, width: int) -> float:
    """Return the multiply-adds of one refit of gate and up at `width` channels, and of the moments after it."""
    d, matrices, iterations = shapes.d_model, shapes.mlp_inputs, config.refit_iterations
    output = (matrices + 1) * d * width  # per token, from the input to the output
    # The gradient, and each product with the curvature, goes there and back.
    gradient = 2 * output * FITTED
    curvature = FITTED * CURVATURE * (2 * output * iterations + matrices * gram_work(width) + gram_work(d))
    errors = (1 - FITTED) * (1 + iterations) * output
    moments = FITTED * _hidden_work(shapes, width)
    factors = (1 + iterations) * matrices * d * width * (width + d) + matrices * width**3 + d**3
    return tokens * (gradient + curvature + errors + moments) + factors


def peaks(shapes: Shapes, config: ModeGPTConfig, extent: Extent, keep_derivatives: bool) -> list[Peak]:
    """Return the moments that can be the peak. `keep_derivatives` is that of `Placement`."""
    d, inputs, vocabulary = shapes.d_model, shapes.mlp_inputs, shapes.vocabulary
    refits = config.refit_iterations and shapes.experts == 1
    sample = min(extent.tokens, REFIT_TOKENS) if refits else 0
    stream = extent.tokens * d * extent.element
    streams = {
        "residual streams": 7 * stream,
        "outputs of the heads": extent.tokens * shapes.heads * extent.element,
        "sample for the refit of gate and up": 2 * sample * d * FLOAT32,
    }
    # The first round still has half of the removed channels. A block may lose less than the mean.
    removed = config.sparsity
    if config.resolved_allocation != "uniform":
        removed /= 2
    width = int(shapes.mlp * (1 - removed / 2))
    vectors = CONJUGATE_VECTORS * inputs * FLOAT32 + 2 * FLOAT64 + FLOAT32
    refit = {
        "block, dense and compressed": 2 * shapes.weights * extent.element,
        "weights in float64 and float32": width * d * vectors,
        "moments of its channels, and their inverses": 2 * inputs * width**2 * FLOAT32,
        "one window of tokens": (3 * inputs + 2) * extent.length * width * FLOAT32,
    }
    if keep_derivatives:
        refit["derivatives of the hidden channels"] = int(CURVATURE * inputs * sample * width * FLOAT32)
    tokens = gain_tokens(extent.windows, extent.length, vocabulary)
    gain = {
        "normalised streams": 5 * tokens * d * FLOAT32,
        "head": 2 * vocabulary * d * FLOAT32,
        "next-token distributions": 7 * tokens * vocabulary * FLOAT32,
    }
    found = [(needed, streams) for needed in (*cost.block_memory(shapes, extent), refit)]
    return [*found, (gain, {"residual streams": 3 * stream})]
