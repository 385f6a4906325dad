"""Test the choice of the device, the measurements of stages and the budget of the sensitivities."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from optimum_modegpt.architectures.shapes import Shapes
from optimum_modegpt.methods import sensitivity_cost
from optimum_modegpt.methods.cost import Extent, block_forward
from optimum_modegpt.methods.sensitivity import FEWER_RATIOS, FEWEST_WINDOWS, RATIOS, SHORTEST_WINDOW, budget
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


def shapes(blocks: int, width: int, vocabulary: int) -> Shapes:
    """Return the sizes of a Llama model with 64 coordinates a head."""
    weights = 4 * width**2 + 3 * width * 3 * width
    return Shapes(
        d_model=width,
        heads=width,
        head_count=width // 64,
        groups=width // 64,
        mlp=3 * width,
        mlp_inputs=3 - 1,
        weights=weights,
        rotary=True,
        vocabulary=vocabulary,
        blocks=blocks,
    )


SMALL, DEEP, DEEPEST = shapes(5, 64, 512), shapes(30, 576, 49152), shapes(80, 8192, 32000)


def test_small_model_uses_whole_windows() -> None:
    found = budget(SMALL, 64, 256)
    assert found.moment_windows == 16
    assert found.divergence_windows == 16
    assert found.ratios == RATIOS
    assert found.divergence_length == 256


@pytest.mark.parametrize("model", [DEEP, DEEPEST], ids=["30 blocks", "80 blocks"])
def test_sensitivities_of_a_deep_model_cost_less_than_a_pass(model: Shapes) -> None:
    windows, length = 128, 2048
    found = budget(model, windows, length)
    assert found.divergence_windows == FEWEST_WINDOWS
    assert found.ratios == FEWER_RATIOS
    assert SHORTEST_WINDOW <= found.divergence_length < length
    work = sensitivity_cost.work(model, Extent(windows, length, length, 2))
    assert work["own"] <= model.blocks * block_forward(model, windows, length)


@pytest.mark.parametrize("model", [DEEP, DEEPEST], ids=["30 blocks", "80 blocks"])
def test_a_small_calibration_still_measures_on_windows_of_some_length(model: Shapes) -> None:
    found = budget(model, 64, 512)
    assert (found.divergence_windows, found.divergence_length) == (FEWEST_WINDOWS, SHORTEST_WINDOW)


def test_few_windows_are_split_between_moments_and_divergences() -> None:
    for windows in range(1, 60):
        found = budget(SMALL, windows, 64)
        assert found.moment_windows >= 1
        assert found.divergence_windows >= 1
        assert windows == 1 or found.moment_windows + found.divergence_windows <= windows
