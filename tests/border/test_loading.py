"""Models are read as they are: incomplete checkpoints are refused, and a head of its own is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import RECIPE, save_dense, save_text
from hub import Blob, Hub, serving
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaModel

from optimum_modegpt.integration import cli
from optimum_modegpt.report import count_parameters

FLAGS = [part for key, value in RECIPE.items() for part in (f"--{key.replace('_', '-')}", str(value))]
LOST = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    root = tmp_path_factory.mktemp("models")
    command("compress", save_dense(root / "dense"), "--output", root / "compressed", "--dataset", text, *FLAGS)
    return root / "compressed"


def command(*words: Any) -> None:
    """Run a command that succeeds."""
    assert cli.main([str(word) for word in words]) == 0


def refusal(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """Run a command that fails, and return its error."""
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    return capsys.readouterr().err.partition("error: ")[2]


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Change the tensors of a saved model in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ----------------------------------------------------------------------------------------------- incomplete checkpoints


def commands(dense: Path, compressed: Path, text: Path, folder: Path) -> dict[str, list[Any]]:
    """Every command that loads the dense model, as words."""
    (folder / "prompts.txt").write_text("the cat\na dog\n")
    windows = ["--dataset", text, "--sequence-length", 32]
    return {
        "compress": ["compress", dense, "--output", folder / "out", "--dataset", text, *FLAGS],
        "evaluate": ["evaluate", dense, *windows],
        "reference": ["evaluate", compressed, "--reference", dense, *windows],
        "compare": ["compare", dense, compressed, "--prompts", folder / "prompts.txt"],
        "teacher": ["recover", compressed, "--teacher", dense, "--output", folder / "out", *windows],
        "benchmark": ["benchmark", dense],
        "benchmark reference": ["benchmark", compressed, "--reference", dense],
    }


@pytest.mark.parametrize("name", commands(Path(), Path(), Path(), Path("/tmp")))
def test_no_command_runs_on_weights_that_transformers_made_up(
    name: str, compressed: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = edit(save_dense(tmp_path / "lacking"), lambda tensors: tensors.pop(LOST))
    message = refusal(capsys, *commands(folder, compressed, text, tmp_path)[name])
    assert f"{str(folder)!r} cannot be loaded: LlamaForCausalLM: the checkpoint does not fit" in message
    assert f"missing: {LOST}\nThe folder is incomplete or was edited; save or download it again." in message
    assert not (tmp_path / "out").exists()


def test_tensors_of_other_shapes_are_named_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[LOST] = torch.zeros(3, 32)
        del tensors["model.norm.weight"]

    message = refusal(capsys, "benchmark", edit(save_dense(tmp_path), change))
    assert "missing: model.norm.weight\n" in message
    assert f"wrong shape: {LOST} is (3, 32), the configuration says (48, 32)\n" in message


def test_the_first_twenty_names_are_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "benchmark", edit(save_dense(tmp_path), lambda tensors: tensors.clear()))
    assert message.count("missing: ") == 20
    assert "… and 10 more" in message  # of 29 tensors, and the tied head


def test_a_checkpoint_without_a_head_is_refused_unless_it_is_tied(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, lacks_head in (("llama-gqa-tied", False), ("llama-mha", True)):
        folder = save_dense(tmp_path / name, name)
        LlamaModel.from_pretrained(folder).save_pretrained(folder)
        words = ["evaluate", folder, "--dataset", text, "--max-windows", 1]
        if lacks_head:
            assert "missing: lm_head.weight\n" in refusal(capsys, *words)
        else:
            command(*words)


def test_tensors_that_the_model_does_not_use_are_a_warning_of_one_line(
    tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {f"mtp.{index}": torch.zeros(1) for index in range(7)}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # as old checkpoints have it
    folder = edit(save_dense(tmp_path), lambda tensors: tensors.update(extra))
    command("evaluate", folder, "--dataset", text, "--max-windows", 1)
    (line,) = [record.message for record in caplog.records if "does not use" in record.message]
    assert line.endswith("they are ignored: mtp.0, mtp.1, mtp.2, mtp.3, mtp.4 and 2 more.")


def test_a_model_below_an_adapter_is_read_as_strictly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    dense, adapter = save_dense(tmp_path / "dense"), tmp_path / "adapter"
    adapted: Any = AutoModelForCausalLM.from_pretrained(dense)
    peft.get_peft_model(adapted, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    words = ["benchmark", adapter, "--batch-sizes", 1, "--prompt-lengths", 8, "--new-tokens", 2, "--repeats", 1]
    command(*words)
    edit(dense, lambda tensors: tensors.pop(LOST))
    assert f"missing: {LOST}" in refusal(capsys, *words)


# -------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize(("name", "says"), [("llama-gqa-tied", True), ("opt", True), ("opt", None)])
def test_a_head_in_the_file_is_kept_and_counted_everywhere(
    name: str, says: bool | None, text: Path, tmp_path: Path
) -> None:
    """`says` is `tie_word_embeddings` of the configuration; without the key, OPT is tied."""
    dense, output = save_dense(tmp_path / "dense", name), tmp_path / "out"
    edit(dense, lambda tensors: tensors.update({"lm_head.weight": torch.randn(260, 32) / 6}))
    if says is None:
        values = json.loads((dense / "config.json").read_text())
        del values["tie_word_embeddings"]
        (dense / "config.json").write_text(json.dumps(values))
    command("compress", dense, "--output", output, "--dataset", text, *FLAGS, "--sparsity", 0)
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (dense, output))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(after(ids).logits, before(ids).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    parameters = count_parameters(before)
    assert count_parameters(after) == parameters
    for verb, more in (("inspect", []), ("evaluate", ["--dataset", text, "--max-windows", 1])):
        command(verb, output, "--json", tmp_path / "found.json", *more)
        assert json.loads((tmp_path / "found.json").read_text())["parameters"] == parameters
    report = json.loads((output / "report.json").read_text())["parameters"]
    record = json.loads((output / "config.json").read_text())["modegpt"]["achieved"]["parameters"]
    assert report == record
    assert report["total_before"] == report["total_after"] == parameters
    assert f"{parameters:,}" in (output / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------------- Hub


UNKNOWN_FAMILY = """
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from optimum_modegpt import ModeGPTConfig, ModeGPTModelForCausalLM, UnsupportedModel
given, config = sys.argv[1], ModeGPTConfig(dataset=[[1, 2]])
for load in (
    lambda: AutoModelForCausalLM.from_pretrained(given, quantization_config=config),
    lambda: GPT2LMHeadModel.from_pretrained(given, quantization_config=config),
    lambda: AutoModelForCausalLM.from_pretrained(given, compression_config=config),
    lambda: ModeGPTModelForCausalLM.from_pretrained(given, compression_config=config),
):
    try:
        load()
    except UnsupportedModel as error:
        print(error)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


def client(code: str, *words: Any, **environment: str) -> Any:
    """Run Python in a process of its own, which may see another Hub or cache."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}", *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_an_unknown_family_is_refused_before_its_weights_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=260)).save_pretrained(tmp_path / "gpt2")
    files = {
        path.name: Blob(path.read_bytes(), path.suffix == ".safetensors") for path in (tmp_path / "gpt2").iterdir()
    }
    hub.create("user/gpt2").commit("main", files)
    done = client(UNKNOWN_FAMILY, "user/gpt2", **hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model_type 'gpt2' is not supported; known: llama, mistral, opt, qwen2") == 4
    assert hub.asked(r"user/gpt2/resolve/.*/config\.json")
    assert not hub.asked(r"\.safetensors|\.bin")
