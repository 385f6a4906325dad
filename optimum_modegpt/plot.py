"""Draw the figures of reports and benchmarks. Requires the extra `plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

TITLES = {"mlp": "MLP", "qk": "query, key", "vo": "value, output", "shared": "shared expert"}
BAR = 0.28
COLOURS = {"mlp": "#4c72b0", "qk": "#dd8452", "vo": "#55a868", "shared": "#8172b3"}


def plot_kept(kept: Mapping[str, Sequence[float]], title: str, path: str | Path | None = None) -> Figure:
    """Plot the kept fraction of each part's width, one bar per block and part.

    `kept` maps each part to the kept fraction of every block, which is not a number if the block lacks the part. If
    `path` is given, the figure is also saved there, in the format of the file extension. Raises `ImportError` if
    matplotlib is not installed.
    """
    blocks, width = len(kept["mlp"]), 3 * BAR / len(kept)
    figure = _figure(min(max(6.5, 0.3 * blocks + 1), 16), 3.2)
    axis = figure.subplots()
    for place, (part, shares) in enumerate(kept.items()):
        middles = [block + (place - (len(kept) - 1) / 2) * width for block in range(blocks)]
        axis.bar(middles, shares, width=width, color=COLOURS[part], label=TITLES[part])
    axis.set(xlabel="block", ylabel="kept fraction of the width", ylim=(0, 1))
    axis.locator_params(axis="x", integer=True)
    axis.margins(x=0.01)
    axis.spines[["top", "right"]].set_visible(False)
    _make_legible(axis.set_title(title, loc="left", fontsize=10, pad=22))
    axis.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=len(kept), frameon=False, fontsize=9)
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

    The error bars show the range of the runs. `settings` are the labels of the settings. `speeds` maps measure -> model
    -> (lowest, median, highest) of every setting, or None for a setting without a result. `path` and errors are those
    of `plot_kept`.
    """
    figure = _figure(min(max(6.5, 1.1 * len(settings) + 2), 16), 3.0 * len(speeds))
    for axis, (measure, models) in zip(figure.subplots(len(speeds), squeeze=False).flat, speeds.items(), strict=True):
        for place, (model, found) in enumerate(models.items()):
            middles, heights, below, above = [], [], [], []
            for setting, spread in enumerate(found):
                if spread is not None:
                    low, median, high = spread
                    middles.append(setting + (place - (len(models) - 1) / 2) * BAR)
                    heights.append(median)
                    below.append(median - low)
                    above.append(high - median)
            colour = list(COLOURS.values())[place]
            axis.bar(middles, heights, width=BAR, yerr=[below, above], capsize=2, color=colour, label=model)
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
    """Return the file extensions that matplotlib can save. Errors are those of `plot_kept`."""
    return sorted(_figure(1, 1).canvas.get_supported_filetypes())


def _make_legible(text: Text) -> None:
    """Escape the characters that the font lacks, which matplotlib would draw as boxes with several warnings."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    words, known = text.get_text(), get_font(findfont(FontProperties())).get_charmap()
    for letter in set(words):
        if ord(letter) not in known:
            words = words.replace(letter, letter.encode("unicode_escape").decode())
    text.set_text(words)
    text.set_parse_math(False)  # a name with two dollar signs is not a formula


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure. `width` and `height` are in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting requires matplotlib: pip install 'optimum-modegpt[plot]'") from error
    return Figure(figsize=(width, height))
