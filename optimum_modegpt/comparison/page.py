"""Render a comparison as one self-contained HTML page, without scripts, network access, fonts or image files."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import jinja2

from optimum_modegpt.comparison import charts
from optimum_modegpt.comparison.records import Comparison, milliseconds
from optimum_modegpt.comparison.thresholds import Check

OPENED = 5
"""Number of worst prompts that are shown unfolded."""


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
    environment.filters["milliseconds"] = milliseconds
    return environment.get_template("page.html.jinja").render(
        found=found,
        checks=checks,
        model=model,
        reference=reference,
        charts=charts.page_charts(found, checks),
        opened=OPENED,
        box=charts,
        version=version("optimum-modegpt"),
    )
