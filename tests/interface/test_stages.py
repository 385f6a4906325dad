"""Test the choice of the device, the measurements of stages and the budget of the sensitivities."""

from __future__ import annotations

import itertools
import types
from typing import Any

import pytest
import torch

from optimum_modegpt.architectures.shapes import Shapes
from optimum_modegpt.methods import sensitivity_cost
from optimum_modegpt.methods.cost import Extent, block_forward
from optimum_modegpt.methods.sensitivity import FEWEST_WINDOWS, GRADIENT_WINDOWS, LENGTH, MEASURED_BLOCKS, budget, split
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
        mlp=3 * width,
        mlp_inputs=2,
        weights=weights,
        vocabulary=vocabulary,
        blocks=blocks,
    )


SMALL, DEEP, DEEPEST = shapes(5, 64, 512), shapes(30, 576, 49152), shapes(80, 8192, 32000)


def passes(model: Shapes, windows: int, length: int, precisions: tuple[str, ...] = ("own",)) -> float:
    """Return the cost of gradients and sensitivities, in passes of one stream through all blocks."""
    extent = Extent(windows, length, length, 2)
    works = (sensitivity_cost.work(model, extent), sensitivity_cost.gradients_work(model, extent))
    cost = sum(work.get(precision, 0) for work in works for precision in precisions)
    return cost / (model.blocks * block_forward(model, windows, length))


def test_small_model_uses_whole_windows() -> None:
    found = budget(SMALL, 64, 256)
    assert found.moment_windows == 16
    assert found.gradient_windows == found.divergence_windows == 16
    assert found.length == 256


@pytest.mark.parametrize("length", [512, 2048])
@pytest.mark.parametrize("model", [DEEP, DEEPEST], ids=["30 blocks", "80 blocks"])
def test_sensitivities_of_a_deep_model_cost_at_most_a_pass(model: Shapes, length: int) -> None:
    found = budget(model, 128, length)
    assert found.length == LENGTH
    assert found.gradient_windows >= GRADIENT_WINDOWS
    assert found.divergence_windows >= FEWEST_WINDOWS
    assert passes(model, 128, length) <= 1
    assert passes(model, 128, length, ("own", "moments", "exact")) <= 2


@pytest.mark.parametrize("windows", [64, 128, 256])
def test_cost_of_the_sensitivities_grows_linearly_with_depth(windows: int) -> None:
    """The cost of a block is the same in models of different depth, up to the rounding to whole windows."""
    found = [passes(shapes(blocks, 576, 49152), windows, 512) for blocks in (30, 60, 120, 240)]
    assert max(found) < 1.25 * min(found)


@pytest.mark.parametrize("model", [DEEP, DEEPEST], ids=["30 blocks", "80 blocks"])
def test_small_calibration_still_measures_on_windows_of_some_length(model: Shapes) -> None:
    found = budget(model, 64, 512)
    assert (found.gradient_windows, found.divergence_windows, found.length) == (GRADIENT_WINDOWS, FEWEST_WINDOWS, 512)


def test_few_windows_are_split_between_moments_and_gradients() -> None:
    for windows in range(1, 60):
        found = budget(SMALL, windows, 64)
        for_moments, for_gradients = split(windows, found)
        moments, gradients = (range(windows)[each] for each in (for_moments, for_gradients))
        assert len(moments) == found.moment_windows
        assert len(gradients) == found.gradient_windows >= found.divergence_windows >= 1
        assert windows == 1 or set(moments).isdisjoint(gradients)


def test_measured_blocks_are_spaced_from_the_first_to_the_last() -> None:
    for blocks in range(1, 100):
        found = budget(shapes(blocks, 64, 512), 64, 256).blocks
        assert len(set(found)) == len(found) == min(blocks, MEASURED_BLOCKS)
        assert (found[0], found[-1]) == (0, blocks - 1)
        steps = [after - before for before, after in itertools.pairwise(found)]
        assert max(steps, default=1) - min(steps, default=1) <= 1
