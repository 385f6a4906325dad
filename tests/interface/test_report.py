"""Test the JSON round trip of a report, and its short table."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from optimum_modegpt.report import BlockReport, Parameters, PartReport, Report, Stage, uncut_sentences


@pytest.fixture
def report() -> Report:
    parts = {
        "mlp": PartReport(40, 48, 1 / 6, 0.125),
        "qk": PartReport(6, 8, 0.25, 0.0),
        "vo": PartReport(8, 8, 0.0, None),
    }
    return Report(
        base_model="tiny",
        revision=None,
        config={"sparsity": 0.2},
        requested_sparsity=0.2,
        achieved_sparsity=0.1975,
        parameters=Parameters(1000, 802, 2000, 1802),
        blocks=(BlockReport(0, parts), BlockReport(1, parts)),
        calibration={"name": "text.txt", "sha256": "0"},
        stages=(Stage("embed", 1.0, 2**20), Stage("decompose", 2.5, 3 * 2**20)),
        memory_kind="sampled resident size",
        device="cpu",
        sensitivities={"0.mlp": [[0.15, 0.01]]},
        influences=[0.5, 0.25],
        warnings=("too few tokens",),
        versions={"torch": "2"},
    )


def test_saved_and_loaded_reports_are_equal(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report


def test_a_report_cannot_be_changed(report: Report) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.device = "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_the_table(report: Report) -> None:
    lines = report.summary().splitlines()
    assert lines[0].split() == ["block", "mlp", "qk", "vo"]
    assert lines[1].split() == ["0", "40/48", "err", "0.125", "6/8", "err", "0.000", "8/8"]
    assert "removed 19.75% of the block projections (requested 20.00%): 1,000 -> 802 weights" in lines
    assert "all parameters 2,000 -> 1,802 (9.90% fewer)" in lines
    assert "3.5 s, peak sampled resident size 3 MiB on cpu" in lines
    assert "warning: too few tokens" in lines
    paced = dataclasses.replace(report, stages=(Stage("decompose", 3.0, 2**20, {"moments": 0.5, "streams": 1.0}),))
    assert "3.0 s (2.0 times its matrix products at this device's rate), peak " in paced.summary()


def test_sentences_on_parts_at_full_width_count_the_blocks() -> None:
    blocks = [{"qk": "queries are normalised"}, {"qk": "queries are normalised", "vo": "values are gated"}]
    assert uncut_sentences(blocks) == (
        "qk stays at full width: queries are normalised",
        "vo stays at full width in 1 of 2 blocks: values are gated",
    )
    assert uncut_sentences([{}, {}]) == ()
    assert uncut_sentences([{"qk": "a clamp", "vo": "a clamp"}]) == ("qk and vo stay at full width: a clamp",)
