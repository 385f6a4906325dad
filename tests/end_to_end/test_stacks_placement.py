"""Test placement by transformers and accelerate: device maps, offload to memory and disk, with identical logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_configs import STACKS
from tiny_models import compressed, tokens
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (pip install accelerate)")

FAMILY = pytest.mark.parametrize("name", STACKS)
LAYOUT = pytest.mark.parametrize("layout", ["whole", "sharded"])
CPU = torch.device("cpu")

Saved = dict[str, tuple[dict[str, Path], Tensor]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Return, by family, the folders of a compressed model in one file and in shards, and its logits."""
    root = tmp_path_factory.mktemp("placement")
    found: Saved = {}
    for name in STACKS:
        folders = {"whole": root / name, "sharded": root / f"{name}-sharded"}
        model = compressed(name)
        model.save_pretrained(folders["whole"])
        model.save_pretrained(folders["sharded"], max_shard_size="20KB")
        assert len(list(folders["sharded"].glob("*.safetensors"))) > 2
        found[name] = folders, logits(model)
    return found


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(tokens()).logits


def empty(folder: Path) -> Any:
    """Return the model of a folder on the meta device."""
    with accelerate.init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.tie_weights()
    return model.eval()


def partly_on_disk(model: Any) -> dict[str, str]:
    """Return a device map with the second block on disk and the rest in memory."""
    path = f"{model.base_model_prefix}.{model.config.family.blocks}"
    placed = {f"{path}.{index}": "cpu" for index, _ in enumerate(model.get_submodule(path))}
    placed[f"{path}.1"] = "disk"
    while path:
        path, _, inner = path.rpartition(".")
        for key, _ in model.get_submodule(path).named_children():
            if key != inner:
                placed[f"{path}.{key}".lstrip(".")] = "cpu"
    return placed


@FAMILY
@LAYOUT
def test_automatic_device_map(name: str, layout: str, saved: Saved) -> None:
    folders, expected = saved[name]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folders[layout], device_map="auto")), expected)


@FAMILY
@LAYOUT
def test_device_map_with_a_block_on_disk(name: str, layout: str, saved: Saved, tmp_path: Path) -> None:
    folders, expected = saved[name]
    placed = partly_on_disk(empty(folders[layout]))
    model = AutoModelForCausalLM.from_pretrained(folders[layout], device_map=placed, offload_folder=tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), expected)
    generated = model.generate(tokens(), max_new_tokens=3, do_sample=False, eos_token_id=None)
    whole = AutoModelForCausalLM.from_pretrained(folders["whole"])
    assert torch.equal(generated, whole.generate(tokens(), max_new_tokens=3, do_sample=False, eos_token_id=None))


@FAMILY
@LAYOUT
def test_load_checkpoint_and_dispatch(name: str, layout: str, saved: Saved, tmp_path: Path) -> None:
    folders, expected = saved[name]
    for placed in ("auto", partly_on_disk(empty(folders[layout]))):
        model = empty(folders[layout])
        assert all(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(logits(dispatch(model, folders[layout], placed, tmp_path)), expected)


def dispatch(model: Any, folder: Path, placed: Any, offload: Path, *, buffers: bool = True) -> Any:
    return accelerate.load_checkpoint_and_dispatch(
        model,
        folder,
        placed,
        no_split_module_classes=list(model._no_split_modules),
        offload_folder=offload,
        offload_buffers=buffers,
        strict=True,
    )


def test_missing_rope_index_raises(saved: Saved, tmp_path: Path) -> None:
    """accelerate does not load the buffers of a block on disk unless `offload_buffers` is set."""
    folder = saved["llama-gqa-tied"][0]["whole"]
    model = empty(folder)
    with pytest.raises(ValueError, match="rope_index is on the meta device"):
        dispatch(model, folder, partly_on_disk(model), tmp_path, buffers=False)


OFFLOADS: dict[str, Callable[[Any, Path], Any]] = {
    "memory": lambda model, _: accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device=CPU, offload_buffers=True),
}


@FAMILY
@pytest.mark.parametrize("kind", OFFLOADS)
def test_offload_after_loading(name: str, kind: str, saved: Saved, tmp_path: Path) -> None:
    folders, expected = saved[name]
    model = OFFLOADS[kind](AutoModelForCausalLM.from_pretrained(folders["whole"]), tmp_path)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), expected)


@FAMILY
def test_model_offloaded_to_disk_is_saved_completely(name: str, saved: Saved, tmp_path: Path) -> None:
    folders, expected = saved[name]
    placed = partly_on_disk(empty(folders["whole"]))
    model = AutoModelForCausalLM.from_pretrained(folders["sharded"], device_map=placed, offload_folder=tmp_path / "off")
    model.save_pretrained(tmp_path / "copy")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "copy")), expected)
