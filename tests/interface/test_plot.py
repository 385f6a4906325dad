"""Check the figures of reports and benchmarks, and the message if matplotlib is missing."""

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


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("ünïcøde Жш", "ünïcøde Жш"),
        ("日本語/モデル", r"\u65e5\u672c\u8a9e/\u30e2\u30c7\u30eb"),
        ("costs $5_{ and $6", "costs $5_{ and $6"),
        ("tab\tbell\a", r"tab\tbell\x07"),
    ],
)
def test_names_in_every_script_are_drawn_without_a_warning(
    name: str, shown: str, report: Report, tmp_path: Path, caplog: Any
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'plot'")
    speeds = {measure: {f"model: {name}": [(1.0, 2.0, 3.0)]} for measure in ("prefill", "decode")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ranks = replace(report, base_model=name).plot(tmp_path / "ranks.png")
        speed = plot_speeds(["1 × 128"], speeds, name, tmp_path / "speed.svg")
    assert caplog.text == ""
    assert ranks.axes[0].get_title(loc="left") == f"{shown}: 30.0% removed"
    assert speed.axes[0].get_legend().get_texts()[0].get_text() == f"model: {shown}"


def test_without_matplotlib_the_extra_is_named(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"optimum-modegpt\[plot\]"):
        plot_ranks(report)
