"""Figures of a report, and what is said without matplotlib."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from optimum_modegpt import plot_ranks
from optimum_modegpt.plot import plot_speeds
from optimum_modegpt.report import BlockReport, Parameters, PartReport, Report


@pytest.fixture
def report() -> Report:
    def block(index: int, kept: int) -> BlockReport:
        part = PartReport(kept, 8, 1 - kept / 8)
        return BlockReport(index, {"mlp": part, "qk": PartReport(8, 8, 0.0), "vo": part})

    return Report(
        base_model="tiny",
        revision=None,
        config={},
        requested_sparsity=0.3,
        achieved_sparsity=0.3,
        parameters=Parameters(10, 7, 20, 17),
        blocks=(block(0, 4), block(1, 6)),
        calibration={},
        stages=(),
        memory_kind="device memory",
        device="cpu",
    )


def test_bars_are_the_kept_fractions(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'plot'")
    figure = report.plot(tmp_path / "ranks.png")
    (axis,) = figure.axes
    heights = [[bar.get_height() for bar in bars] for bars in axis.containers]
    assert heights == [[0.5, 0.75], [1.0, 1.0], [0.5, 0.75]]
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


ENCLOSED = "a\u20dd"
"""A circled letter: of the fonts that matplotlib brings, DejaVu Sans lacks the circle and STIXGeneral has it."""


@pytest.mark.parametrize(
    ("name", "shown", "font"),
    [
        ("ünïcøde Жш", "ünïcøde Жш", None),
        (ENCLOSED, ENCLOSED, "STIXGeneral"),
        ("日本語/モデル", r"\u65e5\u672c\u8a9e/\u30e2\u30c7\u30eb", None),
        ("costs $5_{ and $6", "costs $5_{ and $6", None),
        ("tab\tbell\a", r"tab\tbell\x07", None),
    ],
)
def test_names_are_drawn_in_every_script_without_a_warning(
    name: str,
    shown: str,
    font: str | None,
    report: Report,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
) -> None:
    font_manager = pytest.importorskip("matplotlib.font_manager", reason="needs the extra 'plot'")
    brought = [each for each in font_manager.fontManager.ttflist if "mpl-data" in each.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", brought)
    speeds = {measure: {f"model: {name}": [(1.0, 2.0, 3.0)]} for measure in ("prefill", "decode")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ranks = replace(report, base_model=name).plot(tmp_path / "ranks.png")
        speed = plot_speeds(["1 × 128"], speeds, name, tmp_path / "speed.svg")
    assert caplog.text == ""
    assert ranks.axes[0].get_title(loc="left") == f"{shown}: 30.0% removed"
    legend = speed.axes[0].get_legend().get_texts()[0]
    assert legend.get_text() == f"model: {shown}"
    assert legend.get_fontfamily()[1:] == ([] if font is None else [font])


def test_without_matplotlib_the_extra_is_named(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"optimum-modegpt\[plot\]"):
        plot_ranks(report)
