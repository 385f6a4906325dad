"""Test the choice of the device, the measurements of stages and the budget of the sensitivities."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from optimum_modegpt.methods.sensitivity import DIVERGENCE_WINDOWS, LEAST_BUDGET, MOMENT_WINDOWS, RATIOS, budget
from optimum_modegpt.report import PARTS
from optimum_modegpt.stages import StageClock, compute_device

CPU = torch.device("cpu")


def test_resident_memory_is_sampled_on_the_host() -> None:
    clock = StageClock(CPU)
    with clock.stage("allocate"):
        block = torch.ones(2**25)  # 128 MiB, written to
    assert clock.memory_kind == "sampled resident size"
    (stage,) = clock.stages
    assert stage.name == "allocate"
    assert stage.seconds > 0
    assert stage.peak_memory > block.nbytes


def test_peak_of_the_allocator_is_reported_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    backend = types.SimpleNamespace(
        reset_peak_memory_stats=lambda _: calls.append("reset"),
        synchronize=lambda _: calls.append("synchronize"),
        max_memory_allocated=lambda _: calls.append("read") or 12345,
    )
    monkeypatch.setattr(torch, "xpu", backend)
    clock = StageClock(torch.device("xpu"))
    with clock.stage("decompose"):
        calls.append("work")
    assert calls == ["reset", "work", "synchronize", "read"]
    assert clock.memory_kind == "device memory"
    assert clock.stages[0].peak_memory == 12345


@pytest.mark.parametrize(
    ("wanted", "home", "expected"),
    [
        (None, "cpu", "xpu:1"),
        (None, "xpu:0", "xpu:0"),
        ("cpu", "xpu:0", "cpu"),
        ("xpu", "cpu", "xpu:1"),
        ("xpu:0", "cpu", "xpu:0"),
    ],
)
def test_accelerator_is_the_default_device(
    wanted: Any, home: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    assert compute_device(wanted, torch.device(home)) == torch.device(expected)


def test_cpu_is_the_default_device_without_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert compute_device(None, CPU) == CPU
    assert compute_device("cpu", CPU) == CPU


def test_small_model_uses_all_windows_and_ratios() -> None:
    found = budget(5, 64)
    assert (found.moment_windows, found.divergence_windows) == (MOMENT_WINDOWS, DIVERGENCE_WINDOWS)
    assert found.ratios == RATIOS


@pytest.mark.parametrize("blocks", [8, 16, 24, 32])
def test_budget_of_deeper_models_is_limited(blocks: int) -> None:
    found = budget(blocks, 128)
    forwards = len(PARTS) * len(found.ratios) * blocks * (blocks + 1) // 2 * found.divergence_windows
    assert forwards <= max(LEAST_BUDGET, 2 * blocks * 128)


def test_few_windows_are_split_between_moments_and_divergences() -> None:
    for windows in range(1, 60):
        found = budget(4, windows)
        assert found.moment_windows >= 1
        assert found.divergence_windows >= 1
        assert windows == 1 or found.moment_windows + found.divergence_windows <= windows
