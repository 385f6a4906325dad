"""Multiply-adds and peak memory of the steps that the methods share, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from optimum_modegpt.architectures.shapes import Shapes
from optimum_modegpt.calibration.moments import QUERY_STRIDE
from optimum_modegpt.decompositions.psd import gram_work

FLOAT64, FLOAT32 = 8, 4

Work = dict[str, float]
"""Multiply-adds by precision: "own" (of the model), "moments" (of rows), "raised" (float32), "exact" (float64)."""
ByteCounts = dict[str, int]
"""Bytes by purpose."""
Peak = tuple[ByteCounts, ByteCounts]
"""Bytes in use at a moment that can be the peak: for computing, and of the streams on any storage."""


@dataclass(frozen=True)
class Extent:
    """The size of the calibration: windows, tokens per window, tokens per batch, bytes per activation."""

    windows: int
    length: int
    batch: int
    element: int

    @property
    def tokens(self) -> int:
        """Return the number of calibration tokens."""
        return self.windows * self.length


def product_seconds(work: Work, rates: Mapping[str, float]) -> float:
    """Return the time of the products at `rates`, in multiply-adds per second by precision."""
    return sum(amount / rates[precision] for precision, amount in work.items())


def block_forward(shapes: Shapes, windows: float, length: int) -> float:
    """Return the multiply-adds of one block over `windows`, with the visible half of the attention."""
    return windows * length * (shapes.weights + length * shapes.heads)


def moments_work(shapes: Shapes) -> float:
    """Return the multiply-adds per token of the moments of the inputs of the down and the output projection."""
    return gram_work(shapes.mlp) + gram_work(shapes.heads) + (shapes.mlp + shapes.heads) * shapes.d_model


def factorisations_work(shapes: Shapes) -> float:
    """Return the multiply-adds of the elimination, and of the solves for the down and the output projection."""
    return (4 * shapes.mlp**3 + shapes.heads**3) / 3 + 2 * shapes.d_model * (2 * shapes.mlp**2 + shapes.heads**2)


def block_memory(shapes: Shapes, extent: Extent) -> list[ByteCounts]:
    """Return the bytes at the peaks of one block: the moments of its MLP, their factorisation, and the curvature."""
    d, mlp, head_dim = shapes.d_model, shapes.mlp, shapes.heads // shapes.head_count
    row = extent.element + max(extent.element, 2 * FLOAT32)
    moments = {
        "moments of the MLP": (mlp**2 + mlp * d) * (FLOAT64 + FLOAT32),
        "one batch of tokens": extent.batch * (mlp * row + 3 * d * FLOAT32),
    }
    if shapes.eager:
        moments["scores of the attention"] = attention_scores(shapes, extent)
    factorisation = {
        "moments of the MLP, and their factorisation": 4 * mlp**2 * FLOAT64,
        "weights in float64 and float32": mlp * d * (2 * FLOAT64 + shapes.mlp_inputs * FLOAT32),
    }
    scatter = extent.length * head_dim + (shapes.groups + 2) * head_dim**2
    scores = 3 * extent.batch * shapes.head_count // shapes.groups
    curvature = {
        "curvature of the attention": extent.length // QUERY_STRIDE * (scatter + scores) * FLOAT32,
        "one batch of tokens": 6 * extent.batch * shapes.heads * FLOAT32,
    }
    blocks = {"block, dense and compressed": 2 * shapes.weights * extent.element}
    return [blocks | moments, blocks | factorisation, blocks | curvature]


def attention_scores(shapes: Shapes, extent: Extent) -> int:
    """Return the bytes of the scores of a batch in an eager attention, and of their softmax in float32."""
    return shapes.head_count * extent.batch * extent.length * (extent.element + FLOAT32)
