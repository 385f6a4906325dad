"""Test fine-tuning with adapters of PEFT, also merged and saved, and of all weights with the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_versions import own_adapters
from safetensors.torch import load_file
from subprocess_load import run_worker
from tiny_configs import STACKS, VARIANTS
from tiny_models import SHARED_CODE, classes, compressed, fine_tune, tokenizer, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")

FAMILY = pytest.mark.parametrize("name", STACKS)
TARGETS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save a compressed model of each family with its tokenizer."""
    folders = {name: tmp_path_factory.mktemp("bases") / name for name in STACKS}
    for name, folder in folders.items():
        compressed(name).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return folders


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(tokens()).logits


def assert_travels(folder: Path, name: str) -> None:
    """Check that a folder has a complete model: safetensors, and the code that its configuration names."""
    code = {*SHARED_CODE, f"modegpt_{family_of(name)}.py"}
    assert {path.name for path in folder.glob("*.py")} == code
    assert list(folder.glob("*.safetensors"))
    assert not [*folder.glob("*model*.bin"), *folder.glob("adapter*")]


def family_of(name: str) -> str:
    return VARIANTS[name][0].model_type


# ------------------------------------------------------------------------------------------------------- the targets


def test_peft_needs_target_modules() -> None:
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(compressed("llama-mha"), peft.LoraConfig())


@FAMILY
def test_all_linear_targets_every_projection_of_the_blocks(name: str, bases: dict[str, Path]) -> None:
    model = load(bases[name])
    projections = {path for path, module in model.named_modules() if type(module) is torch.nn.Linear}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    assert set(adapted.targeted_module_names) == projections - {"lm_head"}


def test_other_methods_of_peft_take_their_targets() -> None:
    config = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    adapted = peft.get_peft_model(compressed("llama-mha"), config)
    losses = fine_tune(adapted)
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------------------------------------ adapters


@FAMILY
def test_trained_saved_and_reloaded(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    adapted = peft.get_peft_model(load(bases[name]), peft.LoraConfig(r=4, target_modules=TARGETS))
    losses = fine_tune(adapted)
    assert losses[-1] < losses[0] - 0.05
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert torch.equal(logits(peft.PeftModel.from_pretrained(load(bases[name]), tmp_path)), expected)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), logits(load(bases[name])))


@own_adapters()
@FAMILY
def test_the_folder_of_an_adapter_loads(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    adapted = peft.get_peft_model(
        load(bases[name]), peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path)
    by_adapter = load(tmp_path)
    assert type(by_adapter) is classes(name)["AutoModelForCausalLM"]
    assert torch.equal(logits(by_adapter), logits(adapted))


@own_adapters()
@FAMILY
def test_adapter_of_the_model_itself(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    model = load(bases[name])
    plain = logits(model)
    model.add_adapter(peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    expected = logits(model)
    assert not torch.allclose(expected, plain)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    other = load(bases[name])
    other.load_adapter(tmp_path)
    assert torch.equal(logits(other), expected)
    other.disable_adapters()
    assert torch.equal(logits(other), plain)


def test_merged_models_travel(bases: dict[str, Path], tmp_path: Path) -> None:
    """Check that a merged and saved model is an ordinary compressed model, also without PEFT and this package."""
    jobs, expected = [], []
    for name in STACKS:
        adapted = peft.get_peft_model(load(bases[name]), peft.LoraConfig(target_modules="all-linear"))
        fine_tune(adapted)
        unmerged = logits(adapted)
        merged = adapted.merge_and_unload()
        folder = tmp_path / name
        merged.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        assert_travels(folder, name)
        again = load(folder)
        assert type(again) is classes(name)["AutoModelForCausalLM"]
        assert again.config.widths() == compressed(name).config.widths()
        expected.append(logits(merged))
        assert torch.equal(logits(again), expected[-1])
        torch.testing.assert_close(expected[-1], unmerged, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(unmerged, logits(load(bases[name])), atol=1e-2)
        job = {"folder": str(folder), "auto": "AutoModelForCausalLM", "dtype": "float32"}
        jobs.append(job | {"out": str(tmp_path / f"{name}.safetensors")})
    run_worker(jobs, "remote", tmp_path)
    for job, found in zip(jobs, expected, strict=True):
        assert torch.equal(load_file(job["out"])["out"], found), job["folder"]


# --------------------------------------------------------------------------------------------------------- all weights


def trainer(model: Any, folder: Path) -> Trainer:
    """Return a Trainer of two steps on the same four rows, with a checkpoint after each."""
    rows = [{"input_ids": row, "labels": row} for row in tokens(batch=4)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        save_steps=1,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model, arguments, train_dataset=rows)


@FAMILY
def test_trained_whole_by_the_trainer(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    model = load(bases[name])
    before = {key: value.clone() for key, value in model.named_parameters()}
    run = trainer(model, tmp_path)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    frozen = [key for key, value in model.named_parameters() if torch.equal(value, before[key])]
    # The softmax ignores a term that is equal for all keys.
    assert all(key.endswith("k_proj.bias") for key in frozen)

    run.save_model(str(tmp_path / "final"))
    expected = logits(model.eval())
    for folder in (tmp_path / "final", tmp_path / "checkpoint-2"):
        assert_travels(folder, name)
        assert torch.equal(logits(load(folder)), expected)

    resumed = trainer(load(bases[name]), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(logits(resumed.model.eval()), expected)
