"""Figures of a report. Needs the extra `plot`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from optimum_modegpt.report import PARTS, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {"mlp": "MLP", "qk": "query, key", "vo": "value, output"}
COLOURS = {"mlp": "#4c72b0", "qk": "#dd8452", "vo": "#55a868"}


def plot_ranks(report: Report, path: str | Path | None = None) -> Figure:
    """The kept fraction of each part's width, block by block; also written to `path`, whose ending names the format.

    Raises:
        ImportError: without matplotlib, naming the extra that brings it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'optimum-modegpt[plot]'") from error
    indices = [block.index for block in report.blocks]
    figure = Figure(figsize=(max(6.0, 0.3 * len(indices) + 2), 6.0), layout="constrained")
    axes = figure.subplots(len(PARTS), 1, sharex=True, sharey=True)
    for part, axis in zip(PARTS, axes, strict=True):
        kept = [block.parts[part].rank / block.parts[part].dense_rank for block in report.blocks]
        axis.bar(indices, kept, color=COLOURS[part])
        axis.set_title(TITLES[part], loc="left", fontsize=10)
        axis.set_ylim(0, 1)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_ylabel("kept fraction of the width")
    axes[-1].set_xlabel("block")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(f"{report.base_model or 'model'}: {report.achieved_sparsity:.1%} removed", fontsize=11)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
