"""Test progress: bars on a terminal, at most one plain line per minute in a log, nothing if it is disabled."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tqdm
import tqdm.std
from checkpoints import RECIPE, save_dense, save_text
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm.auto import tqdm as auto_tqdm

from optimum_modegpt import progress
from optimum_modegpt.cli import main as cli
from optimum_modegpt.progress import bar, bars_of_libraries, shown_as

FLAGS = [part for key, value in RECIPE.items() for part in (f"--{key.replace('_', '-')}", str(value))]


class Clock:
    """A clock that the test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return a command without the folder of its result."""
    place = tmp_path_factory.mktemp("dense")
    text = save_text(place / "text.txt")
    return ["compress", str(save_dense(place / "dense")), "--dataset", str(text), *FLAGS, "--output"]


@pytest.fixture
def hub_bars() -> Iterator[None]:
    """Enable the bars of the Hub during a test."""
    disabled = are_progress_bars_disabled()
    enable_progress_bars()
    yield
    (disable_progress_bars if disabled else enable_progress_bars)()


def test_lines_show_how_far_the_work_is_and_the_time_that_is_left(monkeypatch: Any, capsys: Any) -> None:
    clock = Clock()
    monkeypatch.setattr(tqdm.std, "time", clock)
    with shown_as("lines"), bar(desc="decompose", unit="block", total=30, initial=3) as shown:
        clock.now += 30
        shown.update()
        clock.now += 90
        shown.set_postfix({"mlp": "0.125"}, refresh=False)
        shown.update()
    assert capsys.readouterr().err == "decompose: 5/30, 02:00 elapsed, about 25:00 left, mlp=0.125\n"


def test_lines_are_printed_at_each_interval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(tqdm.std, "time", clock)
    with shown_as("lines"):
        for _ in bar(range(5), desc="evaluate", unit="batch"):
            clock.now += 40
        with pytest.raises(ValueError, match="planted"), bar(desc="compare", unit="prompt", total=1):
            raise ValueError("planted")
    printed = [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert printed == ["evaluate: 2/5", "evaluate: 4/5"]


def test_without_a_terminal_a_command_prints_lines(
    words: list[str], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str], hub_bars: None
) -> None:
    assert cli.main([*words, str(tmp_path / "short")]) == 0
    assert "decompose" not in capsys.readouterr().err, "short work needs no lines"
    monkeypatch.setattr(progress, "INTERVAL", 0.001)
    assert cli.main([*words, str(tmp_path / "long"), "--allocation", "sensitivity"]) == 0
    errors = capsys.readouterr().err
    assert "sensitivities: " in errors
    assert "decompose: " in errors
    assert "%|" not in errors


def test_the_switch_of_the_hub_silences_it(
    words: list[str], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str], hub_bars: None
) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.001)
    disable_progress_bars()
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        assert cli.main([*words, str(tmp_path / str(terminal))]) == 0
        assert "decompose" not in capsys.readouterr().err


def test_on_a_terminal_a_command_draws_bars(
    words: list[str], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str], hub_bars: None
) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.001)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main([*words, str(tmp_path / "out")]) == 0
    errors = capsys.readouterr().err
    assert "decompose: 100%|" in errors
    assert "elapsed, about" not in errors


def test_in_python_the_bars_are_those_of_tqdm(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(bar(range(3), desc="evaluate", unit="batch"), auto_tqdm)
    with shown_as("lines"):
        list(bar(range(3), desc="hidden", unit="batch", shown=False))
    assert "hidden" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        (
            "lines",
            ["requests: 10/100, 01:00 elapsed, about 09:00 left", "requests: 20/100, 02:00 elapsed, about 08:00 left"],
        ),
        ("nothing", []),
    ],
)
def test_the_bars_of_libraries_follow(style: Any, expected: list[str], monkeypatch: Any, capsys: Any) -> None:
    clock, made = Clock(), vars(tqdm.tqdm)["__init__"]
    monkeypatch.setattr(tqdm.std, "time", clock)
    with shown_as(style), bars_of_libraries(True), tqdm.tqdm(total=100, desc="requests") as shown:
        for _ in range(25):
            clock.now += 6
            shown.update()
    assert vars(tqdm.tqdm)["__init__"] is made
    assert capsys.readouterr().err.splitlines() == expected
