"""Plot a report or a benchmark. Requires the extra `plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from optimum_modegpt.report import PARTS, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

TITLES = {"mlp": "MLP", "qk": "query, key", "vo": "value, output"}
BAR = 0.28
PLACEHOLDERS = "Last Resort"
"""Start of the names of placeholder fonts, which draw a box for every character."""
COLOURS = {"mlp": "#4c72b0", "qk": "#dd8452", "vo": "#55a868"}


def plot_ranks(report: Report, path: str | Path | None = None) -> Figure:
    """Plot the kept fraction of each part's width, block by block.

    The figure is also saved to `path`, if given. The file extension selects the format.

    Raises:
        ImportError: matplotlib is not installed. The message names the extra to install.
    """
    kept = {part: [block.parts[part].rank / block.parts[part].dense_rank for block in report.blocks] for part in PARTS}
    return plot_kept(kept, f"{report.base_model or 'model'}: {report.achieved_sparsity:.1%} removed", path)


def plot_kept(kept: Mapping[str, Sequence[float]], title: str, path: str | Path | None = None) -> Figure:
    """Plot kept fractions by part, one bar per block. Like `plot_ranks`, but without a report."""
    blocks = len(kept["mlp"])
    figure = _figure(min(max(6.5, 0.3 * blocks + 1), 16), 3.2)
    axis = figure.subplots()
    for place, part in enumerate(PARTS):
        middles = [block + (place - 1) * BAR for block in range(blocks)]
        axis.bar(middles, kept[part], width=BAR, color=COLOURS[part], label=TITLES[part])
    axis.set(xlabel="block", ylabel="kept fraction of the width", ylim=(0, 1))
    axis.locator_params(axis="x", integer=True)
    axis.margins(x=0.01)
    axis.spines[["top", "right"]].set_visible(False)
    _make_legible(axis.set_title(title, loc="left", fontsize=10, pad=22))
    axis.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=len(PARTS), frameon=False, fontsize=9)
    if path is not None:
        figure.savefig(path, dpi=120, bbox_inches="tight")
    return figure


def plot_speeds(
    settings: Sequence[str],
    speeds: Mapping[str, Mapping[str, Sequence[tuple[float, float, float] | None]]],
    title: str,
    path: str | Path | None = None,
) -> Figure:
    """Plot tokens per second at each setting, with one panel per measure and one bar per model.

    The error bars show the range of the runs. The figure is also saved to `path`, if given. The file extension selects
    the format.

    Args:
        settings: labels of the settings.
        speeds: measure -> model -> (lowest, median, highest) of every setting, or None for a setting without a result.
        title: title of the figure.
        path: file to save the figure to.

    Raises:
        ImportError: matplotlib is not installed. The message names the extra to install.
    """
    figure = _figure(min(max(6.5, 1.1 * len(settings) + 2), 16), 3.0 * len(speeds))
    for axis, (measure, models) in zip(figure.subplots(len(speeds), squeeze=False).flat, speeds.items(), strict=True):
        for place, (model, found) in enumerate(models.items()):
            shown = [(setting, spread) for setting, spread in enumerate(found) if spread is not None]
            middles = [setting + (place - (len(models) - 1) / 2) * BAR for setting, _ in shown]
            heights = [median for _, (_, median, _) in shown]
            reach = [
                [median - low for _, (low, median, _) in shown],
                [high - median for _, (_, median, high) in shown],
            ]
            colour = list(COLOURS.values())[place]
            axis.bar(middles, heights, width=BAR, yerr=reach, capsize=2, color=colour, label=model)
        axis.set_xticks(range(len(settings)), settings)
        axis.set(ylabel=f"{measure}, tokens/s", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    first, *_, last = [*figure.axes, *figure.axes]
    _make_legible(first.set_title(title, loc="left", fontsize=10, pad=22))
    legend = first.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=2, frameon=False, fontsize=9)
    for name in legend.get_texts():
        _make_legible(name)
    last.set_xlabel("batch × prompt length")
    figure.tight_layout()
    if path is not None:
        figure.savefig(path, dpi=120, bbox_inches="tight")
    return figure


def picture_formats() -> list[str]:
    """Return the file extensions that matplotlib can save.

    Raises:
        ImportError: matplotlib is not installed. The message names the extra to install.
    """
    return sorted(_figure(1, 1).canvas.get_supported_filetypes())


def _make_legible(text: Text) -> None:
    """Set a fallback font for characters that the default font lacks, and escape those that no font has.

    Otherwise, matplotlib draws a box for such a character and warns several times.
    """
    from matplotlib.font_manager import FontProperties, findfont, get_font

    words, default = text.get_text(), FontProperties()
    missing = {ord(letter) for letter in words} - get_font(findfont(default)).get_charmap().keys()
    if missing:
        covered = {name: missing & get_font(file).get_charmap().keys() for name, file in _regular_fonts().items()}
        name = max(covered, key=lambda name: len(covered[name]), default=None)
        if name is not None and covered[name]:
            text.set_fontfamily([*default.get_family(), name])
            missing -= covered[name]
    text.set_text(words.translate({letter: chr(letter).encode("unicode_escape").decode() for letter in missing}))
    text.set_parse_math(False)  # a name with two dollar signs is not a formula


def _regular_fonts() -> dict[str, str]:
    """Return a mapping name -> file of the installed upright fonts of regular weight."""
    from matplotlib.font_manager import fontManager

    upright = [font for font in fontManager.ttflist if font.style == "normal" and font.weight == 400]
    return {font.name: font.fname for font in upright if not font.name.startswith(PLACEHOLDERS)}


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure. `width` and `height` are in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting requires matplotlib: pip install 'optimum-modegpt[plot]'") from error
    return Figure(figsize=(width, height))
