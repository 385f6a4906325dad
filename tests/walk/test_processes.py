"""Several processes, each with its share of the calibration, come to what one alone comes to."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import RECIPE, save_dense, save_text
from safetensors.torch import load_file
from tiny import FAMILIES, dense, tokens

from optimum_modegpt import ModeGPTConfig, Report, processes
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.checkpoint import Checkpoint
from optimum_modegpt.compress import compress
from optimum_modegpt.errors import CheckpointError, NumericalError
from optimum_modegpt.integration import cli
from optimum_modegpt.methods import published, residual_matched, sensitivity

WINDOWS, LENGTH, PROCESSES = 14, 24, 3
"""Shares of 5, 5 and 4 windows."""

PATHS = os.pathsep.join(path for path in sys.path if path)
"""So that other processes find what this one does."""

SECONDS = 300
"""None of them lives longer."""

JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in (*FAMILIES, "opt-post-ln", "llama-mqa-biases")},
    "influence": ("llama-gqa-tied", {"allocation": "influence"}),
    "paper": ("qwen2", {"method": "paper"}),
    "paper-opt": ("opt", {"method": "paper", "allocation": "uniform"}),
}


def run(job: str, checkpoint: Checkpoint | None = None) -> tuple[Any, Report]:
    """A model in float64 and its report; budgets so small that some processes have no part in them."""
    name, recipe = JOBS[job]
    model = dense(name).double()
    config = ModeGPTConfig(sparsity=0.3, batch_size=2, **recipe)
    windows = TokenWindows(tokens(WINDOWS, LENGTH), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residual_matched, "REFIT_TOKENS", 7 * LENGTH)
        patch.setattr(residual_matched, "GAIN_TOKENS", 3 * WINDOWS)
        patch.setattr(sensitivity, "DIVERGENCE_WINDOWS", 2)
        return model, compress(model, config, windows, checkpoint=checkpoint, progress=False)


def work(folder: Path) -> None:
    """What each of the processes does."""
    with processes.joined(torch.device("cpu")):
        for job in JOBS:
            model, report = run(job)
            torch.save(model.state_dict(), folder / f"{job}-{os.environ['RANK']}.pt")
            if processes.is_first():
                report.save(folder / f"{job}.json")
        with pytest.raises(CheckpointError, match="only a process alone"):
            run("paper", Checkpoint(folder / "kept"))


def run_together(count: int, folder: Path, words: list[str]) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of processes that work together, once all have ended; `folder` takes what they print.

    They are forks of one that has imported everything, which takes far longer than most of what they do.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "PYTHONPATH": PATHS}
    done = subprocess.run(
        [sys.executable, __file__, str(folder), *words],
        env=os.environ | shared,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    texts = [[(folder / f"{rank}.{kind}").read_text() for kind in ("out", "err")] for rank in range(count)]
    return [(code, *text) for code, text in zip(json.loads(done.stdout), texts, strict=True)]


def fork_all(folder: Path) -> None:
    """Goes on in each of the processes; the one that they come of waits for them, prints their exit codes and ends."""
    children = []
    for rank in range(int(os.environ["WORLD_SIZE"])):
        if child := os.fork():
            children.append(child)
            continue
        signal.alarm(SECONDS)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        for stream, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{rank}.{kind}", os.O_CREAT | os.O_WRONLY), stream)
        return
    print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    sys.exit()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    for code, _, errors in run_together(PROCESSES, folder, []):
        assert code == 0, errors[-3000:]
    return folder


@pytest.mark.parametrize("job", JOBS)
def test_they_come_to_what_one_comes_to(job: str, together: Path) -> None:
    model, report = run(job)
    found = Report.load(together / f"{job}.json")
    assert found.processes == PROCESSES
    assert [{name: part.rank for name, part in block.parts.items()} for block in found.blocks] == [
        {name: part.rank for name, part in block.parts.items()} for block in report.blocks
    ]
    assert found.sensitivity_budget == report.sensitivity_budget
    for name, curve in report.sensitivities.items():
        assert torch.allclose(torch.tensor(found.sensitivities[name]), torch.tensor(curve), rtol=1e-6)
    assert found.influences == pytest.approx(report.influences, rel=1e-9)
    for rank in range(PROCESSES):
        state = torch.load(together / f"{job}-{rank}.pt")
        assert state.keys() == model.state_dict().keys()
        for name, expected in model.state_dict().items():
            difference = (state[name] - expected).double().norm() / expected.double().norm().clamp_min(1e-30)
            assert difference <= 1e-6, (rank, name, float(difference))


def test_the_budgets_leave_some_without_a_part(together: Path) -> None:
    budget = Report.load(together / "opt.json").sensitivity_budget
    assert budget["divergence_windows"] < PROCESSES


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command but for the folder of the result."""
    folder = tmp_path_factory.mktemp("dense")
    checkpoint, text = save_dense(folder / "model"), save_text(folder / "text.txt")
    flags = [part for key, value in RECIPE.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    return ["compress", str(checkpoint), "--dataset", str(text), *flags, "--device", "cpu", "--output"]


def test_the_first_process_saves_and_prints(words: list[str], tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "optimum_modegpt"]
    environment = {**os.environ, "PYTHONPATH": PATHS}
    done = subprocess.run(
        [*launcher, *words, str(tmp_path / "small")], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("saved in") == 1
    assert "on cpu, 2 processes" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert Report.load(tmp_path / "small" / "report.json").processes == 2
    assert cli.main([*words, str(tmp_path / "alone")]) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "alone"))
    for name, tensor in other.items():
        assert (one[name] - tensor).double().norm() <= 1e-4 * tensor.double().norm(), name


@pytest.mark.parametrize("failing", [0, 1])
def test_where_one_fails_all_end(failing: int, words: list[str], tmp_path: Path) -> None:
    output_folder, printed = tmp_path / "output", tmp_path / "printed"
    output_folder.mkdir()
    printed.mkdir()
    results = run_together(2, printed, [str(failing), *words, str(output_folder / "small")])
    for rank, (code, output, errors) in enumerate(results):
        assert code == cli.FAILED
        assert output == ""
        expected = "error: block 1: planted" if rank == failing else "error: another process of this run has ended"
        assert expected in errors
    assert list(output_folder.iterdir()) == []


def fail(failing: str, words: list[str]) -> int:
    """The command, where one process finds something wrong in the second block that the others do not see."""
    original = published.observe

    def observe(block: Any, *args: Any) -> Any:
        if block.index == 1 and os.environ["RANK"] == failing:
            raise NumericalError("planted")
        return original(block, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "observe", observe)
        return cli.main(words)


def test_unfinished_work_of_one_is_not_taken_over_by_several(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".small.checkpoint").mkdir()
    monkeypatch.setattr(processes, "count", lambda: 2)
    assert cli.main([*words, str(tmp_path / "small")]) == cli.FAILED
    assert "only one process alone can go on with it" in capsys.readouterr().err


def test_a_launch_that_is_none_is_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main([*words, str(tmp_path / "small")]) == cli.FAILED
    assert "Start them with torchrun or accelerate launch" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ one process


def test_a_process_alone_gets_back_what_it_gave() -> None:
    windows = tokens(3, 4)
    with processes.joined(None) as device:
        assert device is None
        assert processes.share(windows) is windows
        assert processes.total(windows) is windows
        assert processes.agreed(windows) is windows
        assert (processes.total(2), processes.before(3), processes.count(), processes.is_first()) == (2, 0, 1, True)


if __name__ == "__main__":
    folder, *words = sys.argv[1:]
    fork_all(Path(folder))
    sys.exit(fail(words[0], words[1:]) if words else work(Path(folder)))
