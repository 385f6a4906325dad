"""Render a comparison as one self-contained HTML page, without scripts, network access, fonts or image files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jinja2
import torch

from optimum_modegpt.comparison import charts, table
from optimum_modegpt.comparison.charts import Chart
from optimum_modegpt.comparison.records import Comparison, PromptComparison, Written
from optimum_modegpt.comparison.thresholds import Check

TEMPLATE = "page.html.jinja"
OPENED = 5
"""Number of worst prompts that are shown unfolded."""


@dataclass(frozen=True)
class Side:
    """One model's continuation, split at the first difference between the two."""

    shared: str
    own: str
    written: Written


def comparison_page(found: Comparison, checks: Sequence[Check], model: str, reference: str) -> str:
    """Return the complete page. All text from prompts and models is escaped.

    `checks` are the result of `Comparison.check`, empty if no threshold was set. `model` and `reference` are names.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["milliseconds"] = table.milliseconds
    return environment.get_template(TEMPLATE).render(
        found=found,
        checks=checks,
        model=model,
        reference=reference,
        rows=table.rows(found),
        extent=table.extent(found),
        charts=_charts(found, checks),
        prompts=[(record, *_sides(record)) for record in found.worst_first()],
        opened=OPENED,
        box=charts,
        version=version("optimum-modegpt"),
    )


def _sides(record: PromptComparison) -> tuple[Side, Side]:
    model, reference = (
        Side(text[: record.parting_character], text[len(text[: record.parting_character]) :], each)
        for each in (record.model, record.reference)
        for text in (each.continuation,)
    )
    return model, reference


def _charts(found: Comparison, checks: Sequence[Check]) -> list[Chart]:
    limits = {check.measure: check.allowed for check in checks}
    shown = [
        _kl_by_prompt(found, limits.get("KL divergence")),
        _agreement_by_prompt(found, limits.get("top-1 agreement")),
        _kl_by_token(found),
        _still_equal(found),
        _latency("Time to first token", found, "first_token_seconds"),
    ]
    if found.costs.per_token and found.reference_costs.per_token:
        shown.append(_latency("Time per further token", found, "seconds_per_token"))
    return shown


def _kl_by_prompt(found: Comparison, limit: float | None) -> Chart:
    values = [record.kl for record in found.records]
    high = max(*values, limit or 0, 1e-6) * 1.02
    marks = [(found.kl, f"mean {found.kl:.3g}", "mean"), *_limit(limit, "at most")]
    return charts.histogram("KL divergence by prompt", "mean nats per position", values, (0, high), marks)


def _agreement_by_prompt(found: Comparison, limit: float | None) -> Chart:
    values = [100 * record.top1_agreement for record in found.records]
    mean = 100 * found.top1_agreement
    percent = None if limit is None else 100 * limit
    low = 10 * (min(*values, percent or 100, 99) // 10)
    marks = [(mean, f"mean {mean:.3g} %", "mean"), *_limit(percent, "at least", " %")]
    return charts.histogram("Top-1 agreement by prompt", "% of positions", values, (low, 100), marks)


def _limit(value: float | None, words: str, unit: str = "") -> list[tuple[float, str, str]]:
    return [] if value is None else [(value, f"{words} {value:g}{unit}", "limit")]


def _kl_by_token(found: Comparison) -> Chart:
    rows = [record.kl_by_token for record in found.records]
    columns = [torch.tensor([row[at] for row in rows if at < len(row)]) for at in range(max(map(len, rows)))]
    low, high = ([float(column.quantile(level)) for column in columns] for level in (0.1, 0.9))
    middle = [float(column.mean()) for column in columns]
    return charts.curve(
        "KL divergence along the continuation",
        "token of the reference's continuation",
        (low, middle, high),
        (1, max(*middle, *high, 1e-6)),
        lambda value: f"{value:.3g}",
    )


def _still_equal(found: Comparison) -> Chart:
    tokens = max(len(record.kl_by_token) for record in found.records)
    parted = [record.parting_token for record in found.records]
    share = [
        100 * sum(place is None or place >= token for place in parted) / len(parted) for token in range(tokens + 1)
    ]
    return charts.curve(
        "Continuations that are still identical",
        "after this many tokens",
        (share, share, share),
        (0, 100),
        lambda value: f"{value:.0f} %",
    )


def _latency(title: str, found: Comparison, key: str) -> Chart:
    rows = []
    for name, kind in (("reference", "reference"), ("model", "model")):
        seconds = [getattr(getattr(record, name), key) for record in found.records]
        rows.append((name, kind, [1000 * each for each in seconds if each is not None]))
    return charts.boxes(title, "milliseconds", rows)
