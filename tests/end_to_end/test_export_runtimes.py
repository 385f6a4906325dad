"""Test the formats of ONNX Runtime, OpenVINO and ExecuTorch: a program generates the tokens of its model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import compressed, tokens
from transformers.exporters import base as exporters

import optimum_modegpt.export.runtimes as runtimes
from optimum_modegpt import InvalidConfig, UnsupportedModel, export_model
from optimum_modegpt.cli import main as cli
from optimum_modegpt.export.formats import FORMATS

NEW = 8
has_programs = pytest.mark.skipif(not hasattr(exporters, "ExportedModel"), reason="transformers is too old to save one")

quiet = pytest.mark.filterwarnings("ignore")
"""The modules of ExecuTorch call functions that are deprecated."""


def generated(model: Any) -> list[int]:
    ids = tokens(1, 5)
    settings = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "suppress_tokens": [2]}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0].tolist()


def generated_by_onnx(file: Path) -> list[int]:
    """Generate by ONNX Runtime alone."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    inputs, outputs = session.get_inputs(), [each.name for each in session.get_outputs()]
    names = [each.name for each in inputs]
    assert {"input_ids", "attention_mask"} <= set(names)
    cache = {
        each.name: np.zeros((1, int(each.shape[1]), 0, int(each.shape[3])), np.float32)
        for each in inputs
        if each.name.startswith("input.")
    }
    text, new = tokens(1, 5)[0].tolist(), tokens(1, 5).numpy()
    for _ in range(NEW):
        mask, positions = np.ones((1, len(text)), np.int64), np.arange(len(text) - new.shape[1], len(text))[None]
        given = {"input_ids": new, "attention_mask": mask, "position_ids": positions, **cache}
        found = dict(zip(outputs, session.run(None, {name: given[name] for name in names}), strict=True))
        cache = {name: found[name.replace("input.", "output.", 1)] for name in cache}
        found["logits"][..., 2] = -np.inf
        text.append(int(found["logits"][0, -1].argmax()))
        new = np.array([text[-1:]])
    return text


def generated_by_executorch(file: Path) -> list[int]:
    """Generate by ExecuTorch alone, in parts: two tokens, the rest of the prompt, and then each new token."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(file)
    step = program.load_method("forward")
    inputs = [step.metadata.input_tensor_meta(index) for index in range(step.metadata.num_inputs())]
    types = {4: torch.int64, 6: torch.float32}
    cache = [torch.zeros(each.sizes(), dtype=types[each.dtype()]) for each in inputs[2:]]
    text, seen, first = tokens(1, 5)[0].tolist(), 0, 2
    while len(text) < 5 + NEW:
        new = torch.tensor([text[seen : first or None]])
        positions = torch.arange(seen, seen + new.shape[1])[None]
        outputs = [each.clone() for each in step.execute([new, positions, *cache])]
        seen, cache, logits = seen + new.shape[1], outputs[: len(cache)], outputs[len(cache)]
        if first == 0:
            logits[..., 2] = -torch.inf
            text.append(int(logits[0, -1].argmax()))
        first = 0
    return text


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a program for ONNX Runtime."""
    for package in FORMATS["onnx"].packages:
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("programs") / "onnx"
    export_model(compressed("llama-gqa-tied"), folder, "onnx")
    assert [path.name for path in folder.parent.iterdir()] == ["onnx"]
    return folder


@has_programs
def test_onnx_runtime_generates_the_tokens_of_the_model(program: Path) -> None:
    assert generated_by_onnx(program / "model.onnx") == generated(compressed("llama-gqa-tied"))


@has_programs
@pytest.mark.skipif(os.environ.get("MODEGPT_TEST_FAMILIES") != "all", reason="each takes as long as a family")
@pytest.mark.parametrize("name", ["qwen2", "opt", "mistral-window"])
def test_models_of_other_families_are_exported(name: str, tmp_path: Path) -> None:
    for package in FORMATS["onnx"].packages:
        pytest.importorskip(package)
    model = compressed(name)
    export_model(model, tmp_path / "onnx", "onnx")
    assert generated_by_onnx(tmp_path / "onnx" / "model.onnx") == generated(model)


@has_programs
def test_the_program_of_openvino_answers_as_the_model(tmp_path: Path) -> None:
    """The export itself compares the logits of the saved program."""
    pytest.importorskip("openvino")
    export_model(compressed("llama-gqa-tied"), tmp_path / "new", "openvino")
    assert any(path.suffix == ".xml" for path in (tmp_path / "new").iterdir())


@has_programs
@quiet
def test_executorch_generates_the_tokens_of_the_model(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    model = compressed("llama-gqa-tied").requires_grad_(True)
    export_model(model, tmp_path / "new", "executorch", cache_length=20)
    assert generated_by_executorch(tmp_path / "new" / "model.pte") == generated(model)
    assert all(parameter.requires_grad for parameter in model.parameters()), "the export changed the model"


@has_programs
@pytest.mark.skipif(os.environ.get("MODEGPT_TEST_FAMILIES") != "all", reason="each takes two minutes")
@quiet
@pytest.mark.parametrize("name", ["qwen2", "opt", "mistral-window", "gemma3_text"])
def test_models_of_other_families_are_exported_to_executorch(name: str, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    model = compressed(name)
    export_model(model, tmp_path / "new", "executorch")
    assert generated_by_executorch(tmp_path / "new" / "model.pte") == generated(model)


def test_only_executorch_takes_a_cache_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "demo", "--format", "dense", "--output", str(tmp_path / "new"), "--cache-length", "64"]
    assert cli.main(words) == 2
    assert "found a cache length of 64; only executorch takes one, not dense." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@has_programs
@pytest.mark.parametrize("length", [4, 65])
def test_a_cache_longer_than_the_context_is_refused(length: int, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=f"found cache_length={length}; .* allows 12 to 64"):
        runtimes.export_executorch(compressed("llama-gqa-tied"), None, tmp_path, length)
    assert list(tmp_path.iterdir()) == []


@has_programs
def test_a_program_that_differs_is_refused(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OfAnotherModel:
        @staticmethod
        def save_pretrained(folder: Path) -> None:
            shutil.copytree(program, folder, dirs_exist_ok=True)

    monkeypatch.setattr("transformers.exporters.OnnxExporter.export", lambda *_: OfAnotherModel)
    with pytest.raises(UnsupportedModel, match="logits of the program differ"):
        export_model(compressed("llama-gqa-tied", seed=1), tmp_path / "new", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("optimum_modegpt.export.formats.find_spec", lambda name: None)
    words = ["export", "demo", "--format", "openvino", "--output", str(tmp_path / "new")]
    assert cli.main(words) == 2
    assert "requires openvino: pip install 'optimum-modegpt[openvino]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_old_transformers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "SINCE", "99")
    with pytest.raises(ImportError, match=r"(?s)transformers>=99.*dense or gguf"):
        runtimes.export_onnx(compressed("llama-gqa-tied"), None, tmp_path)
    assert list(tmp_path.iterdir()) == []
