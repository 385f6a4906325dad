"""Test that folders which are incomplete, edited, newer or not ours are refused when they are loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import run_forked
from peft_versions import own_adapters
from safetensors.torch import load_file, save_file
from tiny_configs import FAMILIES
from tiny_models import classes, compressed, dense, tokens
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from optimum_modegpt.modeling.modegpt_config import FORMAT_VERSION
from optimum_modegpt.modeling.modegpt_family import Family

FAMILY = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that returns the folder of a saved model. Tests must not change it."""
    root = tmp_path_factory.mktemp("originals")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            compressed(name).save_pretrained(root / name)
        return root / name

    return folder


def edited(
    folder: Path,
    target: Path,
    config: Callable[[dict[str, Any]], object] = lambda _: None,
    tensors: Callable[[dict[str, Tensor]], object] = lambda _: None,
) -> Path:
    """Copy a model's folder, and apply the functions to its configuration and its tensors."""
    if folder != target:
        shutil.copytree(folder, target, dirs_exist_ok=True)
    values = json.loads((target / "config.json").read_text())
    config(values)
    (target / "config.json").write_text(json.dumps(values))
    state = load_file(target / "model.safetensors")
    tensors(state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


def refuse(folder: Path, match: str, auto: Any = AutoModelForCausalLM) -> None:
    """Check that loading raises with and without `ignore_mismatched_sizes`, and that the message names the fault."""
    for ignore in (False, True):
        with pytest.raises(ValueError, match=match):
            auto.from_pretrained(folder, ignore_mismatched_sizes=ignore)


def block_key(name: str, rest: str) -> str:
    model_class = classes(name)["AutoModel"]
    return f"{model_class.base_model_prefix}.{model_class.config_class.family.blocks}.0.{rest}"


def family_of(name: str) -> Family:
    return classes(name)["AutoModel"].config_class.family


@FAMILY
def test_missing_tensors(name: str, originals: Callable[[str], Path], tmp_path: Path) -> None:
    attention, base = family_of(name).attention, classes(name)["AutoModel"].base_model_prefix
    rotary = [f"{attention.module}.rope_index"] if attention.positions.pairs != "none" else []
    for rest in (f"{attention.query}.weight", *rotary):
        key = block_key(name, rest)
        folder = edited(originals(name), tmp_path, tensors=lambda state, key=key: state.pop(key))
        for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):
            if auto.__name__ not in classes(name):  # transformers lacks a classifier for some families
                continue
            refuse(folder, f"missing: {key}", auto)
        refuse(folder, f"missing: {key.removeprefix(f'{base}.')}", AutoModel)


@own_adapters()
@FAMILY
def test_missing_tensor_below_an_adapter(name: str, originals: Callable[[str], Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = edited(originals(name), tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    expected = adapted(tokens()).logits
    adapted.save_pretrained(tmp_path / "adapter")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")(tokens()).logits, expected)
    key = block_key(name, f"{family_of(name).attention.key}.weight")
    edited(base, base, tensors=lambda state: state.pop(key))
    refuse(tmp_path / "adapter", f"missing: {key}")


@FAMILY
def test_tensors_of_another_shape(name: str, originals: Callable[[str], Path], tmp_path: Path) -> None:
    key = block_key(name, f"{family_of(name).attention.value}.weight")

    def cut(state: dict[str, Tensor]) -> None:
        state[key] = state[key][1:].clone()

    folder = edited(originals(name), tmp_path, tensors=cut)
    refuse(folder, f"wrong shape: {key} is \\(.*the configuration says")
    with pytest.raises(ValueError, match="wrong shape"):
        AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)


@FAMILY
def test_unexpected_tensors(name: str, originals: Callable[[str], Path], tmp_path: Path) -> None:
    base = classes(name)["AutoModel"].base_model_prefix
    for key in (block_key(name, f"{family_of(name).attention.query}.scale"), f"{base}.extra.weight"):
        folder = edited(originals(name), tmp_path, tensors=lambda state, key=key: state.update({key: torch.ones(3)}))
        refuse(folder, f"not expected: {key}")


@pytest.mark.parametrize("worst", [-1, 4, 2**31 - 1])
def test_rotary_pairs_out_of_range(worst: int, originals: Callable[[str], Path], tmp_path: Path) -> None:
    name = "llama-gqa-tied"
    key = block_key(name, "self_attn.rope_index")

    def spoil(state: dict[str, Tensor]) -> None:
        state[key][0, 0] = worst

    refuse(edited(originals(name), tmp_path, tensors=spoil), f"out of range: {key}.*\\[0, 4\\)")


def test_many_faults_are_counted(originals: Callable[[str], Path], tmp_path: Path) -> None:
    def strip(state: dict[str, Tensor]) -> None:
        for key in [key for key in state if ".layers." in key]:
            del state[key]

    refuse(edited(originals("llama-gqa-tied"), tmp_path, tensors=strip), "… and [0-9]+ more")


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, -1, "1", 1.0, True, None])
def test_other_format_versions(version: Any, originals: Callable[[str], Path], tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["modegpt"]["format_version"] = version

    refuse(edited(originals("opt"), tmp_path, change), f"format_version.*reads up to {FORMAT_VERSION}.*Update")


@pytest.mark.parametrize("record", [None, [], "yes"])
def test_without_our_record(record: Any, originals: Callable[[str], Path], tmp_path: Path) -> None:
    folder = edited(originals("opt"), tmp_path, lambda config: config.update(modegpt=record))
    refuse(folder, "no `modegpt` record")


def test_dense_checkpoint_given_to_a_compressed_class(tmp_path: Path) -> None:
    dense("llama-mha").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no compressed model.*compression_config"):
        classes("llama-mha")["AutoModelForCausalLM"].from_pretrained(tmp_path)


HOSTILE = [0, -8, 10**9, 4.0, "4", True, None, [4]]


@pytest.mark.parametrize("field", ["qk_head_dim", "v_head_dim", "mlp"])
@pytest.mark.parametrize("name", ["llama-gqa-tied", "opt"])
def test_hostile_widths(name: str, field: str, originals: Callable[[str], Path], tmp_path: Path) -> None:
    field = field if field != "mlp" else classes(name)["AutoModel"].config_class.family.mlp.width
    for value in HOSTILE:

        def change(config: dict[str, Any], value: Any = value) -> None:
            config["per_layer_config"]["0"][field] = value

        folder = edited(originals(name), tmp_path, change)
        with pytest.raises(Exception, match=field) as caught:
            AutoModelForCausalLM.from_pretrained(folder)
        assert repr(value) in str(caught.value)
        refused_by_model = isinstance(caught.value, ValueError)
        # transformers checks the types of the dense class's fields first.
        assert refused_by_model or "StrictDataclass" in type(caught.value).__name__
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["llama-gqa-tied", "opt"])
def test_widths_that_contradict_each_other(name: str, originals: Callable[[str], Path], tmp_path: Path) -> None:
    def entry(**values: Any) -> Callable[[dict[str, Any]], None]:
        return lambda config: config["per_layer_config"]["0"].update(values)

    cases = [
        (lambda config: config["per_layer_config"]["1"].pop("qk_head_dim"), "qk_head_dim"),
        (lambda config: config.pop("per_layer_config"), "qk_head_dim"),
        (lambda config: config["per_layer_config"].update({"7": {"qk_head_dim": 4}}), "7"),
        (entry(head_dim=8), "head_dim is 8; expected 7"),
        (entry(num_key_value_heads=1), "num_key_value_heads"),
        (entry(v_head_dim=6, head_dim=6), "wrong shape"),
    ]
    for index, (change, match) in enumerate(cases):
        refuse(edited(originals(name), tmp_path / str(index), change), match)


def test_rotary_heads_of_odd_width(originals: Callable[[str], Path], tmp_path: Path) -> None:
    folder = edited(
        originals("qwen2-mixed-window"), tmp_path, lambda config: config["per_layer_config"]["0"].update(qk_head_dim=5)
    )
    refuse(folder, r"per_layer_config\[0\].qk_head_dim is 5; rotary pairs need an even one")


def test_language_model_without_its_head(originals: Callable[[str], Path], tmp_path: Path) -> None:
    name = "llama-mha"
    folder = edited(originals(name), tmp_path / "cut", tensors=lambda state: state.pop("lm_head.weight"))
    refuse(folder, "missing: lm_head.weight")
    # The base model does not need the head.
    expected = compressed(name).base_model(tokens()).last_hidden_state
    assert torch.equal(AutoModel.from_pretrained(folder)(tokens()).last_hidden_state, expected)
    wrong = edited(
        originals(name), tmp_path / "wrong", tensors=lambda state: state.update({"lm_head.weight": torch.ones(5, 32)})
    )
    refuse(wrong, "wrong shape: lm_head.weight is \\(5, 32\\)")


def test_another_number_of_labels_must_be_requested(tmp_path: Path) -> None:
    compressed("qwen2", auto="AutoModelForSequenceClassification").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"wrong shape: score.weight is \(2, 32\)"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model(tokens()).logits.shape == (2, 5)


def test_without_package_and_trust_nothing_is_built(originals: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers itself refuses the folder. Without code files, its message names the model type."""
    with_code = originals("llama-gqa-tied")
    without_code = edited(with_code, tmp_path / "plain", lambda config: config.pop("auto_map"))
    for path in without_code.glob("*.py"):
        path.unlink()
    script = """
import sys
sys.modules["optimum_modegpt"] = None
import torch
from transformers import AutoModelForCausalLM
def forbid(*args, **kwargs):
    raise AssertionError("a module was built")
torch.nn.Module.__init__ = forbid
for folder, word in zip(sys.argv[1:], ("trust_remote_code=True", "modegpt_llama")):
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        assert word in str(error), str(error)
    else:
        raise AssertionError("loaded")
assert not any(name.startswith("transformers_modules.") for name in sys.modules)
"""
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = run_forked(script, [str(with_code), str(without_code)], env=environment, isolated=True)
    assert done.returncode == 0, done.stderr[-3000:]
