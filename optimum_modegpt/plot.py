"""Figures of a report. Needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from optimum_modegpt.report import PARTS, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {"mlp": "MLP", "qk": "query, key", "vo": "value, output"}
BAR = 0.28
COLOURS = {"mlp": "#4c72b0", "qk": "#dd8452", "vo": "#55a868"}


def plot_ranks(report: Report, path: str | Path | None = None) -> Figure:
    """The kept fraction of each part's width, block by block; also written to `path`, whose ending names the format.

    Raises:
        ImportError: without matplotlib, naming the extra that brings it.
    """
    kept = {part: [block.parts[part].rank / block.parts[part].dense_rank for block in report.blocks] for part in PARTS}
    return plot_kept(kept, f"{report.base_model or 'model'}: {report.achieved_sparsity:.1%} removed", path)


def plot_kept(kept: Mapping[str, Sequence[float]], title: str, path: str | Path | None = None) -> Figure:
    """Kept fractions by part, one bar a block; as `plot_ranks`, for what has no report."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'optimum-modegpt[plot]'") from error
    blocks = len(kept["mlp"])
    figure = Figure(figsize=(min(max(6.5, 0.3 * blocks + 1), 16), 3.2))
    axis = figure.subplots()
    for place, part in enumerate(PARTS):
        middles = [block + (place - 1) * BAR for block in range(blocks)]
        axis.bar(middles, kept[part], width=BAR, color=COLOURS[part], label=TITLES[part])
    axis.set(xlabel="block", ylabel="kept fraction of the width", ylim=(0, 1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.margins(x=0.01)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, loc="left", fontsize=10, pad=22)
    axis.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=len(PARTS), frameon=False, fontsize=9)
    if path is not None:
        figure.savefig(path, dpi=120, bbox_inches="tight")
    return figure
