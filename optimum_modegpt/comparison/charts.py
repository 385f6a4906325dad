"""Compute the coordinates of the page's charts, without a drawing library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 22, 44
BINS = 16


@dataclass(frozen=True)
class Tick:
    """A position on an axis and its label."""

    place: float
    text: str


@dataclass(frozen=True)
class Scale:
    """A linear map of values from `low` to `high` to pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)

    def ticks(self, form: Callable[[float], str], count: int = 4) -> list[Tick]:
        """Return about `count` ticks at round values."""
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * each for each in (1, 2, 5, 10) if power * each >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [Tick(self(index * step), form(index * step)) for index in range(first, last + 1)]


@dataclass(frozen=True)
class Bar:
    """A rectangle and its tooltip."""

    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Rule:
    """A line across the chart at a value: its position, its label and its class."""

    place: float
    text: str
    kind: str


@dataclass(frozen=True)
class Box:
    """A box plot: its name, its class, its height and the positions of the 5, 25, 50, 75 and 95 % quantiles."""

    name: str
    kind: str
    y: float
    places: tuple[float, ...]
    text: str


@dataclass(frozen=True)
class Chart:
    """The elements of one chart, which the template draws. `alt` describes the chart in words."""

    title: str
    x_label: str
    alt: str
    x_ticks: list[Tick]
    y_ticks: list[Tick] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    band: str = ""
    line: str = ""


def histogram(
    title: str,
    x_label: str,
    values: Sequence[float],
    bounds: tuple[float, float],
    marks: Sequence[tuple[float, str, str]],
) -> Chart:
    """Return a histogram of one value per prompt. `marks` are (value, label, class) of lines across the chart."""
    low, high = bounds
    counts = torch.histc(torch.tensor(values, dtype=torch.float64), BINS, low, high).int().tolist()
    across, up = Scale(low, high, LEFT, WIDTH - RIGHT), Scale(0, max(counts), HEIGHT - BOTTOM, TOP + 18)
    step = (high - low) / BINS
    bars = [
        Bar(
            across(low + index * step) + 1,
            up(count),
            round((WIDTH - LEFT - RIGHT) / BINS - 2, 2),
            round(up(0) - up(count), 2),
            f"{count} from {low + index * step:.4g} to {low + (index + 1) * step:.4g}",
        )
        for index, count in enumerate(counts)
        if count
    ]
    return Chart(
        title=title,
        x_label=x_label,
        alt=f"Histogram of {len(values)} prompts from {min(values):.4g} to {max(values):.4g}.",
        x_ticks=across.ticks(lambda value: f"{value:.4g}"),
        y_ticks=up.ticks(lambda value: f"{value:.0f}", min(4, max(counts))),
        bars=bars,
        rules=[Rule(across(value), text, kind) for value, text, kind in marks],
    )


def curve(
    title: str,
    x_label: str,
    lines: tuple[Sequence[float], Sequence[float], Sequence[float]],
    extent: tuple[int, float],
    form: Callable[[float], str],
) -> Chart:
    """Return a chart of a value by token with a band around it.

    `lines` are (low, middle, high). Without a band, all three are equal. `extent` is the number of the first token and
    the top of the axis.
    """
    (low, middle, high), (start, top) = lines, extent
    end = start + len(middle) - 1
    across, up = Scale(start, max(start + 1, end), LEFT, WIDTH - RIGHT), Scale(0, top, HEIGHT - BOTTOM, TOP)
    upper, lower, line = (
        [f"{across(token)},{up(value)}" for token, value in enumerate(values, start)] for values in (high, low, middle)
    )
    return Chart(
        title=title,
        x_label=x_label,
        alt=f"Line from {form(middle[0])} at token {start} to {form(middle[-1])} at token {end}.",
        x_ticks=across.ticks(lambda value: f"{value:.0f}", min(6, len(middle))),
        y_ticks=up.ticks(form),
        band=" ".join((*upper, *reversed(lower))) if low != high else "",
        line=" ".join(line),
    )


def boxes(title: str, x_label: str, rows: Sequence[tuple[str, str, Sequence[float]]]) -> Chart:
    """Return box plots of (name, class, values), one below the other, on an axis from 0."""
    found = [(name, kind, _percentiles(values)) for name, kind, values in rows]
    across = Scale(0, max(places[-1] for *_, places in found) * 1.05, LEFT, WIDTH - RIGHT)
    drawn = [
        Box(
            name,
            kind,
            62 + 72 * index,
            tuple(across(place) for place in places),
            f"{name}: median {places[2]:.3g}, 95 % under {places[4]:.3g}",
        )
        for index, (name, kind, places) in enumerate(found)
    ]
    return Chart(
        title=title,
        x_label=x_label,
        alt=". ".join(box.text for box in drawn) + ".",
        x_ticks=across.ticks(lambda value: f"{value:.4g}"),
        boxes=drawn,
    )


def _percentiles(values: Sequence[float]) -> list[float]:
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    return torch.tensor(values, dtype=torch.float64).quantile(levels).tolist()
