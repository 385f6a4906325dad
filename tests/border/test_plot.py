"""Figures of a report, and what is said without matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from optimum_modegpt import plot_ranks
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


def test_without_matplotlib_the_extra_is_named(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"optimum-modegpt\[plot\]"):
        plot_ranks(report)
