"""Test recovery: the training, the restored state, the saved model, and the errors."""

from __future__ import annotations

import copy
import json
import random
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import RECIPE, save_dense, save_text
from forks import run_forked
from peft_versions import own_adapters
from safetensors.torch import load_file
from tiny_configs import FAMILIES
from tiny_models import compressed, dense, tokenizer, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_modegpt import (
    CalibrationDataError,
    EvaluationError,
    InvalidConfig,
    UnsupportedModel,
    perplexity,
)
from optimum_modegpt.calibration.data import TokenWindows, evaluation_windows
from optimum_modegpt.cli import main as cli
from optimum_modegpt.cli.commands import recover as recover_command
from optimum_modegpt.evaluation import perplexity as scoring
from optimum_modegpt.evaluation.fidelity import divergence
from optimum_modegpt.evaluation.perplexity import logits_of, nats_of, targets
from optimum_modegpt.recovery.config import RecoveryConfig
from optimum_modegpt.recovery.recover import Recovery, recover
from optimum_modegpt.report import Report
from optimum_modegpt.walk.checkpoint import Checkpoint

pytest.importorskip("peft", reason="peft is not installed (pip install 'optimum-modegpt[recover]')")

from peft import LoraConfig, get_peft_model

from optimum_modegpt.recovery import training

SHORT = RecoveryConfig(steps=6, batch_size=4, learning_rate=3e-3, lora_rank=4)

LONGER = replace(SHORT, steps=20, learning_rate=3e-2)
"""Long enough that a later training with a large learning rate only makes the model worse."""


def windows_of(count: int = 26, length: int = 16) -> TokenWindows:
    """Return windows that a model can learn: each token determines the next."""
    start = torch.arange(count)[:, None] * 3
    ids = (start + torch.arange(length)) % 11 + 5
    origin = {"name": "counting", "split": None, "revision": None, "sha256": "0", "windows": count}
    return TokenWindows(ids, {**origin, "sequence_length": length})


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: PreTrainedModel, before: dict[str, Tensor]) -> set[str]:
    after = model.state_dict()
    assert after.keys() == before.keys()
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def projections(model: PreTrainedModel) -> set[str]:
    """Return the names of the weights of the blocks' projections."""
    blocks = model.base_model.get_submodule(model.config.family.blocks)
    inside = {id(each) for key, each in blocks.named_parameters() if each.ndim == 2 and "norm" not in key}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


# --------------------------------------------------------------------------------------------------------- the training


@pytest.mark.parametrize("name", FAMILIES)
def test_the_projections_learn_and_nothing_else_changes(name: str) -> None:
    model, windows = compressed(name).train(), windows_of()
    attributes, before, kind = set(vars(model)), state(model), type(model)
    frozen = model.get_input_embeddings().weight.requires_grad_(False)
    recovery = recover(model, windows, config=SHORT)
    assert recovery.perplexity_after < 0.9 * recovery.perplexity_before
    assert recovery.perplexity_after == perplexity(model, windows.tokens[-2:]).perplexity
    assert changed(model, before) == projections(model)
    assert type(model) is kind
    assert set(vars(model)) == attributes
    assert model.training
    assert model.config.use_cache
    assert {parameter for parameter in model.parameters() if not parameter.requires_grad} == {frozen}
    assert not any("lora" in type(module).__module__ for module in model.modules())


def test_windows_of_one_token_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    windows = windows_of()
    windows.tokens[3] = 7
    recover(compressed("opt"), windows, config=SHORT)
    assert "1 of the 26 windows contain fewer than 2 distinct tokens" in caplog.text


@pytest.mark.parametrize("distilled", [False, True])
def test_the_record_of_the_configuration(distilled: bool) -> None:
    model, windows = compressed("opt"), windows_of()
    teacher = dense("opt") if distilled else None
    recovery = recover(model, windows, teacher=teacher, config=SHORT)
    assert recovery.tokens == 6 * 4 * 16
    assert recovery.held_out_windows == 2
    record = model.config.modegpt["recovered"]
    assert json.loads(json.dumps(record)) == record
    assert record["dataset"] == "counting"
    assert (record["steps"], record["tokens"], record["lora_rank"], record["seed"]) == (6, recovery.tokens, 4, 0)
    assert record["learning_rate"] == 3e-3
    assert record["distilled"] is distilled
    assert record["held_out_perplexity"] == [recovery.perplexity_before, recovery.perplexity_after]
    assert record["versions"].keys() == {"torch", "transformers", "peft", "optimum-modegpt"}
    assert model.config.modegpt["base_model"] == "opt"


def test_held_out_text_of_another_kind_selects_the_step() -> None:
    windows, noise = windows_of(), tokens(4, 16, seed=5)
    other = TokenWindows(noise, windows.record | {"name": "noise"})
    model = compressed("llama-gqa-tied")
    before = perplexity(model, noise).perplexity
    recovery = recover(model, windows, held_out=other, config=SHORT)
    assert recovery.held_out_windows == 4
    assert recovery.perplexity_before == before
    assert recovery.perplexity_after == perplexity(model, noise).perplexity <= before
    if recovery.best_step:
        assert model.config.modegpt["recovered"]["held_out"] == "noise"
    model = compressed("llama-gqa-tied")
    recover(model, windows, config=SHORT)
    assert model.config.modegpt["recovered"]["held_out"] == "counting"


def test_distillation_brings_the_model_nearer_to_its_teacher() -> None:
    model, teacher = compressed("llama-gqa-tied"), dense("llama-gqa-tied").train()
    windows = TokenWindows(tokens(batch=26, length=16), windows_of().record)

    def distance() -> float:
        with torch.no_grad():
            ours, theirs = (logits_of(each, windows.tokens) for each in (model, teacher))
        return float(divergence(theirs, ours).mean())

    before, weights = distance(), state(teacher)
    modes: set[bool] = set()
    hook = teacher.register_forward_pre_hook(lambda module, _: modes.add(module.training))
    recover(model, windows, teacher=teacher, config=replace(SHORT, learning_rate=1e-2))
    hook.remove()
    assert modes == {False}  # its dropout would make the targets random
    assert distance() < 0.9 * before
    assert changed(teacher, weights) == set()
    assert teacher.training


def trainer(model: PreTrainedModel, teacher: PreTrainedModel | None, folder: Path) -> Any:
    arguments = training._OneDevice(output_dir=str(folder), use_cpu=True, report_to="none")
    return training._RecoveryTrainer(teacher, model=model, args=arguments)


def test_a_model_has_nothing_to_learn_from_itself(tmp_path: Path) -> None:
    model, batch = compressed("qwen2"), {"input_ids": tokens()}
    itself = trainer(model, copy.deepcopy(model), tmp_path).compute_loss(model, batch)
    assert float(itself.detach()) == pytest.approx(0, abs=1e-6)
    other = trainer(model, dense("qwen2"), tmp_path).compute_loss(model, batch)
    assert float(other.detach()) > 0.1


def test_without_a_teacher_the_loss_is_that_of_transformers(tmp_path: Path) -> None:
    model, ids = compressed("mistral-window"), tokens()
    ours = trainer(model, None, tmp_path).compute_loss(model, {"input_ids": ids})
    assert float(ours.detach()) == pytest.approx(float(model(ids, labels=ids).loss.detach()), rel=1e-6)


def test_chunks_change_neither_loss_nor_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens()
    logits = torch.randn(22, 260, generator=torch.Generator().manual_seed(0)).requires_grad_()
    nats_of(targets(ids), logits).mean().backward()
    expected, logits.grad = logits.grad, None
    monkeypatch.setattr(scoring, "CHUNK_BYTES", 4 * 260 * 5)
    loss = training.mean_by_chunks(nats_of, targets(ids), logits)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(nats_of(targets(ids), logits).mean().detach()))
    torch.testing.assert_close(logits.grad, expected)


def test_accumulation_and_recomputation_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, thrifty = compressed("opt"), compressed("opt")
    recover(plain, windows_of(), config=SHORT)
    monkeypatch.setattr(training, "LOGITS_BYTES", 1)  # one window at a time
    monkeypatch.setattr(training, "CHECKPOINTED_PARAMETERS", 1)
    recover(thrifty, windows_of(), config=SHORT)
    for (name, one), (_, other) in zip(plain.named_parameters(), thrifty.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in thrifty.modules())
    assert len(thrifty.get_input_embeddings()._forward_hooks) == 0


def test_the_merged_model_is_that_with_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    with_adapter: list[Tensor] = []
    restore = training.BestStep.restore

    def observed(keeper: Any) -> None:
        restore(keeper)
        with torch.no_grad():
            with_adapter.append(keeper.model(tokens()).logits)

    monkeypatch.setattr(training.BestStep, "restore", observed)
    model = compressed("llama-mqa-biases")
    recover(model, windows_of(), config=SHORT)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, with_adapter[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_learn_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: set[torch.dtype] = set()
    restore = training.BestStep.restore
    monkeypatch.setattr(
        training.BestStep, "restore", lambda self: (dtypes.update(p.dtype for p in self.adapter), restore(self))
    )
    model = compressed("llama-gqa-tied").to(dtype)
    rotary = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert recover(model, windows_of(), config=SHORT).improved
    assert dtypes == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(torch.equal(buffer, rotary[name]) for name, buffer in model.named_buffers())


# --------------------------------------------------------------------------------------------------- the restored state


def test_the_callers_random_state_is_restored() -> None:
    first, second = compressed("opt"), compressed("opt")
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    recover(first, windows_of(), config=SHORT)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    random.random(), np.random.rand(), torch.rand(1)
    recover(second, windows_of(), config=SHORT)
    assert changed(second, state(first)) == set()


def test_a_model_that_only_gets_worse_is_left_as_it_was() -> None:
    model = compressed("opt")
    recover(model, windows_of(), config=LONGER)
    before, record = state(model), dict(model.config.modegpt)
    recovery = recover(model, windows_of(), config=replace(SHORT, learning_rate=3.0))
    assert recovery.best_step == 0
    assert not recovery.improved
    assert "none of 6 steps kept" in recovery.summary()
    assert changed(model, before) == set()
    assert model.config.modegpt == record


@pytest.mark.parametrize("error", [KeyboardInterrupt, EvaluationError])
def test_an_error_leaves_the_model_unchanged(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model = compressed("llama-gqa-tied").half()
    attributes, before = set(vars(model)), state(model)

    def scored(*_: Any) -> Any:
        raise error("loss is nan")

    monkeypatch.setattr(training, "perplexity", scored)
    with pytest.raises(error, match=r"training diverged by step 1" if error is EvaluationError else "loss is nan"):
        recover(model, windows_of(), config=SHORT)
    assert changed(model, before) == set()
    assert set(vars(model)) == attributes
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert "recovered" not in model.config.modegpt


# --------------------------------------------------------------------------------------------------------------- errors


def test_other_models_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"a dense one \(llama\).*Compress it first"):
        recover(dense("llama-gqa-tied"), windows_of())
    classifier = compressed("llama-gqa-tied", auto="AutoModelForSequenceClassification")
    with pytest.raises(UnsupportedModel, match="found ModeGPTLlamaForSequenceClassification"):
        recover(classifier, windows_of())


def test_quantised_adapted_and_scattered_models_are_refused() -> None:
    model = compressed("opt")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UnsupportedModel, match="Recover the compressed model first, then quantise"):
        recover(model, windows_of())
    adapter = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(UnsupportedModel, match="found PeftModel"):
        recover(get_peft_model(compressed("opt"), adapter), windows_of())  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnsupportedModel, match="are on meta"):
        recover(compressed("opt").to("meta"), windows_of())


@own_adapters()
def test_a_model_with_an_adapter_of_its_own_is_refused() -> None:
    model = compressed("opt")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModel, match="has an adapter"):
        recover(model, windows_of())


def test_a_teacher_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"predicts 300 tokens, the model 260.*compressed from: opt"):
        recover(compressed("opt"), windows_of(), teacher=dense("opt", vocab_size=300))


def test_too_few_or_too_long_windows_are_refused() -> None:
    with pytest.raises(CalibrationDataError, match="counting: 2 windows are too few"):
        recover(compressed("opt"), windows_of(2))
    with pytest.raises(EvaluationError, match="longer than the model's context of 64"):
        recover(compressed("opt"), windows_of(4, 65))


@pytest.mark.parametrize("values", [{"steps": 0}, {"batch_size": 2.5}, {"lora_rank": True}, {"learning_rate": 0.0}])
def test_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match=rf"{next(iter(values))} must be"):
        RecoveryConfig(**values)


def test_wider_models_get_smaller_steps() -> None:
    narrow, wide = dense("opt").config, dense("opt", hidden_size=128).config
    assert RecoveryConfig().peak_learning_rate(wide) == RecoveryConfig().peak_learning_rate(narrow) / 2
    assert RecoveryConfig(learning_rate=0.5).peak_learning_rate(wide) == 0.5


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, training.__name__)
    with pytest.raises(ImportError, match=r"pip install 'optimum-modegpt\[recover\]'"):
        recover(compressed("opt"), windows_of())


# ----------------------------------------------------------------------------------------------------- the command line

QUICK = ["--steps", "6", "--batch-size", "4", "--sequence-length", "32", "--learning-rate", "0.003"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.txt", words=200)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, teacher: Path, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("results") / "small"
    flags = [part for key, value in RECIPE.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    assert cli.main(["compress", str(teacher), "--output", str(folder), "--dataset", str(text), *flags]) == 0
    return folder


LOAD = """
import sys
sys.modules["peft"] = None
import optimum_modegpt, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    save_file({"logits": model(torch.arange(3, 35)[None]).logits}, sys.argv[2])
"""


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 35)[None]).logits


def test_the_command_saves_an_ordinary_compressed_model(
    small: Path, teacher: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["recover", str(small), "--teacher", str(teacher), "--dataset", str(text), "--output", str(output)]
    assert cli.main([*arguments, *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "held-out windows" in printed
    assert f"saved in {output}" in printed
    ending = f"evaluate {output} --reference {teacher} --dataset '<your-text.txt>' --sequence-length 32\n"
    assert printed.endswith(ending)
    assert {path.name for path in output.iterdir()} == {path.name for path in small.iterdir()}
    assert Report.load(output / "report.json").blocks == Report.load(small / "report.json").blocks
    card = (output / "README.md").read_text(encoding="utf-8").replace(" \\\n   ", "")
    assert "and fine-tuned afterwards" in card
    assert "optimum-cli modegpt compress " in card
    assert f"-modegpt-30 --teacher {teacher.name} --dataset {text.name} --sequence-length 32 " in card
    model, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (output, small))
    assert type(model) is type(before)
    assert model.config.widths() == before.config.widths()
    record = model.config.modegpt["recovered"]
    assert (record["dataset"], record["teacher"], record["distilled"]) == (text.name, teacher.name, True)
    assert not torch.equal(logits(model), logits(before))
    run_forked(LOAD, [str(output), str(tmp_path / "logits")]).check_returncode()
    assert torch.equal(load_file(tmp_path / "logits")["logits"], logits(model))


def stopped(words: list[str], by: signal.Signals) -> tuple[int, str]:
    """Run the command in a process that gets a signal when it saves its result. Return its exit code and messages."""
    script = (
        "import os, signal, time\n"
        "from optimum_modegpt.cli import main as cli\n"
        "from optimum_modegpt import output\n"
        f"def stop(*args, **kwargs): os.kill(os.getpid(), signal.{by.name}); time.sleep(600)\n"
        "output._place = stop\n"
        f"raise SystemExit(cli.main({words!r}))\n"
    )
    done = run_forked(script)
    return done.returncode, done.stderr


def test_a_run_that_was_killed_is_tidied_by_the_next(
    small: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, work_folder = tmp_path / "out", tmp_path / ".out.checkpoint"
    words = ["recover", str(small), "--dataset", str(text), "--output", str(output), *QUICK]
    assert stopped(words, signal.SIGKILL)[0] == -signal.SIGKILL
    assert (work_folder / "result" / "model.safetensors").is_file()
    assert not output.exists()
    with Checkpoint(work_folder).alone():
        assert cli.main(words) == cli.FAILED
        assert "another run is using" in capsys.readouterr().err
        assert (work_folder / "result" / "model.safetensors").is_file(), "nothing of a run that is at work is deleted"
    assert cli.main(words) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("by", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_leaves_nothing(by: signal.Signals, small: Path, text: Path, tmp_path: Path) -> None:
    words = ["recover", str(small), "--dataset", str(text), "--output", str(tmp_path / "new" / "out"), *QUICK]
    code, errors = stopped(words, by)
    assert code == cli.INTERRUPTED
    assert "interrupted" in errors.lower()
    assert list(tmp_path.iterdir()) == []


def test_nothing_gained_is_an_error_and_nothing_is_saved(
    small: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(small)
    recover(model, evaluation_windows(str(text), tokenizer(), sequence_length=32), config=LONGER)
    model.save_pretrained(tmp_path / "better")
    tokenizer().save_pretrained(tmp_path / "better")
    arguments = ["recover", str(tmp_path / "better"), "--dataset", str(text), "--output", str(tmp_path / "out")]
    assert cli.main([*arguments, *QUICK[:-1], "3"]) == 2
    assert "fine-tuning did not help, so nothing was saved" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["better"]


def test_the_command_refuses_before_work(
    small: Path, teacher: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--dataset", str(text), "--output", str(tmp_path / "out"), *QUICK]
    assert cli.main(["recover", str(teacher), *arguments]) == 2
    assert "expected a compressed model, found a dense one (llama)" in capsys.readouterr().err
    assert cli.main(["recover", str(small), "--dataset", str(text), "--output", str(small), "--overwrite"]) == 2
    assert "is an input of this run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_read_is_told_before_training(
    small: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = shutil.copytree(small, tmp_path / "newer")
    report = json.loads((newer / "report.json").read_text())
    (newer / "report.json").write_text(json.dumps({**report, "report_version": 9}))
    monkeypatch.setattr(recover_command, "recover", None)
    assert cli.main(["recover", str(newer), "--dataset", str(text), "--output", str(tmp_path / "out"), *QUICK]) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert "report_version" in errors


def test_the_summary() -> None:
    recovery = Recovery(
        perplexity_before=12.0,
        perplexity_after=10.0,
        best_step=90,
        steps=100,
        tokens=1_638_400,
        trained_parameters=20_000,
        held_out_windows=7,
        seconds=61.2,
    )
    assert recovery.summary() == (
        "perplexity of 7 held-out windows 12.000 -> 10.000, step 90 of 100 kept\n"
        "20,000 weights trained on 1,638,400 tokens in 61 s"
    )
