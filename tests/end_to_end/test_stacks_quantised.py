"""Test quantisation of compressed models by bitsandbytes and torchao: load, save and reload with identical logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from subprocess_load import run_worker
from tiny_configs import STACKS, VARIANTS
from tiny_models import classes, compressed, dense, fine_tune, tokenizer, tokens
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from optimum_modegpt import InvalidConfig, ModeGPTConfig, ModeGPTQuantizer, UnsupportedModel, demo
from optimum_modegpt.allocation.plan import Plan
from optimum_modegpt.architectures import resolve
from optimum_modegpt.budget.size_target import plan_size
from optimum_modegpt.modeling.modegpt_family import Widths

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)")
torchao = pytest.importorskip("torchao", reason="torchao is not installed (pip install torchao)")

from torchao.quantization import Int8WeightOnlyConfig  # noqa: E402
from torchao.utils import TorchAOBaseTensor  # noqa: E402

METHODS: dict[str, Callable[[], Any]] = {
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
}
METHOD = pytest.mark.parametrize("method", METHODS)
PAIRS = [("torchao", name) for name in STACKS] + [
    (m, name) for m in ("int8", "nf4") for name in ("llama-gqa-tied", "opt")
]
"""Methods and models. Of bitsandbytes, two families suffice: it replaces linear modules, which all families share."""
MOST_ERROR = {"int8": 0.12, "nf4": 0.5, "torchao": 0.12}
"""Largest relative change of the logits. Random weights are sensitive; an unrelated model has 1.4."""
FITTING = [Widths(16, 32, 64), Widths(32, 16, 128), Widths(32, 32, 192)]
"""Multiples of 64, the only widths that bitsandbytes computes correctly in 4 bits on a CPU."""


def model_for(method: str, name: str) -> Any:
    """Return a compressed model with widths that the method supports: any, except for 4 bits on a CPU."""
    if method != "nf4":
        return compressed(name)
    family: Any = classes(name)["AutoModelForCausalLM"].config_class.family
    sizes = {"hidden_size": 128, family.mlp.width: 192, **dict.fromkeys(family.sizes, 128)}
    if "head_dim" in vars(VARIANTS[name][0](**VARIANTS[name][1])):
        sizes["head_dim"] = 32
    return compressed(name, widths=FITTING, **sizes)


def projections(model: Any) -> list[nn.Module]:
    """Return the linear modules of all blocks."""
    blocks = model.base_model.get_submodule(model.config.family.blocks)
    return [module for module in blocks.modules() if isinstance(module, nn.Linear)]


def is_quantised(module: Any, method: str) -> bool:
    if method == "torchao":
        return isinstance(module.weight, TorchAOBaseTensor)
    kind = bitsandbytes.nn.Linear8bitLt if method == "int8" else bitsandbytes.nn.Linear4bit
    return isinstance(module, kind) and module.weight.dtype in (torch.int8, torch.uint8)


def quantised(folder: Path, method: str, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=METHODS[method](), **kwargs)


def saved(method: str, name: str, folder: Path) -> tuple[Any, Any]:
    """Return a compressed model and its quantised version, which is saved in `folder`.

    It is saved before its first forward pass, because bitsandbytes 0.50 packs 4-bit weights for the CPU in that pass
    and loses their scales when it unpacks them for a save. This affects dense models too.
    """
    original = model_for(method, name)
    original.save_pretrained(folder / "small")
    model = quantised(folder / "small", method)
    model.save_pretrained(folder)
    return original, model


def change(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Return the root mean square of the difference relative to that of `expected`."""
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def generate(model: Any) -> torch.Tensor:
    return model.generate(tokens(), max_new_tokens=4, do_sample=False, eos_token_id=None)


@pytest.mark.parametrize(("method", "name"), PAIRS)
@torch.no_grad()
def test_quantised_model_is_close_to_the_original_and_reloads_exactly(method: str, name: str, tmp_path: Path) -> None:
    original, model = saved(method, name, tmp_path)
    assert type(model) is type(original)
    assert len(projections(model)) == len(projections(original))
    assert all(is_quantised(module, method) for module in projections(model))
    expected, found = original(tokens()).logits, model(tokens()).logits
    assert 0 < change(expected, found) < MOST_ERROR[method]

    config = json.loads((tmp_path / "config.json").read_text())
    assert {"quantization_config", "per_layer_config", "modegpt", "auto_map"} <= config.keys()
    assert not list(tmp_path.glob("*.bin"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(original)
    assert all(is_quantised(module, method) for module in projections(again))
    assert torch.equal(again(tokens()).logits, found)
    assert torch.equal(generate(again), generate(model))
    for key, buffer in original.named_buffers():
        if key.endswith("rope_index"):
            assert torch.equal(again.get_buffer(key), buffer)


@pytest.mark.parametrize(("method", "quantization"), [("int8", "int8"), ("nf4", "int4")])
def test_the_size_of_a_target_is_that_of_the_quantised_weights(
    method: str, quantization: Literal["int8", "int4"], tmp_path: Path
) -> None:
    original, _ = saved(method, "llama-mqa-biases", tmp_path)
    sizes = {name: getattr(original.config, name) for name in ("hidden_size", "intermediate_size")}
    architecture = resolve(dense("llama-mqa-biases", **sizes))
    size = plan_size(architecture, Plan(tuple(original.config.widths())), quantization)
    stored = load_file(tmp_path / "model.safetensors")
    constant = ("weight_format", "quant_map", "bitsandbytes__nf4")  # about 200 bytes per matrix of any size
    found = sum(tensor.nbytes for name, tensor in stored.items() if not name.endswith(constant))
    assert size.quantized_bytes == pytest.approx(found, rel=1e-3)


def test_quantised_models_load_without_the_package(tmp_path: Path) -> None:
    jobs, expected = [], []
    for method in METHODS:
        for name in ("llama-gqa-tied", "opt"):
            folder = tmp_path / method / name
            _, model = saved(method, name, folder)
            with torch.no_grad():
                expected.append(model(tokens()).logits)
            tokenizer().save_pretrained(folder)
            jobs.append({"folder": str(folder), "auto": "AutoModelForCausalLM", "dtype": "float32"})
            jobs[-1]["out"] = str(folder / "out.safetensors")
    run_worker(jobs, "remote", tmp_path)
    for job, logits in zip(jobs, expected, strict=True):
        assert torch.equal(load_file(job["out"])["out"], logits), job["folder"]


@torch.no_grad()
def test_projections_with_unsupported_shapes_can_stay_in_full_precision(tmp_path: Path) -> None:
    """bitsandbytes 0.50 refuses or miscomputes some 4-bit shapes on a CPU, also for dense models."""
    original = compressed("llama-mha", hidden_size=128, intermediate_size=192, head_dim=32)
    original.save_pretrained(tmp_path)
    unsupported = []
    for path, module in original.named_modules():
        if isinstance(module, nn.Linear) and (module.out_features % 32 or module.in_features % 64):
            unsupported.append(path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=unsupported)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert 0 < sum(is_quantised(module, "nf4") for module in projections(model)) < len(projections(model))
    assert 0 < change(original(tokens()).logits, model(tokens()).logits) < MOST_ERROR["nf4"]


@METHOD
def test_quantised_model_cannot_be_compressed(method: str, tmp_path: Path) -> None:
    dense("llama-mha", hidden_size=128, intermediate_size=192, head_dim=32).save_pretrained(tmp_path)
    config = ModeGPTConfig(sparsity=0.3, dataset=str(demo.CALIBRATION_TEXT), num_samples=2)
    with pytest.raises(InvalidConfig, match="compress and save first"):
        quantised(tmp_path, method, compression_config=config)
    with pytest.raises(UnsupportedModel, match="is quantised; compress first"):
        ModeGPTQuantizer(config).quantize_model(quantised(tmp_path, method), tokenizer())


@METHOD
@pytest.mark.parametrize("name", ["llama-gqa-tied", "opt"])
def test_adapter_can_be_trained_on_a_quantised_model(method: str, name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    _, model = saved(method, name, tmp_path / "base")
    prepared = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted = peft.get_peft_model(prepared, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    losses = fine_tune(adapted)
    assert losses[-1] < losses[0] - 0.05
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(tokens()).logits
        for base in (
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
            quantised(tmp_path / "base/small", method),
        ):
            again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
            assert torch.equal(again(tokens()).logits, expected)
