"""What a compression needs against what is there: tensors counted, refusals, the flag that goes on."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from checkpoints import RECIPE, save_dense, save_text
from tiny import VARIANTS
from transformers import AutoModelForCausalLM

from optimum_modegpt import ModeGPTConfig, NotEnoughRoom
from optimum_modegpt.evaluation import room
from optimum_modegpt.evaluation.estimate import Estimate, estimate, on_meta
from optimum_modegpt.integration import cli
from optimum_modegpt.methods import placement

PLENTY = 2**40


def found_on(device: str) -> Estimate:
    """What the machine as it is now would be used for."""
    config_class, values = VARIANTS["llama-mha"]
    model = on_meta(AutoModelForCausalLM, config_class(**values))
    return estimate(model, ModeGPTConfig(**RECIPE), 32, device=torch.device(device))


def has(monkeypatch: pytest.MonkeyPatch, *, host: int = PLENTY, disk: int = PLENTY, device: int = PLENTY) -> None:
    """A machine with so many bytes free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=host, total=2**40))
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=disk))
    monkeypatch.setattr(torch, "xpu", types.SimpleNamespace(mem_get_info=lambda _: (device, 2**40)))


@pytest.mark.parametrize(
    ("device", "free", "said"),
    [
        ("cpu", {"host": 2**16}, r"host memory: needed .* MiB \(most for .*\), free 0\.1 MiB; take a smaller --num-"),
        ("xpu", {"host": 1000}, r"host memory: needed .* \(most for libraries\)"),
        ("xpu", {"device": 1000}, r"memory on xpu: needed .* or --device cpu"),
        ("cpu", {"disk": 1000}, r"disk at .*: needed .* take an --output on another disk"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_do(
    device: str, free: dict[str, int], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch)
    room.check_room(found_on(device), torch.device(device), tmp_path / "new" / "folder")
    has(monkeypatch, **free)
    with pytest.raises(NotEnoughRoom, match=said) as refusal:
        room.check_room(found_on(device), torch.device(device), tmp_path / "new" / "folder")
    assert "--ignore-estimate goes on" in str(refusal.value)


@pytest.mark.parametrize("device", ["cpu", "xpu"])
def test_what_fits_with_streams_in_files_is_not_refused(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, device=2**21)
    needs = (found_on(device).without if device == "cpu" else found_on(device).with_accelerator).needs
    assert not needs.files
    enough = sum(needs.host.values()) - 2 * 8 * 32 * 32 * 4  # two of three streams of 8 windows do not fit
    has(monkeypatch, host=enough, device=2**21)
    found = found_on(device)
    spilled = (found.without if device == "cpu" else found.with_accelerator).needs
    assert spilled.files == {"residual streams": 3 * 8 * 32 * 32 * 4}
    room.check_room(found, torch.device(device), tmp_path)
    has(monkeypatch, host=enough, device=2**21, disk=sum(found.disk.values()))
    with pytest.raises(NotEnoughRoom, match="disk at"):
        room.check_room(found, torch.device(device), tmp_path)


def test_what_an_interrupted_run_has_written_is_not_needed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = found_on("cpu")
    needed = sum(found.disk.values())
    has(monkeypatch, disk=needed - 100)
    with pytest.raises(NotEnoughRoom):
        room.check_room(found, torch.device("cpu"), tmp_path, written=99)
    room.check_room(found, torch.device("cpu"), tmp_path, written=100)


@pytest.mark.parametrize(("limit", "left"), [("1000", 1000 - 700 + 300), ("max", PLENTY)])
def test_the_limit_of_the_control_group_counts(
    limit: str, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch)
    monkeypatch.setattr(placement, "CGROUP", tmp_path)
    assert placement.host_memory() == PLENTY
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 300\n")
    assert placement.host_memory() == left


def test_compress_refuses_before_it_reads_weights_and_goes_on_when_told(
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


def test_weights_that_are_converted_do_not_stay_in_their_files() -> None:
    config_class, values = VARIANTS["llama-mha"]
    model = on_meta(AutoModelForCausalLM, config_class(**values), torch.bfloat16)
    mapped, converted = (
        estimate(model, ModeGPTConfig(**RECIPE), 32, weights_mapped=mapped) for mapped in (True, False)
    )
    assert mapped.mapped_weights == 2 * mapped.parameters
    assert converted.mapped_weights == 0
    assert converted.without.needs.host["weights"] == mapped.mapped_weights
