"""Multiply-adds and peak memory of the steps that the methods share, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from optimum_modegpt.architectures.shapes import Shapes
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
    return windows * length * (shapes.passed_weights + length * shapes.heads)


def moments_work(shapes: Shapes) -> float:
    """Return the multiply-adds per token of the moments of the inputs of the down and the output projection."""
    mlp = shapes.chosen * (gram_work(shapes.mlp) + shapes.mlp * shapes.d_model)
    mlp += gram_work(shapes.shared) + shapes.shared * shapes.d_model
    return mlp + gram_work(shapes.heads) + shapes.heads * shapes.d_model


def factorisations_work(shapes: Shapes) -> float:
    """Return the multiply-adds of the elimination, and of the solves for the down and the output projection."""
    mlp = shapes.experts * (4 * shapes.mlp**3 / 3 + 4 * shapes.d_model * shapes.mlp**2)
    mlp += 4 * shapes.shared**3 / 3 + 4 * shapes.d_model * shapes.shared**2
    return mlp + shapes.heads**3 / 3 + 2 * shapes.d_model * shapes.heads**2


def metrics_work(shapes: Shapes) -> float:
    """Return the multiply-adds of the factors of both metrics of a block, without their sums over tokens."""
    return 2 * shapes.d_model**3 / 3 + 2 * (shapes.experts * shapes.mlp + shapes.heads) * shapes.d_model**2


def block_memory(shapes: Shapes, extent: Extent) -> list[ByteCounts]:
    """Return the bytes at the peaks of one block: the moments of its MLP, and their factorisation."""
    d, mlp = shapes.d_model, shapes.mlp
    row = extent.element + max(extent.element, 2 * FLOAT32)
    one = mlp**2 + mlp * d
    others = (shapes.experts - 1) * one * FLOAT64 + (shapes.shared**2 + shapes.shared * d) * FLOAT64
    moments = {
        "moments of the MLP": one * (FLOAT64 + FLOAT32) + others,
        "one batch of tokens": extent.batch * (mlp * row + 3 * d * FLOAT32),
    }
    if shapes.eager:
        moments["scores of the attention"] = attention_scores(shapes, extent)
    factorisation = {
        "moments of the MLP, and their factorisation": 4 * mlp**2 * FLOAT64 + others,
        "weights in float64 and float32": shapes.experts * mlp * d * (2 * FLOAT64 + shapes.mlp_inputs * FLOAT32),
    }
    blocks = {"block, dense and compressed": 2 * shapes.weights * extent.element}
    return [blocks | moments, blocks | factorisation]


def attention_scores(shapes: Shapes, extent: Extent) -> int:
    """Return the bytes of the scores of a batch in an eager attention, and of their softmax in float32."""
    return shapes.head_count * extent.batch * extent.length * (extent.element + FLOAT32)
