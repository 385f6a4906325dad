"""Figures of a report. Needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    kept = {part: [block.parts[part].rank / block.parts[part].dense_rank for block in report.blocks] for part in PARTS}
    return plot_kept(kept, f"{report.base_model or 'model'}: {report.achieved_sparsity:.1%} removed", path)


def plot_kept(kept: Mapping[str, Sequence[float]], title: str, path: str | Path | None = None) -> Figure:
    """Kept fractions by part, one bar a block; as `plot_ranks`, for what has no report."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'optimum-modegpt[plot]'") from error
    indices = range(len(kept["mlp"]))
    figure = Figure(figsize=(max(6.0, 0.3 * len(indices) + 2), 5.0), layout="constrained")
    axes = figure.subplots(len(PARTS), 1, sharex=True, sharey=True)
    for part, axis in zip(PARTS, axes, strict=True):
        axis.bar(indices, kept[part], color=COLOURS[part])
        axis.set_title(TITLES[part], loc="left", fontsize=10)
        axis.set_ylim(0, 1)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_ylabel("kept fraction of the width")
    axes[-1].set_xlabel("block")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, fontsize=11)
    if path is not None:
        figure.savefig(path, dpi=100)
    return figure
