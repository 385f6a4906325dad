"""The tensors that a compression holds at its peak, from shapes alone: bytes by what takes them.

Counted are tensors: what an allocator keeps back of freed ones, and the program itself, come on top.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from optimum_modegpt.budget.work import Extent, Shapes
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.nystrom import SHRINK
from optimum_modegpt.methods import sensitivity
from optimum_modegpt.methods.residual_matched import REFIT_TOKENS, gain_tokens
from optimum_modegpt.report import PARTS

FLOAT64 = 8
FLOAT32 = 4
CONJUGATE_VECTORS = 9
"""Of the refit of gate and up: the rows, a few steps, residuals and directions, each as large as they."""

ByteCounts = dict[str, int]
"""Bytes by what takes them."""


@dataclass(frozen=True)
class Peak:
    """What is held at a moment that can be the peak: to compute with, and streams, wherever they are kept."""

    work: ByteCounts
    streams: ByteCounts


def peaks(shapes: Shapes, config: ModeGPTConfig, extent: Extent, keep_derivatives: bool) -> list[Peak]:
    """The moments that can be the peak; `keep_derivatives` as in an `Arrangement`."""
    three = {"residual streams": 3 * extent.tokens * shapes.d_model * extent.element}
    if config.method == "default":
        streams = _streams(shapes, config, extent)
        found = [Peak(work, streams) for work in _block_work(shapes, config, extent)]
        found += [Peak(work, streams) for work in _refit_work(shapes, config, extent, keep_derivatives)]
        found.append(Peak(_final_gain(shapes, extent), three))
    else:
        found = [Peak(work, three) for work in _block_work(shapes, config, extent)]
    if config.resolved_allocation == "sensitivity" and config.sparsity:
        found += _sensitivities(shapes, config, extent)
    return found


def _streams(shapes: Shapes, config: ModeGPTConfig, extent: Extent) -> ByteCounts:
    """While gate and up are refitted: the streams that enter the model and the block, what the dense block makes of its
    own, the compressed one after the attention; heads' outputs; normalised inputs and targets in float32."""
    entering = 1 if shapes.blocks == 1 else 3
    stream = extent.tokens * extent.element
    sample = 2 * min(extent.tokens, REFIT_TOKENS) * shapes.d_model * FLOAT32 if config.refit_iterations else 0
    return {
        "residual streams": (entering + 3 + 1) * stream * shapes.d_model,
        "outputs of the heads": stream * shapes.heads,
        "sample for the refit of gate and up": sample,
    }


def _block_work(shapes: Shapes, config: ModeGPTConfig, extent: Extent) -> Iterator[ByteCounts]:
    """One block: its moments, the elimination, the curvature of its attention.

    The counts of matrices are those of the code at that moment, a Cholesky solve with two copies of its own.
    """
    d, mlp, inputs, element = shapes.d_model, shapes.mlp, shapes.mlp_inputs, extent.element
    blocks = {"block, dense and compressed": 2 * shapes.weights * element}
    seen = blocks if config.method == "default" else {"block, dense": shapes.weights * element}
    raised = 2 * FLOAT32 if element < FLOAT32 else element  # and weighted
    yield {
        **seen,
        "moments of the MLP": (mlp**2 + mlp * d) * (FLOAT64 + FLOAT32),
        "one batch of tokens": extent.batch * (mlp * (element + raised) + 3 * d * FLOAT32),
    }
    if shapes.eager:
        yield {
            **seen,
            "moments of the MLP": (mlp**2 + mlp * d) * FLOAT64,
            "scores of the attention": attention_scores(shapes, extent),
        }
    # While the inverse is made, then while it shrinks.
    for matrices, weights in ((4, 2), (2 + SHRINK + SHRINK**2, 3 + SHRINK)):
        yield {
            **blocks,
            "moments of the MLP, and their factorisation": int(matrices * mlp**2) * FLOAT64,
            "weights in float64 and float32": mlp * d * int(weights * FLOAT64 + inputs * FLOAT32),
        }
    groups, size = shapes.groups, shapes.heads // shapes.head_count
    yield {
        **blocks,
        "curvature of the attention": extent.length**2 * size
        + (groups + 2) * extent.length * size**2
        + 3 * extent.batch * extent.length * (shapes.head_count // groups),
        "one batch of tokens": 6 * extent.batch * shapes.heads * FLOAT32,
    }


def _refit_work(shapes: Shapes, config: ModeGPTConfig, extent: Extent, keep_derivatives: bool) -> Iterator[ByteCounts]:
    """The refit of gate and up of one block, and of down after it."""
    if not config.refit_iterations or not config.sparsity:
        return
    d, inputs, left = shapes.d_model, shapes.mlp_inputs, _channels_halfway(shapes.mlp, config)
    blocks = {"block, dense and compressed": 2 * shapes.weights * extent.element}
    down, vectors = left * d * (2 * FLOAT64 + FLOAT32), inputs * left * d * FLOAT32
    channels = inputs * min(extent.tokens, REFIT_TOKENS) * left * FLOAT32
    derivatives = {"derivatives of the hidden channels": channels} if keep_derivatives else {}
    yield {
        **blocks,
        **derivatives,
        "weights in float64 and float32": down + vectors,
        "moments of its channels, inverted": 2 * (inputs + 1) * left**2 * FLOAT32,
    }
    yield {
        **blocks,
        **derivatives,
        "weights in float64 and float32": down + CONJUGATE_VECTORS * vectors,
        "moments of its channels, inverted": inputs * left**2 * FLOAT32,
        "one window of tokens": (3 * inputs + 2) * extent.length * left * FLOAT32,
    }
    yield {
        **blocks,
        "weights in float64 and float32": 2 * down + vectors,
        "moments of the MLP, and their factorisation": 3 * left**2 * FLOAT64,
    }


def attention_scores(shapes: Shapes, extent: Extent) -> int:
    """Bytes of what transformers' eager attention holds of a batch: products, and their softmax in float32."""
    return shapes.head_count * extent.batch * extent.length * (extent.element + FLOAT32)


def _down_refit(shapes: Shapes, left: int) -> ByteCounts:
    """Down refitted for some channels, while the moments of all are held for the next choice."""
    d, mlp = shapes.d_model, shapes.mlp
    return {
        "moments of the MLP, and their factorisation": (mlp**2 + 3 * left**2) * FLOAT64,
        "weights in float64 and float32": d
        * ((2 * mlp + 5 * left) * FLOAT64 + shapes.mlp_inputs * (mlp + left) * FLOAT32),
    }


def _channels_halfway(mlp: int, config: ModeGPTConfig) -> int:
    """Where half of the channels that go are gone; where the plan is not uniform, of a block that is cut little."""
    removed = config.sparsity if config.resolved_allocation == "uniform" else config.sparsity / 2
    return int(mlp * (1 - removed / 2))


def _final_gain(shapes: Shapes, extent: Extent) -> ByteCounts:
    """The final norm: distributions over the vocabulary as targets, twice, and those of the model with products."""
    tokens = gain_tokens(extent.windows, extent.length, shapes.vocabulary)
    return {
        "normalised streams": 5 * tokens * shapes.d_model * FLOAT32,
        "head": 2 * shapes.vocabulary * shapes.d_model * FLOAT32,
        "next-token distributions": 7 * tokens * shapes.vocabulary * FLOAT32,
    }


def _sensitivities(shapes: Shapes, config: ModeGPTConfig, extent: Extent) -> Iterator[Peak]:
    """What a sweep cuts passes the rest of the model together; logits are taken a few rows at a time."""
    used, window = sensitivity.budget(shapes.blocks, extent.windows), extent.length * shapes.d_model * extent.element
    cut = sensitivity.sweep_length(shapes.blocks) * len(PARTS) * len(used.ratios) * used.divergence_windows
    # All windows; those for moments in front of the block and both sums in it; the dense ones to compare with.
    own = (extent.windows + 3 * used.moment_windows + 2 * used.divergence_windows) * window
    streams = {"residual streams": own, "streams of the variants": cut * window}
    batch = min(extent.batch, sensitivity.LOGITS_AT_ONCE // shapes.vocabulary)
    logits = batch * shapes.vocabulary * (4 * FLOAT32 + extent.element)
    tail = {"head": shapes.vocabulary * shapes.d_model * extent.element}
    yield Peak({**tail, "block": shapes.weights * extent.element, "next-token distributions": logits}, streams)
    cut_least = _down_refit(shapes, int(shapes.mlp * (1 - min(used.ratios))))
    blocks = {"block, dense and compressed": 2 * shapes.weights * extent.element}
    for work in (*_block_work(shapes, config, extent), {**blocks, **cut_least}):
        yield Peak({**work, "variant": shapes.weights * extent.element}, streams)
