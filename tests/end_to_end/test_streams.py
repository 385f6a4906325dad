"""Test that results are bit-identical with streams in memory and in files, and that no stream files remain."""

from __future__ import annotations

import resource
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny_configs import FAMILIES
from tiny_models import dense, tokens

from optimum_modegpt import ModeGPTConfig, Report
from optimum_modegpt.budget.estimate import estimate
from optimum_modegpt.calibration import transfers
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.calibration.streams import StreamStorage, store_like
from optimum_modegpt.compress import compress
from optimum_modegpt.errors import CheckpointError
from optimum_modegpt.methods import residual_matched
from optimum_modegpt.walk import checkpoint as checkpoints
from optimum_modegpt.walk.checkpoint import Checkpoint

HOST = torch.device("cpu")
RECIPES: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in FAMILIES},
    "influence": {"name": "llama-gqa-tied", "allocation": "influence"},
    "post-ln": {"name": "opt-post-ln"},
    "paper": {"name": "opt-post-ln", "method": "paper"},
}
FURTHER = set(FAMILIES) - {"llama-gqa-tied", "gpt_neox"}
"""Cases that are tested in the full matrix only."""


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine without available memory, so that streams are kept in files."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=0, total=2**30))


@pytest.fixture
def spilled(monkeypatch: pytest.MonkeyPatch) -> list[Path | None]:
    """Record the folder of every stored tensor, and check that its file is not visible there."""
    folders: list[Path | None] = []
    original = StreamStorage.keep

    def keep(place: StreamStorage, tensor: torch.Tensor) -> torch.Tensor:
        found = original(place, tensor)
        folders.append(StreamStorage.of(found).folder)
        assert folders[-1] is None or not list(folders[-1].glob("*.stream"))
        return found

    monkeypatch.setattr(StreamStorage, "keep", keep)
    return folders


def run(name: str, checkpoint: Checkpoint | None = None, **recipe: Any) -> dict[str, torch.Tensor]:
    return run_with_report(name, checkpoint, **recipe)[0]


def run_with_report(
    name: str, checkpoint: Checkpoint | None = None, **recipe: Any
) -> tuple[dict[str, torch.Tensor], Report]:
    model = dense(name)
    config = ModeGPTConfig(**{"sparsity": 0.3, "batch_size": 5, "refit_iterations": 2, **recipe})
    report = compress(model, config, TokenWindows(tokens(12, 24), {}), checkpoint=checkpoint, progress=False)
    return dict(model.state_dict()), report


@cache
def in_memory(case: str) -> dict[str, torch.Tensor]:
    """Return the result of a recipe with streams in memory, for all tests that compare with it."""
    return run(**RECIPES[case])


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case in FURTHER else []) for case in RECIPES]
)
def test_streams_in_files_give_bit_identical_results(
    case: str, spilled: list[Path | None], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    expected = in_memory(case)
    assert set(spilled) <= {None}
    spilled.clear()
    request.getfixturevalue("little_memory")
    assert_same(run(**RECIPES[case], checkpoint=Checkpoint(tmp_path / "kept")), expected)
    assert set(spilled) == {tmp_path / "kept"}


@pytest.mark.parametrize("case", RECIPES)
def test_tensors_are_not_read_before_their_copy_has_completed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, waited = in_memory(case), 0

    def sent(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        home = torch.full_like(tensor, torch.nan)

        def synchronize() -> None:
            nonlocal waited
            waited += 1
            home.copy_(tensor)

        return home, types.SimpleNamespace(synchronize=synchronize)

    monkeypatch.setattr(transfers, "_sent_home", sent)
    assert_same(run(**RECIPES[case]), expected)
    assert waited


@pytest.mark.parametrize("starts_with", [0, 2**40])
def test_run_resumes_with_other_memory_and_the_recorded_batch_size(
    starts_with: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "STREAM_SECONDS", 0)
    original = residual_matched.compress_block

    def dies(student: Any, *args: Any, **kwargs: Any) -> Any:
        if student.index == 2:
            raise KeyboardInterrupt
        return original(student, *args, **kwargs)

    def has(available: int) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=available))

    has(starts_with)
    expected, whole = run_with_report("qwen2", batch_size=None)
    with monkeypatch.context() as patch:
        patch.setattr(residual_matched, "compress_block", dies)
        with pytest.raises(KeyboardInterrupt):
            run("qwen2", Checkpoint(tmp_path / "kept"), batch_size=None)
    has(2**40 - starts_with)
    found, resumed = run_with_report("qwen2", Checkpoint(tmp_path / "kept"), batch_size=None)
    assert_same(found, expected)
    assert {whole.streams, resumed.streams} == {"host", "files"}
    assert whole.batch_size == resumed.batch_size == (12 if starts_with else 1)


def test_without_a_checkpoint_streams_and_finished_blocks_are_in_the_temporary_folder(
    spilled: list[Path | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    expected = run("llama-mha", allocation="uniform")
    request.getfixturevalue("little_memory")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spilled.clear()
    found = run("llama-mha", allocation="uniform")
    assert set(spilled) == {tmp_path}
    assert_same(found, expected)
    for name, tensor in found.items():
        folder = tmp_path if ".layers." in name else None
        assert StreamStorage.of(tensor).folder == folder, name
    found["model.layers.0.mlp.down_proj.weight"].zero_()  # the weights are writable


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_stored_tensors_keep_values_and_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    given = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = StreamStorage(HOST, tmp_path).keep(given)
    assert found.dtype == dtype
    assert torch.equal(found, given)
    assert StreamStorage.of(found).keep(found) is found
    (transposed,) = store_like([given[1:].mT], [found])  # a view that is not contiguous
    assert torch.equal(transposed, given[1:].mT)
    assert StreamStorage.of(transposed) == StreamStorage(HOST, tmp_path)
    assert next(store_like([given], [given])) is given


@contextmanager
def full_disk(largest: int) -> Iterator[None]:
    """Limit the size of files, so that writing a larger one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_raises_with_advice(little_memory: None, tmp_path: Path) -> None:
    message = r"kept cannot hold the residual streams: .*\n.*rerun the same command"
    with full_disk(4096), pytest.raises(CheckpointError, match=message):
        run("llama-mha", Checkpoint(tmp_path / "kept"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", [{}, {"allocation": "uniform"}, {"method": "paper"}], ids=str)
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
def test_estimate_includes_stream_files(
    recipe: dict[str, Any], little_memory: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak, original = 0, StreamStorage.keep

    def keep(place: StreamStorage, tensor: torch.Tensor) -> torch.Tensor:
        nonlocal peak
        found = original(place, tensor)
        mapped = 0
        for line in Path("/proc/self/maps").read_text().splitlines():
            if ".stream" in line:
                start, end = line.split()[0].split("-")
                mapped += int(end, 16) - int(start, 16)
        peak = max(peak, mapped)
        return found

    monkeypatch.setattr(StreamStorage, "keep", keep)
    model = dense("llama-mha", num_hidden_layers=4)
    config = ModeGPTConfig(num_samples=8, batch_size=2, **recipe)
    expected = sum(estimate(model, config, 64).without.needs.files.values())
    windows = TokenWindows(tokens(8, 64), {})
    compress(model, config, windows, checkpoint=Checkpoint(tmp_path / "kept"), progress=False)
    assert 1 / 1.2 < peak / expected < 1.2
