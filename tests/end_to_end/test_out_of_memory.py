"""Test that a stage that runs out of memory is retried once with half the batch size, with a warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import dense, tokens

from optimum_modegpt import ModeGPTConfig, Report
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.calibration.streams import StreamStorage
from optimum_modegpt.compress import compress
from optimum_modegpt.methods import residual_matched, sensitivity
from optimum_modegpt.walk import checkpoint as checkpoints
from optimum_modegpt.walk.checkpoint import Checkpoint

SEEN = "out of memory with batch_size={}; started again with {}."


def run(model: Any, batch_size: int, checkpoint: Checkpoint | None = None, **fields: Any) -> Report:
    config = ModeGPTConfig(sparsity=0.3, batch_size=batch_size, allocation="uniform", refit_iterations=1, **fields)
    return compress(model, config, TokenWindows(tokens(8, 24), {}), checkpoint=checkpoint, progress=False)


def exhaust(of: str) -> None:
    """Raise the error that torch raises if the memory of the device or the host is exhausted."""
    if of == "device":
        raise torch.OutOfMemoryError("out of memory")
    torch.empty(2**60, dtype=torch.uint8)


class Memory:
    """Simulate memory that is too small for more than `windows` windows, and for any batch at block `fails_at`."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, windows: int, fails_at: int | None = None, of: str = "device"
    ) -> None:
        self.windows, self.fails_at, self.of, self.largest = windows, fails_at, of, []
        self.original = residual_matched.run_dense
        monkeypatch.setattr(residual_matched, "run_dense", self)

    def __call__(self, block: Any, stream: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        self.largest.append(max(map(len, stream)))
        if (block.index > 0 and self.largest[-1] > self.windows) or block.index == self.fails_at:
            exhaust(self.of)
        return self.original(block, stream, *args, **kwargs)


def states(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("of", ["device", "host"])
def test_retry_is_bit_identical_to_a_run_with_half_the_batch_size(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, model = dense("llama-gqa-tied"), dense("llama-gqa-tied")
    assert not run(expected, 2).warnings
    Memory(monkeypatch, windows=2, of=of)
    report = run(model, 4)
    assert report.warnings == (f"decompose: {SEEN.format(4, 2)}",)
    assert [stage.name for stage in report.stages] == [
        "embed",
        "gradients",
        "allocate (uniform)",
        "decompose",
        "adopt",
        "self-check",
    ]
    torch.testing.assert_close(states(model), states(expected), rtol=0, atol=0)


def test_stage_is_retried_only_once_and_never_below_one_window(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense("llama-gqa-tied")
    before = states(model)
    memory = Memory(monkeypatch, windows=0)
    for batch_size, tried in ((8, [8, 8, 4, 4]), (1, [1, 1])):
        memory.largest.clear()
        with pytest.raises(torch.OutOfMemoryError):
            run(model, batch_size)
        assert memory.largest == tried  # the first block and the second, each time
    torch.testing.assert_close(states(model), before, rtol=0, atol=0)


def test_embedding_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, model = dense("llama-gqa-tied"), dense("llama-gqa-tied")
    run(expected, 2)
    keep = StreamStorage.keep

    def kept(place: StreamStorage, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 3 and len(tensor) > 2:
            exhaust("device")
        return keep(place, tensor)

    monkeypatch.setattr(StreamStorage, "keep", kept)
    assert run(model, 4).warnings == (f"embed: {SEEN.format(4, 2)}",)
    torch.testing.assert_close(states(model), states(expected), rtol=0, atol=0)


def test_other_errors_are_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def breaks(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(residual_matched, "run_dense", breaks)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(dense("llama-gqa-tied"), 4)
    assert len(calls) == 1


@pytest.mark.parametrize(("batch", "windows"), [(4, 16), (5, 9)])
def test_allocation_is_retried(batch: int, windows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original, sizes = sensitivity.Sweeps.measured, []

    def measured(sweeps: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(max(map(len, sweeps.moments.stream)))
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return original(sweeps, *args, **kwargs)

    run_dense, decomposed = residual_matched.run_dense, set()

    def noted(block: Any, stream: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        decomposed.update(map(len, stream))
        return run_dense(block, stream, *args, **kwargs)

    monkeypatch.setattr(sensitivity.Sweeps, "measured", measured)
    monkeypatch.setattr(residual_matched, "run_dense", noted)
    config = ModeGPTConfig(sparsity=0.3, batch_size=batch, refit_iterations=0)
    report = compress(dense("opt"), config, TokenWindows(tokens(windows, 24), {}), progress=False)
    assert sizes == [min(batch, windows // 4), 2]
    assert f"allocate (sensitivity): {SEEN.format(batch, 2)}" in report.warnings
    assert report.batch_size == 2
    assert max(decomposed) == 2, "the decomposition must use the reported batch size"


def test_resumed_run_keeps_the_reduced_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "STREAM_SECONDS", 0)
    expected, model = dense("llama-gqa-tied"), dense("llama-gqa-tied")
    with monkeypatch.context() as patches:
        Memory(patches, windows=2)
        run(expected, 4, Checkpoint(tmp_path / "whole"))
    with monkeypatch.context() as patches:
        memory = Memory(patches, windows=2, fails_at=2)
        with pytest.raises(torch.OutOfMemoryError):
            run(model, 4, Checkpoint(tmp_path / "parts"))
    assert memory.largest == [4, 4, 2, 2]  # the retry resumes after the first block
    memory = Memory(monkeypatch, windows=2)
    report = run(model, 4, Checkpoint(tmp_path / "parts"))
    assert memory.largest == [2]
    assert report.batch_size == 2
    assert report.warnings == (f"decompose: {SEEN.format(4, 2)}",)
    torch.testing.assert_close(states(model), states(expected), rtol=0, atol=0)


def test_resumed_run_accepts_another_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "STREAM_SECONDS", 0)
    model = dense("llama-gqa-tied")
    Memory(monkeypatch, windows=1)
    with pytest.raises(torch.OutOfMemoryError):
        run(model, 4, Checkpoint(tmp_path / "parts"))
    report = run(model, 1, Checkpoint(tmp_path / "parts"))
    assert report.batch_size == 1
    assert report.stages[0].name == "earlier runs"
