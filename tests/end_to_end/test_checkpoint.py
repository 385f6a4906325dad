"""A compression that is killed goes on where it was, and ends in the same bits."""

from __future__ import annotations

import copy
import errno
import json
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import RECIPE, save_dense, save_text
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_models import FAMILIES, dense, tokens
from torch import nn

from optimum_modegpt import ModeGPTConfig, ModeGPTQuantizer
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.cli import main as cli
from optimum_modegpt.compress import compress
from optimum_modegpt.errors import CheckpointError, IllConditionedWarning
from optimum_modegpt.hub.output import taken_back
from optimum_modegpt.methods import residual_matched
from optimum_modegpt.methods.sensitivity import Sweeps
from optimum_modegpt.walk import checkpoint as module
from optimum_modegpt.walk.checkpoint import REPLACED, RESULT, Checkpoint, fingerprint

FLAGS = [part for key, value in RECIPE.items() for part in (f"--{key.replace('_', '-')}", str(value))]


@pytest.fixture(autouse=True)
def every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams are written after every block, however fast."""
    monkeypatch.setattr(module, "STREAM_SECONDS", 0)


class Killed(BaseException):
    """What a kill looks like from inside."""


def run(model: Any, checkpoint: Checkpoint | None, **fields: Any) -> Any:
    config = ModeGPTConfig(sparsity=0.3, **fields)
    return compress(model, config, TokenWindows(tokens(12, 24), {}), checkpoint=checkpoint, progress=False)


def killed_at(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default method dies at the beginning of this block."""
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


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("block", [1, 2])
def test_going_on_ends_in_the_same_bits(name: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, first, again = dense(name), dense(name), dense(name)
    report = run(straight, None)
    with monkeypatch.context() as patch:
        killed_at(block, patch)
        with pytest.raises(Killed):
            run(first, Checkpoint(tmp_path / "kept"))
    assert type(first) is type(dense(name)), "the model in memory is as it was"
    calls: list[int] = []
    original = residual_matched.compress_block
    monkeypatch.setattr(
        residual_matched,
        "compress_block",
        lambda student, *a, **k: (calls.append(student.index), original(student, *a, **k))[1],
    )
    checkpoint = Checkpoint(tmp_path / "kept")
    resumed = run(again, checkpoint)
    assert calls == list(range(block, 3))
    assert_same(states(again), states(straight))
    assert resumed.blocks == report.blocks
    assert resumed.sensitivities == report.sensitivities
    assert resumed.sensitivity_budget == report.sensitivity_budget
    assert resumed.stages[0].name == "earlier runs"
    assert not any(stage.name.startswith("allocate") for stage in resumed.stages)
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []
    assert_same(states(again), states(straight))


@pytest.mark.parametrize("recipe", [{"method": "paper"}, {"allocation": "uniform"}])
def test_a_checkpoint_changes_nothing(recipe: dict[str, Any], tmp_path: Path) -> None:
    straight, kept = dense("llama-gqa-tied"), dense("llama-gqa-tied")
    for parameter in (*straight.parameters(), *kept.parameters()):
        parameter.requires_grad_(parameter.ndim > 1)
    run(straight, None, **recipe)
    run(kept, Checkpoint(tmp_path / "kept"), **recipe)
    assert_same(states(kept), states(straight))
    assert [p.requires_grad for p in kept.parameters()] == [p.requires_grad for p in straight.parameters()]


def test_finished_blocks_are_maps_of_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    original = Checkpoint.keep_block
    monkeypatch.setattr(Checkpoint, "keep_block", lambda *args: kept.append(original(*args)) or kept[-1])
    run(dense("llama-gqa-tied"), Checkpoint(tmp_path / "kept"))
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not tell what is mapped")
    address = kept[1].mlp.down_proj.weight.data_ptr()
    (line,) = (
        line
        for line in maps.read_text().splitlines()
        if int(line.split("-")[0], 16) <= address < int(line.split("-")[1].split()[0], 16)
    )
    assert line.endswith("block-00001.safetensors")


def test_work_without_streams_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STREAM_SECONDS", 3600)
    straight, again = dense("llama-mha"), dense("llama-mha")
    run(straight, None)
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
    assert_same(states(again), states(straight))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"sparsity": 0.2}, "configuration, sparsity was 0.3, now it is 0.2"),
        ({"seed": 1}, "configuration, seed was 0"),
        ({"round_to": 8}, "configuration, round_to was 'auto', now it is 8"),
    ],
)
def test_another_compression_is_refused_by_name(
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
    fresh, straight = dense("llama-mha"), dense("llama-mha")
    Checkpoint(tmp_path / "kept").remove()
    compress(fresh, config, windows, checkpoint=Checkpoint(tmp_path / "kept"), progress=False)
    compress(straight, config, windows, progress=False)
    assert_same(states(fresh), states(straight))


def test_two_runs_do_not_share_a_checkpoint(tmp_path: Path) -> None:
    first, second = Checkpoint(tmp_path / "kept"), Checkpoint(tmp_path / "kept")
    with first.opened({}), pytest.raises(CheckpointError, match="another run is using"), second.opened({}):
        pass


def test_a_full_disk_keeps_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, again = dense("qwen2"), dense("qwen2")
    run(straight, None)
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
            run(dense("qwen2"), Checkpoint(tmp_path / "kept"))
    assert not list((tmp_path / "kept").glob("*.partial"))
    run(again, Checkpoint(tmp_path / "kept"))
    assert_same(states(again), states(straight))


def test_sensitivities_go_on_after_the_last_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, again = dense("llama-gqa-tied"), dense("llama-gqa-tied")
    report = run(straight, None)
    measure, sweeps = Sweeps._measure, []

    def dies_in_the_third(self: Sweeps, sweep: range, *args: Any) -> Any:
        if len(sweeps) == 2:
            raise Killed
        sweeps.append(sweep)
        return measure(self, sweep, *args)

    monkeypatch.setattr(Sweeps, "_measure", dies_in_the_third)
    with pytest.raises(Killed):
        run(dense("llama-gqa-tied"), Checkpoint(tmp_path / "kept"))
    assert sweeps == [range(1), range(1, 2)]
    sweeps.clear()
    resumed = run(again, Checkpoint(tmp_path / "kept"))
    assert sweeps == [range(2, 3)]
    assert resumed.sensitivities == report.sensitivities
    assert_same(states(again), states(straight))


def test_a_resumed_run_reports_what_the_first_was_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = residual_matched.cut_mlp

    def cut_badly(*args: Any) -> Any:
        warnings.warn("a moment is ill-conditioned", IllConditionedWarning, stacklevel=1)
        return cut(*args)

    with monkeypatch.context() as patch:
        killed_at(1, patch)
        patch.setattr(residual_matched, "cut_mlp", cut_badly)
        with pytest.raises(Killed):
            run(dense("llama-mha"), Checkpoint(tmp_path / "kept"), allocation="uniform", refit_iterations=0)
    report = run(dense("llama-mha"), Checkpoint(tmp_path / "kept"), allocation="uniform", refit_iterations=0)
    assert "a moment is ill-conditioned" in report.warnings


@pytest.mark.parametrize("place", [0, 700, 2999])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_weight_counts_in_the_fingerprint(dtype: torch.dtype, place: int) -> None:
    whole = torch.randn(3020, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = nn.Linear(50, 60, bias=False)
    layer.weight = nn.Parameter(whole[5:3005].view(60, 50))  # somewhere in a larger storage
    before = fingerprint(layer)
    assert fingerprint(copy.deepcopy(layer)) == before
    weights = layer.weight.detach().view(-1)
    weights[place] = torch.nextafter(weights[place], torch.tensor(torch.inf, dtype=dtype))
    assert fingerprint(layer) != before


def test_the_place_of_weights_counts_in_the_fingerprint() -> None:
    layer = nn.Linear(64, 1000)
    turned = copy.deepcopy(layer)
    turned.weight.data = layer.weight.detach().flip(0)
    assert fingerprint(turned) != fingerprint(layer)


@pytest.mark.parametrize("name", ["model.safetensors", "folder"])
def test_a_folder_that_is_none_of_ours_is_left_alone(name: str, tmp_path: Path) -> None:
    place = tmp_path / "models"
    (place / name).mkdir(parents=True)
    checkpoint = Checkpoint(place)
    for refused in (lambda: run(dense("llama-mha"), checkpoint), checkpoint.remove):
        with pytest.raises(CheckpointError, match=f"contains files that are not part of a checkpoint: {name}"):
            refused()
    assert (place / name).is_dir()


def test_a_manifest_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest.json cannot be read(.|\n)*--fresh"):
        run(dense("llama-mha"), Checkpoint(tmp_path / "kept"))


SAVE = "lambda self, model, folder, *_: ((folder / 'half').touch(), die())"
KILLED = {
    "while its result is saved": f"quantizer.ModeGPTQuantizer.save = {SAVE}",
    "before its result is in place": "output._place = die",
    "when its result is in place": "checkpoint.Checkpoint.remove = die",
}


@pytest.mark.parametrize("moment", KILLED)
def test_the_command_ends_well_where_it_was_killed_at_the_end(moment: str, tmp_path: Path) -> None:
    model, text, output = save_dense(tmp_path / "dense"), save_text(tmp_path / "text.txt"), tmp_path / "small"
    words = ["compress", str(model), "--dataset", str(text), *FLAGS, "--output"]
    script = (
        "import os, signal\n"
        "from optimum_modegpt.walk import checkpoint\n"
        "from optimum_modegpt.cli import main as cli\n"
        "from optimum_modegpt.hub import output\n"
        "from optimum_modegpt.integration import quantizer\n"
        "die = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{KILLED[moment]}\n"
        f"cli.main({[*words, str(output)]!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, check=False)
    assert done.returncode == -signal.SIGKILL
    assert output.exists() == (moment == "when its result is in place")
    if output.exists():
        assert cli.main([*words, str(output), "--dtype", "float16"]) == 2, "another result is not this one"
    assert cli.main([*words, str(output)]) == 0
    assert cli.main([*words, str(tmp_path / "straight")]) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "straight"))
    assert_same(one, other)
    assert {path.name for path in output.iterdir()} == {path.name for path in (tmp_path / "straight").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "text.txt", "small", "straight"}
    assert cli.main([*words, str(output)]) == 2, "what is finished is not overwritten"


def test_what_was_overwritten_comes_back_where_the_run_was_killed(tmp_path: Path) -> None:
    workshop, place = tmp_path / ".small.checkpoint", tmp_path / "small"
    for left in (RESULT, REPLACED):
        (workshop / left).mkdir(parents=True)
        (workshop / left / left).touch()
    taken_back(workshop, place)
    assert [path.name for path in place.iterdir()] == [REPLACED]
    assert list(workshop.iterdir()) == []


def test_a_link_stays_a_link_to_the_result(tmp_path: Path) -> None:
    model, text = save_dense(tmp_path / "dense"), save_text(tmp_path / "text.txt")
    (tmp_path / "disk").mkdir()
    (tmp_path / "small").symlink_to(tmp_path / "disk" / "small")
    words = ["compress", str(model), "--dataset", str(text), *FLAGS, "--output", str(tmp_path / "small")]
    assert cli.main(words) == 0
    assert (tmp_path / "small").is_symlink()
    assert (tmp_path / "small" / "report.json").is_file()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["small"], "unfinished work was beside the result"


def test_a_checkpoint_is_known_until_the_last_of_it_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        killed_at(2, patch)
        with pytest.raises(Killed):
            run(dense("llama-mha"), Checkpoint(tmp_path / "kept"))
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", lambda *args, **kwargs: None)
        Checkpoint(tmp_path / "kept").remove()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [module.MANIFEST]


def test_a_full_disk_while_the_result_is_saved_is_no_defect(
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


def test_a_second_command_waits_for_the_result_of_the_first(
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


def test_the_command_goes_on_after_kill_9(tmp_path: Path) -> None:
    checkpoint, text = save_dense(tmp_path / "dense"), save_text(tmp_path / "text.txt")
    words = ["compress", str(checkpoint), "--dataset", str(text), *FLAGS, "--output"]
    kept = tmp_path / ".small.checkpoint"
    script = (
        "import time; from optimum_modegpt.walk import checkpoint\n"
        "checkpoint.STREAM_SECONDS = 0\n"
        "keep = checkpoint.Checkpoint.keep_streams\n"
        "checkpoint.Checkpoint.keep_streams = lambda *args: (keep(*args), time.sleep(600))\n"
        "from optimum_modegpt.cli.main import main\n"
        f"main({[*words, str(tmp_path / 'small')]!r})\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 120
        while not list(kept.glob("streams-*.safetensors")) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
    assert json.loads((kept / "manifest.json").read_text())["errors"]
    assert cli.main([*words, str(tmp_path / "small")]) == 0
    assert cli.main([*words, str(tmp_path / "straight")]) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "straight"))
    assert_same(one, other)
    assert not kept.exists()
