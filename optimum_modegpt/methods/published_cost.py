"""Multiply-adds and peak memory of `method="paper"`."""

from __future__ import annotations

from collections.abc import Sequence

from optimum_modegpt.architectures.shapes import Shapes
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.psd import gram_work
from optimum_modegpt.methods.cost import Extent, Peak, Work, block_forward, block_memory


def work(shapes: Shapes, config: ModeGPTConfig, extent: Extent, widths: Sequence[int]) -> dict[str, Work]:
    """Return the multiply-adds of all blocks together, by step. They depend on neither `config` nor `widths`."""
    moments = shapes.d_model**2 + gram_work(shapes.mlp) + shapes.heads**2 // shapes.head_count
    return {
        "residual streams": {"own": shapes.blocks * block_forward(shapes, extent.windows, extent.length)},
        "moments": {"moments": shapes.blocks * extent.tokens * moments},
        "factorisations": {"exact": shapes.blocks * (shapes.mlp**3 + 10 * shapes.d_model**3)},
    }


def peaks(shapes: Shapes, config: ModeGPTConfig, extent: Extent, keep_derivatives: bool) -> list[Peak]:
    """Return the moments that can be the peak. They do not depend on `config` or `keep_derivatives`."""
    streams = {"residual streams": 3 * extent.tokens * shapes.d_model * extent.element}
    return [(needed, streams) for needed in block_memory(shapes, extent)]
