"""Test distributed compression: several ranks, each with a shard of the calibration data, match one process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from checkpoints import empty_picture, save_dense, save_text
from safetensors.torch import load_file
from tiny_models import dense, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_modegpt import ModeGPTConfig, Report, distributed
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.calibration.self_text import script_of
from optimum_modegpt.cli import main as cli
from optimum_modegpt.compress import compress
from optimum_modegpt.errors import NumericalError
from optimum_modegpt.hub import card
from optimum_modegpt.loading.self_text import self_windows
from optimum_modegpt.methods import input_refit, residual_matched, sensitivity
from optimum_modegpt.walk import checkpoint as module
from optimum_modegpt.walk import resume
from optimum_modegpt.walk.checkpoint import Checkpoint

WINDOWS, LENGTH, PROCESSES = 14, 24, 3
"""Shards of 5, 5 and 4 windows."""

PATHS = os.pathsep.join(path for path in sys.path if path)
"""Import path for subprocesses."""

KINDS = ("out", "err")
"""File name endings of the output and the errors of a process."""

SECONDS = 300
"""Time limit of each process."""

JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("gpt2", "gpt_neox", "opt", "opt-post-ln", "llama-mqa-biases", "qwen3")},
    "influence": ("llama-gqa-tied", {"allocation": "influence"}),
    "paper": ("qwen2", {"method": "paper"}),
    "paper-opt": ("opt", {"method": "paper", "allocation": "uniform"}),
    "stock": ("qwen3", {"layout": "stock", "allocation": "uniform"}),
    "experts": ("mixtral", {"allocation": "uniform"}),
}
FURTHER_JOBS = ("gpt_neox", "llama-mqa-biases", "paper-opt")
"""Those that are tested in the full matrix only."""
WORK = "work"
"""The command of a rank that runs jobs. Every other command is the moment of a failure."""


def run(job: str) -> tuple[Any, Report]:
    """Compress a model in float64, with sample budgets so small that some ranks get no sample."""
    name, recipe = JOBS[job]
    model = dense(name).double()
    if name == "mixtral":
        model.set_experts_implementation("eager")  # the default one has no float64
    config = ModeGPTConfig(sparsity=0.3, batch_size=2, **recipe)
    windows = TokenWindows(tokens(WINDOWS, LENGTH), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(input_refit, "REFIT_TOKENS", 7 * LENGTH)
        patch.setattr(input_refit, "TOKENS_PER_ROW", 0)
        patch.setattr(residual_matched, "GAIN_TOKENS", 3 * WINDOWS)
        patch.setattr(sensitivity, "SHALLOW_BUDGET", 0)
        patch.setattr(sensitivity, "GRADIENT_WINDOWS", 2 if name == "opt" else 5)
        return model, compress(model, config, windows, progress=False)


def work(folder: Path, jobs: list[str]) -> None:
    """Run jobs on this rank and save the results."""
    with distributed.joined(torch.device("cpu")):
        for job in jobs:
            model, report = run(job)
            torch.save(model.state_dict(), folder / f"{job}-{os.environ['RANK']}.pt")
            if distributed.is_first():
                report.save(folder / f"{job}.json")


def run_together(
    count: int, folder: Path, commands: list[list[str]], **environment: str
) -> list[list[tuple[int, str, str]]]:
    """Run each command on `count` ranks; return (exit code, output, errors) of every rank of every command.

    The ranks are forks of one process that has imported everything, because imports take most of the time.
    """
    done = subprocess.run(
        [sys.executable, __file__, str(count), str(folder), json.dumps(commands)],
        env={**os.environ, "PYTHONPATH": PATHS, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = []
    for number, codes in enumerate(json.loads(done.stdout)):
        ranks = []
        for rank, code in enumerate(codes):
            output, errors = ((folder / f"{number}.{rank}.{kind}").read_text() for kind in KINDS)
            ranks.append((code, output, errors))
        results.append(ranks)
    return results


def fork_all(count: int, folder: Path, commands: list[list[str]]) -> None:
    """Run each command with `count` forks of this process, then print their exit codes."""
    codes = []
    for number, words in enumerate(commands):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        children = []
        for rank in range(count):
            if not (child := os.fork()):
                signal.alarm(SECONDS)
                os.environ |= {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
                for stream, kind in enumerate(KINDS, start=1):
                    os.dup2(os.open(folder / f"{number}.{rank}.{kind}", os.O_CREAT | os.O_WRONLY), stream)
                name, *rest = words
                sys.exit(work(folder, rest) if name == WORK else run_command(name, rest[0], rest[1:]))
            children.append(child)
        codes.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    print(json.dumps(codes))


def selected(request: pytest.FixtureRequest, name: str) -> list[Any]:
    """Return the values of a parameter in the tests of this file that are about to run."""
    items: list[Any] = [item for item in request.session.items if item.path == request.path]
    return [item.callspec.params[name] for item in items if hasattr(item, "callspec") and name in item.callspec.params]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder, further = tmp_path_factory.mktemp("together"), selected(request, "job")
    jobs = [job for job in JOBS if job not in FURTHER_JOBS or job in further]
    for code, _, errors in run_together(PROCESSES, folder, [[WORK, *jobs]])[0]:
        assert code == 0, errors[-3000:]
    return folder


@pytest.mark.parametrize(
    "job", [pytest.param(job, marks=[pytest.mark.slow] if job in FURTHER_JOBS else []) for job in JOBS]
)
def test_several_ranks_match_one_process(job: str, together: Path) -> None:
    model, report = run(job)
    found = Report.load(together / f"{job}.json")
    assert found.processes == PROCESSES
    for block, expected in zip(found.blocks, report.blocks, strict=True):
        assert {name: part.rank for name, part in block.parts.items()} == {
            name: part.rank for name, part in expected.parts.items()
        }
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


def test_budgets_are_smaller_than_the_number_of_ranks(together: Path) -> None:
    few, more = (Report.load(together / f"{job}.json").sensitivity_budget for job in ("opt", "opt-post-ln"))
    assert few["gradient_windows"] == few["divergence_windows"] < PROCESSES
    assert more["divergence_windows"] < PROCESSES < more["gradient_windows"]


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command line without the output folder."""
    folder = tmp_path_factory.mktemp("dense")
    checkpoint, text = save_dense(folder / "model"), save_text(folder / "text.txt")
    flags = ["--sparsity", "0.3", "--num-samples", "8", "--sequence-length", "32", "--device", "cpu"]
    return ["compress", str(checkpoint), "--dataset", str(text), *flags, "--output"]


@pytest.fixture(scope="module")
def launched(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the output folder of a run on two ranks, and its standard output."""
    output = tmp_path_factory.mktemp("launched") / "small"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "optimum_modegpt"]
    environment = {**os.environ, "PYTHONPATH": PATHS}
    done = subprocess.run(
        [*launcher, *words, str(output)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return output, done.stdout


def test_rank_0_saves_and_prints(
    words: list[str], launched: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_refit, "TOKENS_PER_ROW", 10)  # as in the launched processes
    output, printed = launched
    assert printed.count("saved in") == 1
    assert "on cpu, 2 processes" in printed
    assert [path.name for path in output.parent.iterdir()] == ["small"]
    assert Report.load(output / "report.json").processes == 2
    assert cli.main([*words, str(tmp_path / "alone")]) == 0
    one, other = (load_file(folder / "model.safetensors") for folder in (output, tmp_path / "alone"))
    for name, tensor in other.items():
        assert (one[name] - tensor).double().norm() <= 1e-4 * tensor.double().norm(), name


MOMENTS: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "never": (Checkpoint, "remove", lambda *_: False),
    "error": (residual_matched, "compress_block", lambda student, *_: student.index == 1),
    "in a block": (residual_matched, "compress_block", lambda student, *_: student.index == 1),
    "in a sweep": (
        Checkpoint,
        "keep_plan",
        lambda _, plan, measured, __: not plan and len(measured["parts"]) > 3,
    ),
    "while streams are saved": (
        Checkpoint,
        "_write_tensors",
        lambda _, path, __: path.name.startswith("streams-00002"),
    ),
    "while the manifest is saved": (Checkpoint, "_write_manifest", lambda self: self.finished == 2),
    "after the result is published": (Checkpoint, "remove", lambda self: self.manifest.saved is not None),
    "while rank 0 saves": (sys.modules["optimum_modegpt.compress"], "make_report", lambda *_: True),
    "another model": (resume, "fingerprint", lambda _: True),
}
"""The call before which a process fails, and the condition on its arguments."""

ENDS = [("error", 1), ("in a sweep", 1), ("while the manifest is saved", 0)]
"""The moment of the failure, and the failing rank of two."""
FURTHER_ENDS = [("in a block", 0), ("while streams are saved", 1)]
"""Those that are tested in the full matrix only."""
EVERY_END = pytest.mark.parametrize(
    "end", [*ENDS, *(pytest.param(end, marks=pytest.mark.slow) for end in FURTHER_ENDS)]
)


def run_command(moment: str, failing: str, words: list[str]) -> int:
    """Run the command; the rank `failing` raises or is killed at `moment`."""
    target, name, when = MOMENTS[moment]
    original = getattr(target, name)

    def planted(*args: Any, **kwargs: Any) -> Any:
        if os.environ["RANK"] == failing and when(*args):
            if moment == "another model":
                return "another"
            if moment == "error":
                raise NumericalError("planted")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STREAM_SECONDS", 0)
        patch.setattr(card, "plot_kept", empty_picture)
        patch.setattr(target, name, planted)
        return cli.main(words)


LATE_ENDS = [("after the result is published", 0), ("while rank 0 saves", 1)]
DIFFERENT, STOPPED, SELF = ("another model", 1), ("error", 0), ("never", 0)
"""Ranks that read different models, a run that fails early, and one whose calibration text the model writes."""

Ranks = list[tuple[int, str, str]]


@pytest.fixture(scope="module")
def two_ranks(
    words: list[str], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[tuple[str, int], tuple[Path, list[Ranks]]]:
    """Run every case with two ranks, and those that are interrupted near or before the end again.

    Return the folder of the result and the (exit code, output, errors) of each rank of each run, by case.
    """
    root, printed = tmp_path_factory.mktemp("cases"), tmp_path_factory.mktemp("printed")
    chosen = selected(request, "end")
    interrupted = ENDS + LATE_ENDS + [end for end in FURTHER_ENDS if end in chosen]
    cases = [*interrupted, DIFFERENT, STOPPED, SELF]
    folders, commands = {case: root / str(number) for number, case in enumerate(cases)}, []
    for (moment, failing), folder in folders.items():
        command = [*words, str(folder / "small")]
        if (moment, failing) == SELF:
            command += ["--dataset", "self", "--method", "paper", "--allocation", "uniform"]
        commands.append([moment, str(failing), *command])
        if (moment, failing) in interrupted:
            commands.append(["never", "0", *command])
    results = iter(run_together(2, printed, commands, HF_DATASETS_CACHE=str(root / "cache")))
    runs = {case: [next(results) for _ in range(2 if case in interrupted else 1)] for case in cases}
    return {case: (folders[case], runs[case]) for case in cases}


@EVERY_END
def test_all_ranks_exit_if_one_fails(end: tuple[str, int], two_ranks: Any) -> None:
    moment, failing = end
    for rank, (code, output, errors) in enumerate(two_ranks[end][1][0]):
        assert output == ""
        if rank != failing:
            assert code == cli.FAILED
            assert "error: another rank exited or timed out" in errors
        elif moment == "error":
            assert code == cli.FAILED
            assert "error: block 1: planted" in errors
        else:
            assert code == -signal.SIGKILL


@EVERY_END
def test_rerun_resumes_and_is_bit_identical(end: tuple[str, int], two_ranks: Any, launched: tuple[Path, str]) -> None:
    folder, (_, again) = two_ranks[end]
    for code, _, errors in again:
        assert code == 0, errors[-3000:]
    assert [path.name for path in folder.iterdir()] == ["small"]
    assert Report.load(folder / "small" / "report.json").stages[0].name == "earlier runs"
    found, expected = (load_file(path / "model.safetensors") for path in (folder / "small", launched[0]))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_ranks_that_read_different_models_are_refused(two_ranks: Any) -> None:
    folder, (results,) = two_ranks[DIFFERENT]
    assert [code for code, _, _ in results] == [cli.FAILED, cli.FAILED]
    assert "processes 1 and 2 have not read the same model" in results[0][2]
    assert not folder.exists()


def test_ranks_share_the_text_that_the_model_writes(
    words: list[str], two_ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, (results,) = two_ranks[SELF]
    assert [code for code, _, _ in results] == [0, 0], results
    assert len(list((folder.parent / "cache" / "modegpt_self").iterdir())) == 1
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "another")
    model, own = AutoModelForCausalLM.from_pretrained(words[1]), AutoTokenizer.from_pretrained(words[1])
    alone = self_windows(model, own, script_of(own, 32), windows=8, length=32, seed=0)
    assert Report.load(folder / "small" / "report.json").calibration["sha256"] == alone.record["sha256"]


def test_checkpoint_of_another_world_size_is_refused(
    words: list[str], two_ranks: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*words, str(two_ranks[STOPPED][0] / "small")]
    assert cli.main(command) == cli.FAILED
    assert "processes was 2, now it is 1" in capsys.readouterr().err
    assert cli.main([*command, "--fresh"]) == 0


@pytest.mark.parametrize("end", LATE_ENDS)
def test_rerun_after_a_published_result_removes_the_checkpoint(end: tuple[str, int], two_ranks: Any) -> None:
    folder, (killed, again) = two_ranks[end]
    assert killed[end[1]][0] == -signal.SIGKILL
    assert [code for code, _, _ in again] == [0, 0], again
    assert [path.name for path in folder.iterdir()] == ["small"]


def test_incomplete_launch_environment_is_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main([*words, str(tmp_path / "small")]) == cli.FAILED
    assert "Start them with torchrun or accelerate launch" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ one process


def test_collectives_return_their_input_in_a_single_process() -> None:
    windows = tokens(3, 4)
    with distributed.joined(None) as device:
        assert device is None
        assert torch.equal(distributed.shard(windows), windows)
        assert distributed.all_reduce(windows) is windows
        assert distributed.broadcast(windows) is windows
        assert distributed.all_reduce(2) == 2
        assert distributed.exclusive_sum(3) == 0
        assert distributed.world_size() == 1
        assert distributed.is_first()


if __name__ == "__main__":
    fork_all(int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
