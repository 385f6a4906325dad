"""Test that an interrupted compression resumes, with a bit-identical result."""

from __future__ import annotations

import copy
import errno
import json
import signal
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import RECIPE, save_dense, save_text
from filelock import BaseFileLock
from forks import run_forked
from rates import set_rate_in_16_bits
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_configs import FAMILIES
from tiny_models import dense, tokens
from torch import nn

from optimum_modegpt import ModeGPTConfig, ModeGPTQuantizer
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.cli import main as cli
from optimum_modegpt.compress import compress
from optimum_modegpt.errors import CheckpointError, IllConditionedWarning
from optimum_modegpt.methods import mlp_refit, residual_matched
from optimum_modegpt.methods.sensitivity import Sweeps
from optimum_modegpt.output import restore_output
from optimum_modegpt.report import Report
from optimum_modegpt.walk import checkpoint as module
from optimum_modegpt.walk.checkpoint import REPLACED, RESULT, Checkpoint, fingerprint

FLAGS: list[str] = []
for _name, _value in RECIPE.items():
    FLAGS += [f"--{_name.replace('_', '-')}", str(_value)]


@pytest.fixture(autouse=True)
def every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write streams after every block, regardless of the time since the last write."""
    monkeypatch.setattr(module, "STREAM_SECONDS", 0)


class Killed(BaseException):
    """Simulate a kill signal inside the process."""


def run(model: Any, checkpoint: Checkpoint | None, **fields: Any) -> Any:
    config = ModeGPTConfig(sparsity=0.3, **fields)
    return compress(model, config, TokenWindows(tokens(12, 24), {}), checkpoint=checkpoint, progress=False)


def killed_at(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise `Killed` when the default method begins this block."""
    original = residual_matched.compress_block

    def dies(student: Any, *args: Any, **kwargs: Any) -> Any:
        if student.index == block:
            raise Killed
        return original(student, *args, **kwargs)

    monkeypatch.setattr(residual_matched, "compress_block", dies)


def states(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@cache
def uninterrupted(name: str) -> tuple[dict[str, torch.Tensor], Report]:
    """Return the weights and the report of a run that is not interrupted."""
    model = dense(name)
    report = run(model, None)
    return states(model), report


@pytest.mark.parametrize(("name", "block"), [*((name, 1) for name in FAMILIES), ("llama-gqa-tied", 2), ("opt", 2)])
def test_resumed_run_is_bit_identical(name: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = dense(name), dense(name)
    expected, report = uninterrupted(name)
    with monkeypatch.context() as patch:
        killed_at(block, patch)
        with pytest.raises(Killed):
            run(first, Checkpoint(tmp_path / "kept"))
    assert type(first) is type(dense(name)), "an interrupted run must not change the model in memory"
    calls: list[int] = []
    original = residual_matched.compress_block

    def logged(student: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(student.index)
        return original(student, *args, **kwargs)

    monkeypatch.setattr(residual_matched, "compress_block", logged)
    checkpoint = Checkpoint(tmp_path / "kept")
    resumed = run(again, checkpoint)
    assert calls == list(range(block, 3))
    assert_same(states(again), expected)
    assert resumed.blocks == report.blocks
    assert resumed.sensitivities == report.sensitivities
    assert resumed.sensitivity_budget == report.sensitivity_budget
    assert resumed.stages[0].name == "earlier runs"
    assert not any(stage.name.startswith("allocate") for stage in resumed.stages)
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []
    assert_same(states(again), expected)


def test_a_resumed_run_computes_in_the_dtype_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory and measured speeds, which decide, may differ between the runs."""
    expected, again = (dense("llama-gqa-tied").bfloat16() for _ in range(2))
    with monkeypatch.context() as patch:
        set_rate_in_16_bits(patch, 7.0)
        report = run(expected, None)
        killed_at(1, patch)
        with pytest.raises(Killed):
            run(again, Checkpoint(tmp_path / "kept"))
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    set_rate_in_16_bits(monkeypatch, 1.0)
    resumed = run(again, Checkpoint(tmp_path / "kept"))
    assert resumed.compute_dtype == report.compute_dtype == "float32"
    assert_same(states(again), states(expected))


@pytest.mark.parametrize("recipe", [{"method": "paper"}, {"allocation": "uniform"}])
def test_run_with_a_checkpoint_is_bit_identical(recipe: dict[str, Any], tmp_path: Path) -> None:
    plain, kept = dense("llama-gqa-tied"), dense("llama-gqa-tied")
    for parameter in (*plain.parameters(), *kept.parameters()):
        parameter.requires_grad_(parameter.ndim > 1)
    run(plain, None, **recipe)
    run(kept, Checkpoint(tmp_path / "kept"), **recipe)
    assert_same(states(kept), states(plain))
    assert [p.requires_grad for p in kept.parameters()] == [p.requires_grad for p in plain.parameters()]


def test_finished_blocks_are_memory_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    original = Checkpoint.keep_block
    monkeypatch.setattr(Checkpoint, "keep_block", lambda *args: kept.append(original(*args)) or kept[-1])
    run(dense("llama-gqa-tied"), Checkpoint(tmp_path / "kept"))
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc/self/maps")
    address = kept[1].mlp.down_proj.weight.data_ptr()
    mapped = []
    for line in maps.read_text().splitlines():
        start, end = line.split()[0].split("-")
        if int(start, 16) <= address < int(end, 16):
            mapped.append(line)
    assert len(mapped) == 1
    assert mapped[0].endswith("block-00001.safetensors")


def test_blocks_without_saved_streams_are_recomputed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STREAM_SECONDS", 3600)
    again = dense("llama-mha")
    with monkeypatch.context() as patch:
        killed_at(2, patch)
        with pytest.raises(Killed):
            run(dense("llama-mha"), Checkpoint(tmp_path / "kept"))
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {
        "manifest.json",
        "block-00000.safetensors",
        "block-00001.safetensors",
    }
    run(again, Checkpoint(tmp_path / "kept"))
    assert_same(states(again), uninterrupted("llama-mha")[0])


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"sparsity": 0.2}, "configuration, sparsity was 0.3, now it is 0.2"),
        ({"seed": 1}, "configuration, seed was 0"),
        ({"round_to": 8}, "configuration, round_to was 'auto', now it is 8"),
    ],
)
def test_checkpoint_of_another_compression_is_refused(
    change: dict[str, Any], difference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        killed_at(1, patch)
        with pytest.raises(Killed):
            run(dense("llama-mha"), Checkpoint(tmp_path / "kept"))
    config = ModeGPTConfig(**{"sparsity": 0.3, **change})
    windows = TokenWindows(tokens(12, 24), {})
    with pytest.raises(CheckpointError, match=f"{difference}(.|\n)*--fresh"):
        compress(dense("llama-mha"), config, windows, checkpoint=Checkpoint(tmp_path / "kept"), progress=False)
    other = [
        (dense("llama-mha", seed=1), windows, "model was"),
        (dense("llama-mha"), TokenWindows(tokens(12, 24, seed=1), {}), "calibration was"),
    ]
    for model, text, name in other:
        with pytest.raises(CheckpointError, match=name):
            compress(model, ModeGPTConfig(sparsity=0.3), text, checkpoint=Checkpoint(tmp_path / "kept"), progress=False)
    fresh, alone = dense("llama-mha"), dense("llama-mha")
    Checkpoint(tmp_path / "kept").remove()
    compress(fresh, config, windows, checkpoint=Checkpoint(tmp_path / "kept"), progress=False)
    compress(alone, config, windows, progress=False)
    assert_same(states(fresh), states(alone))


def test_second_run_cannot_open_a_checkpoint_in_use(tmp_path: Path) -> None:
    first, second = Checkpoint(tmp_path / "kept"), Checkpoint(tmp_path / "kept")
    with first.opened({}), pytest.raises(CheckpointError, match="another run is using"), second.opened({}):
        pass


def test_full_disk_keeps_finished_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = dense("qwen2-mixed-window")
    original = module.save_file

    def full(tensors: Any, path: Path) -> None:
        if "block-00002" in Path(path).name:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        with pytest.raises(
            CheckpointError, match=r"No space left(.|\n)*Free some disk space and rerun the same command"
        ):
            run(dense("qwen2-mixed-window"), Checkpoint(tmp_path / "kept"))
    assert not list((tmp_path / "kept").glob("*.partial"))
    run(again, Checkpoint(tmp_path / "kept"))
    assert_same(states(again), uninterrupted("qwen2-mixed-window")[0])


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt_neox"])
def test_sensitivities_resume_after_the_last_finished_sweep(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = dense(name)
    expected, report = uninterrupted(name)
    measure, sweeps = Sweeps._measure, []

    def dies_in_the_third(self: Sweeps, sweep: range, *args: Any) -> Any:
        if len(sweeps) == 2:
            raise Killed
        sweeps.append(sweep)
        return measure(self, sweep, *args)

    monkeypatch.setattr(Sweeps, "_measure", dies_in_the_third)
    with pytest.raises(Killed):
        run(dense(name), Checkpoint(tmp_path / "kept"))
    assert sweeps == [range(1), range(1, 2)]
    sweeps.clear()
    resumed = run(again, Checkpoint(tmp_path / "kept"))
    assert sweeps == [range(2, 3)]
    assert resumed.sensitivities == report.sensitivities
    assert_same(states(again), expected)


def test_interrupt_while_the_lock_is_acquired_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acquire = BaseFileLock.acquire
    interrupts = iter([KeyboardInterrupt()])

    def interrupted(lock: BaseFileLock, **arguments: Any) -> Any:
        proxy = acquire(lock, **arguments)
        for interrupt in interrupts:
            lock.release()  # as filelock does if it is interrupted
            raise interrupt
        return proxy

    monkeypatch.setattr(BaseFileLock, "acquire", interrupted)
    with pytest.raises(KeyboardInterrupt), Checkpoint(tmp_path / "new" / "place" / "kept").alone():
        pass
    assert list(tmp_path.iterdir()) == []


def test_resumed_run_reports_warnings_of_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = mlp_refit.cut_channels

    def cut_badly(*args: Any) -> Any:
        warnings.warn("a moment is ill-conditioned", IllConditionedWarning, stacklevel=1)
        return cut(*args)

    with monkeypatch.context() as patch:
        killed_at(1, patch)
        patch.setattr(mlp_refit, "cut_channels", cut_badly)
        with pytest.raises(Killed):
            run(dense("llama-mha"), Checkpoint(tmp_path / "kept"), allocation="uniform", refit_iterations=0)
    report = run(dense("llama-mha"), Checkpoint(tmp_path / "kept"), allocation="uniform", refit_iterations=0)
    assert "a moment is ill-conditioned" in report.warnings


@pytest.mark.parametrize("place", [0, 700, 2999])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_fingerprint_depends_on_every_weight(dtype: torch.dtype, place: int) -> None:
    whole = torch.randn(3020, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = nn.Linear(50, 60, bias=False)
    layer.weight = nn.Parameter(whole[5:3005].view(60, 50))  # a view into a larger storage
    before = fingerprint(layer)
    assert fingerprint(copy.deepcopy(layer)) == before
    weights = layer.weight.detach().view(-1)
    weights[place] = torch.nextafter(weights[place], torch.tensor(torch.inf, dtype=dtype))
    assert fingerprint(layer) != before


def test_fingerprint_depends_on_the_order_of_weights() -> None:
    layer = nn.Linear(64, 1000)
    flipped = copy.deepcopy(layer)
    flipped.weight.data = layer.weight.detach().flip(0)
    assert fingerprint(flipped) != fingerprint(layer)


@pytest.mark.parametrize("name", ["model.safetensors", "folder"])
def test_folder_that_is_no_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    (folder / name).mkdir(parents=True)
    checkpoint = Checkpoint(folder)
    for refused in (lambda: run(dense("llama-mha"), checkpoint), checkpoint.remove):
        with pytest.raises(CheckpointError, match=f"contains files that are not part of a checkpoint: {name}"):
            refused()
    assert (folder / name).is_dir()


def test_unreadable_manifest_raises(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest.json cannot be read(.|\n)*--fresh"):
        run(dense("llama-mha"), Checkpoint(tmp_path / "kept"))


SAVE = "lambda self, model, folder, *_: ((folder / 'half').touch(), die())"
KILLED = {
    "while the result is saved": f"quantizer.ModeGPTQuantizer.save = {SAVE}",
    "before the result is published": "output._place = die",
    "after the result is published": "checkpoint.Checkpoint.remove = die",
}


@pytest.mark.parametrize("moment", KILLED)
def test_command_killed_near_the_end_completes_when_rerun(moment: str, tmp_path: Path) -> None:
    model, text, output = save_dense(tmp_path / "dense"), save_text(tmp_path / "text.txt"), tmp_path / "small"
    words = ["compress", str(model), "--dataset", str(text), *FLAGS, "--output"]
    script = (
        "import os, signal\n"
        "from optimum_modegpt.walk import checkpoint\n"
        "from optimum_modegpt.cli import main as cli\n"
        "from optimum_modegpt import output\n"
        "from optimum_modegpt.integration import quantizer\n"
        "die = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{KILLED[moment]}\n"
        f"cli.main({[*words, str(output)]!r})\n"
    )
    assert run_forked(script).returncode == -signal.SIGKILL
    assert output.exists() == (moment == "after the result is published")
    if output.exists():
        assert cli.main([*words, str(output), "--dtype", "float16"]) == 2, (
            "a result with another dtype must not be overwritten"
        )
    assert cli.main([*words, str(output)]) == 0
    assert cli.main([*words, str(tmp_path / "uninterrupted")]) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "uninterrupted"))
    assert_same(one, other)
    assert {path.name for path in output.iterdir()} == {path.name for path in (tmp_path / "uninterrupted").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "text.txt", "small", "uninterrupted"}
    assert cli.main([*words, str(output)]) == 2, "a finished result must not be overwritten"


def test_replaced_result_is_restored_after_a_kill(tmp_path: Path) -> None:
    checkpoint, output = tmp_path / ".small.checkpoint", tmp_path / "small"
    for left in (RESULT, REPLACED):
        (checkpoint / left).mkdir(parents=True)
        (checkpoint / left / left).touch()
    restore_output(checkpoint, output)
    assert [path.name for path in output.iterdir()] == [REPLACED]
    assert list(checkpoint.iterdir()) == []


def test_symbolic_link_as_output_is_kept(tmp_path: Path) -> None:
    model, text = save_dense(tmp_path / "dense"), save_text(tmp_path / "text.txt")
    (tmp_path / "disk").mkdir()
    (tmp_path / "small").symlink_to(tmp_path / "disk" / "small")
    words = ["compress", str(model), "--dataset", str(text), *FLAGS, "--output", str(tmp_path / "small")]
    assert cli.main(words) == 0
    assert (tmp_path / "small").is_symlink()
    assert (tmp_path / "small" / "report.json").is_file()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["small"], "the checkpoint must be removed"


def test_remove_deletes_the_manifest_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        killed_at(2, patch)
        with pytest.raises(Killed):
            run(dense("llama-mha"), Checkpoint(tmp_path / "kept"))
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", lambda *args, **kwargs: None)
        Checkpoint(tmp_path / "kept").remove()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [module.MANIFEST]


def test_full_disk_while_saving_the_result_is_reported_as_a_user_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = save_dense(tmp_path / "dense"), save_text(tmp_path / "text.txt")
    words = ["compress", str(model), "--dataset", str(text), *FLAGS, "--output", str(tmp_path / "small")]

    def full(*args: Any) -> None:
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ModeGPTQuantizer, "save", full)
        assert cli.main(words) == 2
    assert "No space left on device\nFree disk space and run the same command again." in capsys.readouterr().err
    assert cli.main(words) == 0


def test_concurrent_command_with_the_same_output_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = save_dense(tmp_path / "dense"), save_text(tmp_path / "text.txt")
    words = ["compress", str(model), "--dataset", str(text), *FLAGS, "--output", str(tmp_path / "small")]
    save, codes = ModeGPTQuantizer.save, []

    def meanwhile(*args: Any) -> None:
        codes.append(cli.main(words))
        save(*args)

    monkeypatch.setattr(ModeGPTQuantizer, "save", meanwhile)
    assert cli.main(words) == 0
    assert codes == [2]
    assert "another run is using" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "text.txt", "small"}


def test_command_resumes_after_sigkill(tmp_path: Path) -> None:
    checkpoint, text = save_dense(tmp_path / "dense"), save_text(tmp_path / "text.txt")
    words = ["compress", str(checkpoint), "--dataset", str(text), *FLAGS, "--output"]
    kept = tmp_path / ".small.checkpoint"
    script = (
        "import os, signal; from optimum_modegpt.walk import checkpoint\n"
        "checkpoint.STREAM_SECONDS = 0\n"
        "keep = checkpoint.Checkpoint.keep_streams\n"
        "die = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoint.Checkpoint.keep_streams = lambda *args: (keep(*args), die())\n"
        "from optimum_modegpt.cli.main import main\n"
        f"main({[*words, str(tmp_path / 'small')]!r})\n"
    )
    assert run_forked(script).returncode == -signal.SIGKILL
    assert list(kept.glob("streams-*.safetensors"))
    assert json.loads((kept / "manifest.json").read_text())["errors"]
    assert cli.main([*words, str(tmp_path / "small")]) == 0
    assert cli.main([*words, str(tmp_path / "uninterrupted")]) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "uninterrupted"))
    assert_same(one, other)
    assert not kept.exists()
