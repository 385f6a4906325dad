"""Test the estimate of a compression, the preflight check, and the flag that skips it."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from checkpoints import RECIPE, save_dense, save_text
from tiny_configs import VARIANTS
from tiny_models import dense
from transformers import AutoModelForCausalLM

from optimum_modegpt import InsufficientResources, ModeGPTConfig, distributed
from optimum_modegpt.budget import placement, preflight
from optimum_modegpt.budget.estimate import LIBRARIES, Estimate, estimate, on_meta
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.cli import main as cli
from optimum_modegpt.walk.checkpoint import Checkpoint
from optimum_modegpt.walk.prepare import prepare
from optimum_modegpt.walk.state import choose_precision, place

PLENTY = 2**40


def found_on(device: str) -> Estimate:
    """Return the estimate of a small compression on the present machine."""
    config_class, values = VARIANTS["llama-mha"]
    model = on_meta(AutoModelForCausalLM, config_class(**values))
    return estimate(model, ModeGPTConfig(**RECIPE), 32, device=torch.device(device))


def has(monkeypatch: pytest.MonkeyPatch, *, host: int = PLENTY, disk: int = PLENTY, device: int = PLENTY) -> None:
    """Pretend that the machine has this many free bytes."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=host, total=2**40))
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=disk))
    monkeypatch.setattr(torch, "xpu", types.SimpleNamespace(mem_get_info=lambda _: (device, 2**40)))


@pytest.mark.parametrize(
    ("device", "free", "said"),
    [
        ("cpu", {"host": 2**16}, r"host memory: needed .* MiB \(most for .*\), free 0\.1 MiB; use a smaller --num-"),
        ("xpu", {"host": 1000}, r"host memory: needed .* \(most for libraries\)"),
        ("xpu", {"device": 1000}, r"memory on xpu: needed .* or --device cpu"),
        ("cpu", {"disk": 1000}, r"disk at .*: needed .* use an --output on another disk"),
    ],
)
def test_a_shortage_is_refused_with_a_remedy(
    device: str, free: dict[str, int], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch)
    preflight.check_resources(found_on(device), torch.device(device), tmp_path / "new" / "folder")
    has(monkeypatch, **free)
    with pytest.raises(InsufficientResources, match=said) as refusal:
        preflight.check_resources(found_on(device), torch.device(device), tmp_path / "new" / "folder")
    assert "Pass --ignore-estimate to continue anyway" in str(refusal.value)


@pytest.mark.parametrize("device", ["cpu", "xpu"])
def test_streams_in_files_are_not_refused(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, device=2**21)
    needs = (found_on(device).without if device == "cpu" else found_on(device).with_accelerator).needs
    assert not needs.files
    enough = sum(needs.host.values()) - 2 * 8 * 32 * 32 * 4  # two of three streams of 8 windows do not fit
    has(monkeypatch, host=enough, device=2**21)
    found = found_on(device)
    spilled = (found.without if device == "cpu" else found.with_accelerator).needs
    assert spilled.files == {"residual streams": 3 * 8 * 32 * 32 * 4}
    preflight.check_resources(found, torch.device(device), tmp_path)
    has(monkeypatch, host=enough, device=2**21, disk=sum(found.disk.values()))
    with pytest.raises(InsufficientResources, match="disk at"):
        preflight.check_resources(found, torch.device(device), tmp_path)


def test_files_of_an_interrupted_run_are_not_needed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = found_on("cpu")
    needed = sum(found.disk.values())
    has(monkeypatch, disk=needed - 100)
    with pytest.raises(InsufficientResources):
        preflight.check_resources(found, torch.device("cpu"), tmp_path, written=99)
    preflight.check_resources(found, torch.device("cpu"), tmp_path, written=100)


def group(folder: Path, limit: str, used: int, inactive: int, *, first_version: bool = False) -> None:
    """Write the files of a control group."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("limit_in_bytes", "usage_in_bytes", "total_") if first_version else ("max", "current", "")
    (folder / f"memory.{names[0]}").write_text(f"{limit}\n")
    (folder / f"memory.{names[1]}").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 400\n{names[2]}inactive_file {inactive}\n")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the control groups. The file `membership` names those of this process."""
    has(monkeypatch)
    monkeypatch.setattr(placement, "GROUPS", tmp_path)
    monkeypatch.setattr(placement, "MEMBERSHIP", tmp_path / "membership")
    return tmp_path


def test_without_control_groups_the_machine_counts(groups: Path) -> None:
    assert placement.host_memory() == PLENTY
    (groups / "membership").write_text("4:memory:/job\n0::/job\n")
    assert placement.host_memory() == PLENTY, "their folders are not visible"


@pytest.mark.parametrize(("limit", "left"), [("1000", 1000 - 700 + 300), ("max", PLENTY)])
@pytest.mark.parametrize("member", ["/", "/seen/from/the/host/alone"])
def test_the_limit_of_the_control_group_counts(member: str, limit: str, left: int, groups: Path) -> None:
    (groups / "membership").write_text(f"0::{member}\n")
    group(groups, limit, 700, 300)
    assert placement.host_memory() == left


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        (("max", "5000", "9000"), 5000 - 700 + 300),
        (("9000", "max", "5000"), 5000 - 700 + 300),
        (("5000", "9000", "max"), 5000 - 700 + 300),
        (("max", "max", "max"), PLENTY),
    ],
)
@pytest.mark.parametrize("first_version", [False, True])
def test_the_smallest_limit_of_the_enclosing_groups_counts(
    first_version: bool, limits: tuple[str, ...], left: int, groups: Path
) -> None:
    unlimited = str(2**63 - 4096) if first_version else "max"
    top = groups / "memory" if first_version else groups
    lines = ["1:cpu,cpuacct:/other", "4:memory:/job/step/a:b"] if first_version else ["0::/job/step/a:b"]
    (groups / "membership").write_text("\n".join(lines) + "\n")
    for folder, limit in zip((top / "job", top / "job/step", top / "job/step/a:b"), limits, strict=True):
        group(folder, unlimited if limit == "max" else limit, 700, 300, first_version=first_version)
    group(top / "job" / "other", "1000", 900, 0, first_version=first_version)
    assert placement.host_memory() == left


@pytest.mark.parametrize("host", [PLENTY, 2**16])
def test_several_processes_choose_the_predicted_placement(
    host: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, host=host)
    model, config, cpu = dense("llama-mha"), ModeGPTConfig(**RECIPE), torch.device("cpu")
    windows = TokenWindows(torch.zeros(8, 32, dtype=torch.int64), {})
    predicted = estimate(model, config, 32, device=cpu, processes=3).without
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    request = prepare(model, config, windows, None, cpu, None, Checkpoint(tmp_path / "kept"), False)
    taken = place(request, choose_precision(request))
    assert (taken.streams, taken.batch_size) == (predicted.streams, predicted.batch_size)
    assert predicted.streams == ("host" if host == PLENTY else "files")
    assert predicted.needs.host == {"libraries": 3 * LIBRARIES} | taken.needs.host
    assert predicted.needs.files == taken.needs.files


def test_several_processes_share_windows_and_one_checkpoint() -> None:
    model, config = dense("llama-mha", intermediate_size=1024), ModeGPTConfig(**RECIPE)
    alone, together = (estimate(model, config, 32, processes=count) for count in (1, 4))
    one, all_of_them = alone.without.needs.host, together.without.needs.host
    for name in ("libraries", "moments of the MLP, and their factorisation"):
        assert all_of_them[name] == 4 * one[name]
    assert all_of_them["residual streams"] == one["residual streams"], "each process has a share of them"
    on_device = [found.with_accelerator.needs.device for found in (alone, together)]
    for needs in on_device:
        needs.pop("batches on their way")  # smaller, with fewer windows
    assert on_device[0] == on_device[1], "each has one of its own"
    assert together.disk == alone.disk


def test_compress_refuses_before_it_reads_weights_unless_the_flag_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text, output = save_dense(tmp_path / "m"), save_text(tmp_path / "t.txt"), tmp_path / "new" / "out"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in RECIPE.items()]
    command: list[Any] = ["compress", model, "--output", output, "--dataset", text, "--device", "cpu", *flags]
    has(monkeypatch, disk=100)
    weights = (model / "model.safetensors").rename(tmp_path / "kept")
    assert cli.main([str(word) for word in command]) == 2
    assert "this compression does not fit" in capsys.readouterr().err
    assert not output.parent.exists()
    weights.rename(model / "model.safetensors")
    assert cli.main([str(word) for word in [*command, "--ignore-estimate"]]) == 0
    assert (output / "model.safetensors").is_file()


def test_converted_weights_are_in_memory() -> None:
    config_class, values = VARIANTS["llama-mha"]
    model = on_meta(AutoModelForCausalLM, config_class(**values), torch.bfloat16)
    mapped, converted = (
        estimate(model, ModeGPTConfig(**RECIPE), 32, weights_mapped=mapped) for mapped in (True, False)
    )
    assert mapped.mapped_weights == 2 * mapped.parameters
    assert converted.mapped_weights == 0
    assert converted.without.needs.host["weights"] == mapped.mapped_weights


def test_the_command_takes_the_flags_of_compress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text, file = save_dense(tmp_path / "m"), save_text(tmp_path / "t.txt"), tmp_path / "found"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in RECIPE.items()]
    common = [str(model), "--dataset", str(text), *flags, "--dtype", "bfloat16", "--device", "cpu"]
    has(monkeypatch, host=2**16)
    assert cli.main(["estimate", *common, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert "weights" in found["without"]["needs"]["host"], "they are converted"
    assert cli.main(["compress", *common, "--output", str(tmp_path / "out")]) == 2
    assert f"host memory: needed {found['without_host_total'] / 2**20:,.1f} MiB" in capsys.readouterr().err
    assert cli.main(["estimate", *common, "--json", str(file), "--processes", "3"]) == 0
    assert json.loads(file.read_text())["processes"] == 3
    assert "3 processes: host memory and files are totals" in capsys.readouterr().out
    assert cli.main(["estimate", *common, "--device", "nowhere"]) == 2
    assert "--device nowhere cannot be used" in capsys.readouterr().err
