"""Test the remote code of saved models: the folder contains every file that its code imports."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from subprocess_load import run_worker
from tiny_configs import FAMILIES
from tiny_models import classes, compressed, tokenizer, tokens
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

FAMILY = pytest.mark.parametrize("name", FAMILIES)


def check_code(folder: Path, name: str) -> None:
    """Check that the folder has the classes of `auto_map` and imports only torch, transformers and its own files."""
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map.keys() == {"AutoConfig", *classes(name)}
    for reference in auto_map.values():
        module, class_name = reference.split(".")
        tree = ast.parse((folder / f"{module}.py").read_text())
        assert class_name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert node.module
                assert (folder / f"{node.module}.py").is_file(), f"{path.name} imports {node.module}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                roots = {str(each).partition(".")[0] for each in names}
                assert roots <= {"torch", "transformers", *sys.stdlib_module_names}, f"{path.name} imports {roots}"
    assert not [path for path in folder.rglob("*.py") if path.parent != folder]


def train(model: Any, folder: Path) -> None:
    """Train one step with Trainer, which saves a checkpoint."""
    data = [{"input_ids": row, "labels": row} for row in tokens()]
    arguments = TrainingArguments(folder, max_steps=1, save_steps=1, report_to=[], disable_tqdm=True, use_cpu=True)
    Trainer(model, arguments, train_dataset=data).train()
    next(folder.glob("checkpoint-*")).rename(folder / "result")


WAYS: dict[str, Callable[[Any, Path], object]] = {
    "whole": lambda model, folder: model.save_pretrained(folder),
    "in shards": lambda model, folder: model.save_pretrained(folder, max_shard_size="20KB"),
    "configuration": lambda model, folder: model.config.save_pretrained(folder),
    "base model": lambda model, folder: model.base_model.save_pretrained(folder),
    "half precision": lambda model, folder: model.to(torch.bfloat16).save_pretrained(folder),
    "into the same folder": lambda model, folder: (
        model.save_pretrained(folder),
        type(model).from_pretrained(folder).save_pretrained(folder),
    ),
    "base model loaded alone": lambda model, folder: (
        model.save_pretrained(folder),
        AutoModel.from_pretrained(folder).save_pretrained(folder),
    ),
}


def check_way(name: str, way: str, folder: Path) -> None:
    compressed(name).save_pretrained(folder / "first")
    WAYS[way](AutoModelForCausalLM.from_pretrained(folder / "first"), folder / "second")
    shutil.rmtree(folder / "first")
    check_code(folder / "second", name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama-gqa-tied", "opt"])
def test_every_way_of_saving_includes_the_code(name: str, way: str, tmp_path: Path) -> None:
    check_way(name, way, tmp_path)


@FAMILY
def test_a_saved_model_of_every_family_includes_the_code(name: str, tmp_path: Path) -> None:
    check_way(name, "whole", tmp_path)


def test_checkpoints_of_trainer_include_the_code(tmp_path: Path) -> None:
    compressed("llama-gqa-tied").save_pretrained(tmp_path / "first")
    train(AutoModelForCausalLM.from_pretrained(tmp_path / "first"), tmp_path / "run")
    check_code(tmp_path / "run" / "result", "llama-gqa-tied")


def as_in_the_cache(folder: Path, target: Path) -> Path:
    """Copy a folder into the layout of the Hub's cache, a snapshot of symbolic links."""
    blobs = target / "blobs"
    snapshot = target / "models--user--a.name-3" / "snapshots" / "0a1b"
    shutil.copytree(folder, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    return snapshot


def test_models_load_without_the_package_from_any_folder(tmp_path: Path) -> None:
    model = compressed("llama-gqa-tied")
    expected = model(tokens()).logits
    original = tmp_path / "original"
    model.save_pretrained(original)
    tokenizer().save_pretrained(original)
    folders = [
        shutil.copytree(original, tmp_path / name) for name in ("a.b-c.v1.0", "1st-model", "with space", "class")
    ]
    folders.append(as_in_the_cache(original, tmp_path))
    locked = shutil.copytree(original, tmp_path / "locked")
    for path in locked.iterdir():
        path.chmod(0o444)
    locked.chmod(0o555)
    shutil.rmtree(original)
    jobs = [
        {"folder": str(folder), "auto": "AutoModelForCausalLM", "dtype": "float32", "out": str(tmp_path / f"{index}")}
        for index, folder in enumerate([*folders, locked])
    ]
    # The remote code of one folder saves a copy, which must load after that folder is removed.
    jobs[0]["save"] = str(tmp_path / "saved")
    run_worker(jobs, "remote", tmp_path)
    locked.chmod(0o755)
    for job in jobs:
        assert torch.equal(load_file(job["out"])["out"], expected), job["folder"]
    shutil.rmtree(folders[0])
    check_code(tmp_path / "saved", "llama-gqa-tied")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again) is classes("llama-gqa-tied")["AutoModelForCausalLM"]
    assert torch.equal(again(tokens()).logits, expected)
