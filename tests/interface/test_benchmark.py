"""Test the speed of a model and a reference: measurements, errors, and the output of the command."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import compressed, dense
from transformers import PreTrainedModel

from optimum_modegpt.cli import main as cli
from optimum_modegpt.errors import EvaluationError
from optimum_modegpt.evaluation.speed import Benchmark, Setting, Spread, benchmark
from optimum_modegpt.loading.safetensors_index import stored_bytes
from optimum_modegpt.loading.source import Source

NAME = "llama-gqa-tied"
NEW = 4


@pytest.fixture(scope="module")
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    return compressed(NAME), dense(NAME)


@pytest.fixture(scope="module")
def found(models: tuple[PreTrainedModel, PreTrainedModel]) -> Benchmark:
    return benchmark(*models, batch_sizes=(1, 2), prompt_lengths=(8, 100, 60), new_tokens=NEW, repeats=3)


@pytest.fixture(scope="module")
def folders(models: tuple[PreTrainedModel, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    for name, model in zip(("compressed", "dense"), models, strict=True):
        model.save_pretrained(folder / name)
    return [str(folder / "compressed"), "--reference", str(folder / "dense")]


def run(*arguments: Any) -> int:
    quick = ["--new-tokens", NEW, "--repeats", 2, "--batch-sizes", "1,2", "--prompt-lengths", "8"]
    return cli.main(["benchmark", *map(str, [*arguments, *quick])])


def test_spread_is_median_and_range() -> None:
    assert Spread.of([5.0, 1.0, 2.0]) == Spread(2.0, 1.0, 5.0)


def test_each_setting_once_cut_to_the_context(found: Benchmark) -> None:
    assert [row.setting for row in found.rows] == [Setting(batch, length) for batch in (1, 2) for length in (8, 60)]
    assert found.notes == ("prompts of 100 tokens were truncated to 60: the context is 64, with 4 new tokens",)


def test_rates_belong_to_the_times(found: Benchmark) -> None:
    for row in found.rows:
        for speed in (row.model, row.reference):
            assert speed is not None
            tokens = row.setting.batch_size * row.setting.prompt_length
            first = speed.first_token_seconds
            assert first.low * speed.prefill_tokens_per_second.high == pytest.approx(tokens)
            assert 0 < speed.decode_tokens_per_second.low <= speed.decode_tokens_per_second.median
        for ratio in (row.prefill_ratio, row.decode_ratio):
            assert ratio is not None
            assert 0 < ratio.low <= ratio.median <= ratio.high


def test_cache_and_weights_are_counted(
    found: Benchmark, models: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path
) -> None:
    assert found.reference is not None
    kept = sum(width.qk + width.vo for width in models[0].config.widths())
    for row in found.rows:
        assert row.model is not None
        assert row.reference is not None
        assert row.model.cache_bytes_per_token == 4 * 2 * kept  # float32, key-value heads, widths of all blocks
        assert row.reference.cache_bytes_per_token == 4 * 2 * 3 * 2 * 8
    for model, size in zip(models, (found.model, found.reference), strict=True):
        model.save_pretrained(tmp_path)
        assert size.parameters == model.num_parameters()
        assert size.disk_bytes is None, "it was not loaded from files"
        assert size.weight_bytes == pytest.approx((tmp_path / "model.safetensors").stat().st_size, rel=0.05)


def test_each_models_memory_is_seen_though_they_share_a_process() -> None:
    twins = [dense(NAME, intermediate_size=8192) for _ in range(2)]
    found = benchmark(*twins, batch_sizes=(32,), prompt_lengths=(60,), new_tokens=1, repeats=1)
    (row,) = found.rows
    hidden = 32 * 60 * 8192 * 4  # the MLP computes gate, up, and their product
    assert found.memory_kind == "sampled resident size"
    for speed in (row.model, row.reference):
        assert speed is not None
        assert 2 * hidden < speed.peak_memory - found.model.weight_bytes < 5 * hidden


def test_a_slower_model_is_called_slower(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    slow = dense(NAME, num_hidden_layers=24)
    (row,) = benchmark(slow, models[1], batch_sizes=(1,), prompt_lengths=(8,), new_tokens=8).rows
    assert row.prefill_ratio is not None
    assert row.decode_ratio is not None
    assert row.prefill_ratio.median < 0.7
    assert row.decode_ratio.median < 0.7


def test_models_take_turns_in_alternating_order(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    order: list[str] = []
    hooks = [
        model.register_forward_hook(lambda *_, name=name, **__: order.append(name))
        for model, name in zip(models, ("model", "reference"), strict=True)
    ]
    benchmark(*models, batch_sizes=(1,), prompt_lengths=(8,), new_tokens=1, repeats=3)
    for hook in hooks:
        hook.remove()
    turns = order[::2]  # two forward passes a turn
    assert turns == ["reference", "model", "model", "reference"] * 2 + ["reference", "model"]


def test_state_is_left_alone(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    model = models[0].train()
    before = torch.get_rng_state()
    benchmark(model, batch_sizes=(1,), prompt_lengths=(8,), new_tokens=1, repeats=1)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    model.eval()


def test_without_a_reference(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    found = benchmark(models[0], batch_sizes=(1,), prompt_lengths=(8,), new_tokens=1, repeats=1)
    (row,) = found.rows
    assert found.reference is None
    assert row.reference is row.prefill_ratio is row.decode_ratio is None
    assert row.model is not None


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_out_of_memory_is_told_in_its_row(error: Exception, models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    def fail(_module: Any, _args: Any, kwargs: Any) -> None:
        if len(kwargs["input_ids"]) > 1:
            raise error

    reference = dense(NAME)
    reference.register_forward_pre_hook(fail, with_kwargs=True)
    fits, full = benchmark(models[0], reference, batch_sizes=(1, 2), prompt_lengths=(8,), new_tokens=1, repeats=2).rows
    assert fits.failures == ()
    assert fits.decode_ratio is not None
    assert full.failures == ("reference: out of memory",)
    assert full.model is not None
    assert full.reference is full.prefill_ratio is full.decode_ratio is None


def test_other_errors_are_not_taken_for_memory(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("device-side assert")

    broken = dense(NAME)
    broken.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="device-side assert"):
        benchmark(models[0], broken, batch_sizes=(1,), prompt_lengths=(8,), new_tokens=1, repeats=1)


def test_refusals(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    with pytest.raises(EvaluationError, match="is 0; expected at least 1"):
        benchmark(models[0], repeats=0)
    with pytest.raises(EvaluationError, match="context of 64 tokens is too short for a prompt and 64 new"):
        benchmark(models[0], new_tokens=64)
    with pytest.raises(EvaluationError, match="predicts 260 tokens, the reference 300"):
        benchmark(models[0], dense(NAME, vocab_size=300))


def test_compiled_rows_follow_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    # The whole graph is traced; translating it with a compiler of C++ would take a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    model = compressed(NAME)
    found = benchmark(model, batch_sizes=(1,), prompt_lengths=(8,), new_tokens=2, repeats=1, compile=True)
    plain, compiled = found.rows
    assert (plain.setting.compiled, compiled.setting.compiled) == (False, True)
    assert plain.model is not None
    assert compiled.model is not None
    assert compiled.model.cache_bytes_per_token == plain.model.cache_bytes_per_token


# ------------------------------------------------------------------------------------------------------- command line


def test_table_json_and_plot(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'plot'")
    assert run(*folders, "--json", tmp_path / "speed.json", "--plot", tmp_path / "speed.png") == 0
    shown = capsys.readouterr().out
    data = json.loads((tmp_path / "speed.json").read_text())
    assert data["machine"]["torch"] == torch.__version__
    assert f"the increase of the {data['memory_kind']} during a run" in shown
    for name, folder in (("model", folders[0]), ("reference", folders[2])):
        stored = data[name]["disk_bytes"]
        assert stored == Path(folder, "model.safetensors").stat().st_size
        assert f"of weights, {stored / 2**20:.1f} MiB on disk" in shown
    for row in data["rows"]:
        assert f"{row['setting']['batch_size']} × 8" in shown
        ratio = row["decode_ratio"]
        assert f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" in shown
        assert f"{row['model']['prefill_tokens_per_second']['median']:,.1f}" in shown
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_files_in_the_cache_of_the_hub_are_counted(folders: list[str], tmp_path: Path) -> None:
    repo = tmp_path / "models--user--model"
    snapshot = Path(shutil.copytree(folders[0], repo / "snapshots" / ("0" * 40)))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    source = Source("user/model", {"cache_dir": str(tmp_path)})
    assert stored_bytes(source) == (snapshot / "model.safetensors").stat().st_size
    (snapshot / "model.safetensors").unlink()
    assert stored_bytes(source) is None


def test_files_are_checked_before_work(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*folders, "--plot", tmp_path / "speed.txt") == 2
    assert "has no suffix of a picture format; expected one of" in capsys.readouterr().err
    assert run(*folders, "--json", tmp_path / "missing" / "speed.json") == 2
    assert "does not exist" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(*folders, "--plot", tmp_path / "speed.png") == 2
    assert "optimum-modegpt[plot]" in capsys.readouterr().err


def test_lists_of_numbers_are_checked(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("0", "1,", "1,x"):
        with pytest.raises(SystemExit):
            cli.main(["benchmark", *folders, "--batch-sizes", wrong])
        assert f"expected integers of at least 1 such as 1,8, found {wrong!r}" in capsys.readouterr().err
