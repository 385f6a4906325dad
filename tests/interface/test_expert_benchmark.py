"""Run the benchmark of a small mixture of experts with few steps, and check its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import save_text
from tiny_models import tokenizer

benchmark = pytest.importorskip("experts")
RESULTS = Path(benchmark.__file__).parent / "results"
PAGE = Path(__file__).parents[2] / ".github" / "docs" / "results.md"


@pytest.mark.parametrize("file", ["experts.json", "experts_shared.json"])
def test_the_page_of_results_has_the_table(file: str) -> None:
    rows = json.loads((RESULTS / file).read_text(encoding="utf-8"))["rows"]
    assert benchmark.table(rows) in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("flags", [(), pytest.param(("--shared",), marks=pytest.mark.slow)])
def test_every_way_to_shrink_the_experts_is_measured(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "LENGTH", 16)
    monkeypatch.setattr(benchmark, "WINDOWS", 8)
    monkeypatch.setattr(benchmark, "RATIOS", (0.5,))
    tokenizer().save_pretrained(tmp_path)
    text, results = save_text(tmp_path / "text.txt"), tmp_path / "results.json"
    files = ("--tokenizer", tmp_path, "--train", text, "--evaluation", text, "--json", results)
    benchmark.main([*map(str, files), *flags, "--steps", "2", "--max-windows", "4"])
    rows = json.loads(results.read_text())["rows"]
    assert rows.keys() == {"dense", *benchmark.RECIPES, benchmark.WHOLE}
    for name, found in rows.items():
        assert found.keys() == ({"0%"} if name == "dense" else {"50%"})
    assert f"| whole experts | {rows['whole experts']['50%']:.3f} |" in capsys.readouterr().out
