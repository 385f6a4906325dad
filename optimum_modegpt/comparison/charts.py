"""Prepare the charts of the page. The template draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence

from optimum_modegpt.comparison.records import Comparison
from optimum_modegpt.comparison.thresholds import Check

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 22, 44
BINS = 16


@dataclass(frozen=True)
class Axis:
    """A linear map of values to pixels, with about `count` ticks at round values."""

    low: float
    high: float
    start: float = LEFT
    end: float = WIDTH - RIGHT
    form: str = "{:.4g}"
    count: int = 4

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)

    def ticks(self) -> list[tuple[float, str]]:
        """Return the position and the label of each tick."""
        rough = (self.high - self.low) / self.count
        power = 10.0 ** math.floor(math.log10(rough))
        for step in (power, 2 * power, 5 * power, 10 * power):
            if step >= rough * 0.999:
                break
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(self(index * step), self.form.format(index * step)) for index in range(first, last + 1)]


@dataclass(frozen=True)
class Chart:
    """The data of one chart. `alt` describes the chart in words."""

    title: str
    x_label: str
    alt: str
    x: Axis
    y: Axis | None = None
    bars: list[tuple[float, float, int]] = field(default_factory=list)
    """Start, end and height of each bar of a histogram."""
    marks: list[tuple[float, str, str]] = field(default_factory=list)
    """Value, label and class of each line across the chart."""
    boxes: list[tuple[str, list[float], str]] = field(default_factory=list)
    """Model, the 5, 25, 50, 75 and 95 % quantiles of its values, and these in words."""
    band: str = ""
    line: str = ""
    """Points of a curve and of the area around it."""


def page_charts(found: Comparison, checks: Sequence[Check]) -> list[Chart]:
    """Return the charts of a comparison."""
    charts = [
        *_by_prompt(found, {check.measure: check.allowed for check in checks}),
        _kl_by_token(found),
        _still_equal(found),
        _latency("Time to first token", found, "first_token_seconds"),
    ]
    if found.costs.per_token and found.reference_costs.per_token:
        charts.append(_latency("Time per further token", found, "seconds_per_token"))
    return charts


def _by_prompt(found: Comparison, limits: dict[str, float]) -> tuple[Chart, Chart]:
    values = [record.kl for record in found.records]
    high = max(*values, 1e-6)
    marks = [(found.kl, f"mean {found.kl:.3g}", "mean")]
    if (limit := limits.get("KL divergence")) is not None:
        high = max(high, limit)
        marks.append((limit, f"at most {limit:g}", "limit"))
    kl = _histogram("KL divergence by prompt", "mean nats per position", values, Axis(0, high * 1.02), marks)

    values = [100 * record.top1_agreement for record in found.records]
    low = min(*values, 99)
    mean = 100 * found.top1_agreement
    marks = [(mean, f"mean {mean:.3g} %", "mean")]
    if (limit := limits.get("top-1 agreement")) is not None:
        low = min(low, 100 * limit)
        marks.append((100 * limit, f"at least {100 * limit:g} %", "limit"))
    x = Axis(10 * (low // 10), 100)
    return kl, _histogram("Top-1 agreement by prompt", "% of positions", values, x, marks)


def _histogram(title: str, x_label: str, values: list[float], x: Axis, marks: list[tuple[float, str, str]]) -> Chart:
    """Return a histogram of one value per prompt."""
    counts = torch.histc(torch.tensor(values, dtype=torch.float64), BINS, x.low, x.high).int().tolist()
    step = (x.high - x.low) / BINS
    bars = [(x.low + at * step, x.low + (at + 1) * step, count) for at, count in enumerate(counts) if count]
    alt = f"Histogram of {len(values)} prompts from {min(values):.4g} to {max(values):.4g}."
    y = Axis(0, max(counts), HEIGHT - BOTTOM, TOP + 18, "{:.0f}", min(4, max(counts)))
    return Chart(title, x_label, alt, x, y, bars, marks)


def _kl_by_token(found: Comparison) -> Chart:
    rows = [torch.tensor(record.kl_by_token) for record in found.records]
    padded = pad_sequence(rows, batch_first=True, padding_value=math.nan)  # (prompts, tokens)
    low, high = padded.nanquantile(torch.tensor([0.1, 0.9]), dim=0).tolist()
    middle = padded.nanmean(dim=0).tolist()
    title, x_label = "KL divergence along the continuation", "token of the reference's continuation"
    return _curve(title, x_label, middle, 1, max(*middle, *high, 1e-6), "{:.3g}", (low, high))


def _still_equal(found: Comparison) -> Chart:
    share = []
    for token in range(max(len(record.kl_by_token) for record in found.records) + 1):
        equal = sum(record.parting_token is None or record.parting_token >= token for record in found.records)
        share.append(100 * equal / len(found.records))
    return _curve("Continuations that are still identical", "after this many tokens", share, 0, 100, "{:.0f} %")


def _curve(
    title: str,
    x_label: str,
    values: list[float],
    start: int,
    top: float,
    form: str,
    band: tuple[list[float], list[float]] | None = None,
) -> Chart:
    """Return a chart of a value by token from `start` on, with a band from the lower to the upper values."""
    end = start + len(values) - 1
    x = Axis(start, max(start + 1, end), form="{:.0f}", count=min(6, len(values)))
    y = Axis(0, top, HEIGHT - BOTTOM, TOP, form)

    def points(heights: list[float]) -> list[str]:
        return [f"{x(token)},{y(height)}" for token, height in enumerate(heights, start)]

    area: list[str] = []
    if band is not None and band[0] != band[1]:
        area = [*points(band[1]), *reversed(points(band[0]))]
    alt = f"Line from {form.format(values[0])} at token {start} to {form.format(values[-1])} at token {end}."
    return Chart(title, x_label, alt, x, y, band=" ".join(area), line=" ".join(points(values)))


def _latency(title: str, found: Comparison, key: str) -> Chart:
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    boxes = []
    for name in ("reference", "model"):
        times = []
        for record in found.records:
            seconds = getattr(getattr(record, name), key)
            if seconds is not None:
                times.append(1000 * seconds)
        quantiles = torch.tensor(times, dtype=torch.float64).quantile(levels).tolist()
        boxes.append((name, quantiles, f"{name}: median {quantiles[2]:.3g}, 95 % under {quantiles[4]:.3g}"))
    alt = f"{boxes[0][2]}. {boxes[1][2]}."
    x = Axis(0, max(boxes[0][1][4], boxes[1][1][4]) * 1.05)
    return Chart(title, "milliseconds", alt, x, boxes=boxes)
