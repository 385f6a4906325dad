"""Test the dense format: a compressed model, padded with zeros, is one of its stock class that computes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_configs import EVERY_VARIANT
from tiny_models import compressed, dense, tokenizer, tokens

from optimum_modegpt import InvalidConfig, OutputError, UnsupportedModel
from optimum_modegpt.architectures import resolve
from optimum_modegpt.cli import main as cli
from optimum_modegpt.export.dense import padded_model
from optimum_modegpt.export.model import export_model
from optimum_modegpt.modeling.modegpt_family import Widths

STORAGES = ("llama-mqa-biases", "gpt2", "gpt_neox", "phi3", "olmo2", "gptj", "codegen", "falcon", "mixtral", "gpt_oss")
"""Variants with every kind of storage, rotary pairs and experts. Some need a newer transformers."""
NORMED = ("qwen3", "gemma3_text", "qwen3_next", "glm4_moe-norms")
"""Variants whose stock class has one gain for all heads. Partial rotation and gates are among them."""
LOAD = """
import sys
sys.modules["optimum_modegpt"] = None  # an import fails, installed or not
import json, torch, transformers
from safetensors.torch import save_file
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model).__module__.startswith("transformers.models."), type(model)
assert transformers.AutoTokenizer.from_pretrained(sys.argv[1])("a")["input_ids"]
with torch.no_grad():
    save_file({"out": model(torch.tensor(json.loads(sys.argv[2]))).logits}, sys.argv[3])
"""


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(tokens()).logits


def check_padded(model: Any, name: str) -> None:
    padded = padded_model(model)
    assert type(padded) is type(dense(name))
    shapes = {key: values.shape for key, values in padded.state_dict().items()}
    assert shapes == {key: values.shape for key, values in dense(name).state_dict().items()}
    expected = logits(model)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits(padded), expected, atol=2e-5 * max(1.0, float(expected.std())), rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in STORAGES if name in EVERY_VARIANT])
def test_every_storage_is_padded_to_the_stock_class(name: str) -> None:
    check_padded(compressed(name), name)


@pytest.mark.parametrize("name", [*NORMED, "gemma4_text"])
def test_normalised_heads_of_full_width_are_padded(name: str) -> None:
    widths = [replace(full, vo=full.vo and full.vo // 2, mlp=full.mlp // 2) for full in full_widths(name)]
    check_padded(compressed(name, widths=widths), name)


@pytest.mark.parametrize("name", NORMED)
def test_gains_of_single_heads_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"query head has its own gains in self_attn.q_norm.*onnx"):
        padded_model(compressed(name))


def test_the_configuration_is_the_dense_one_with_the_record() -> None:
    for name in ("llama-mqa-biases", "gemma4_text", "qwen3_next", "mixtral"):
        padded = padded_model(compressed(name, widths=full_widths(name))).config.to_dict()
        record = padded.pop("modegpt")
        assert record == {"format_version": 1, "base_model": name, "export": "dense"}
        expected = dense(name).config.to_dict()
        for values in (padded, expected):
            values.pop("architectures", None)
        assert padded == expected, name


def test_the_folder_loads_without_the_package(tmp_path: Path) -> None:
    model, source, output = compressed("qwen2"), tmp_path / "small", tmp_path / "dense"
    model.save_pretrained(source)
    tokenizer().save_pretrained(source)
    assert cli.main(["export", str(source), "--format", "dense", "--output", str(output)]) == 0
    assert {path.suffix for path in output.iterdir()} == {".json", ".safetensors"}
    assert "auto_map" not in json.loads((output / "config.json").read_text(encoding="utf-8"))
    found = tmp_path / "found"
    command = [sys.executable, "-I", "-c", LOAD, str(output), json.dumps(tokens().tolist()), str(found)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(load_file(found)["out"], logits(model), atol=2e-5, rtol=1e-5)


def test_only_an_earlier_export_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, output = compressed("llama-mha"), tmp_path / "dense"
    export_model(model, output, "dense")
    with pytest.raises(OutputError, match="not empty"):
        export_model(model, output, "dense")
    export_model(model, output, "dense", overwrite=True)
    (output / "thesis.docx").touch()
    with pytest.raises(OutputError, match="not part of a compressed model"):
        export_model(model, output, "dense", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_refused_model_leaves_nothing_behind(tmp_path: Path) -> None:
    for model in (compressed("qwen3"), dense("qwen3")):
        with pytest.raises(UnsupportedModel):
            export_model(model, tmp_path / "new", "dense")
    with pytest.raises(InvalidConfig, match="expected one of dense, onnx"):
        export_model(dense("qwen3"), tmp_path / "new", "tflite")
    with pytest.raises(InvalidConfig, match="Load the model in that type"):
        export_model(compressed("llama-mha"), tmp_path / "new", "dense", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def full_widths(name: str) -> list[Widths]:
    """Return the widths of the dense blocks. Parts that a block lacks have width 0."""
    return [block.dense_widths for block in resolve(dense(name)).blocks]
