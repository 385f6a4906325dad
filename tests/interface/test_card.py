"""Test the model card: its statements, their sources, and its commands and code, which are run."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import RECIPE, empty_picture, save_dense, save_text
from forks import run_forked
from huggingface_hub import ModelCard
from tiny_models import compressed, tokens
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from optimum_modegpt import ModeGPTConfig, ModeGPTQuantizer, OutputError, UnsupportedModel, check_servable
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.cli.main import main
from optimum_modegpt.compress import compress
from optimum_modegpt.hub import card as card_module
from optimum_modegpt.hub.card import MARK, add_evaluation, is_ours, write_card
from optimum_modegpt.hub.upload import save_result
from optimum_modegpt.loading.safetensors_index import weights_digest
from optimum_modegpt.loading.source import Source
from optimum_modegpt.serving import servable
from optimum_modegpt.serving.engines import SGLANG, VLLM
from optimum_modegpt.serving.servable import Verdict

BASE_CARD = """---
license: other
license_name: tiny-licence
license_link: https://example.org/LICENSE
language: [en, de]
---
# A tiny model
"""
NEEDS = {"BitsAndBytesConfig": ("bitsandbytes", "accelerate"), "peft": ("peft",)}
"""Packages that a code block of the card needs, by a word in the block."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a dense model, its text, and its compressed model under the name that the card uses."""
    place = tmp_path_factory.mktemp("place")
    save_dense(place / "dense").joinpath("README.md").write_text(BASE_CARD, encoding="utf-8")
    save_text(place / "text.txt")
    recipe = [word for key, value in RECIPE.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    arguments = ["compress", str(place / "dense"), "--dataset", str(place / "text.txt"), *recipe]
    assert main([*arguments, "--output", str(place / "out")]) == 0
    (place / "out").rename(place / named(place / "out"))
    return place


@pytest.fixture
def folder(place: Path, tmp_path: Path) -> Path:
    """Return a copy of the compressed model."""
    return Path(shutil.copytree(next(place.glob("dense-modegpt-*")), tmp_path / "result"))


def named(folder: Path) -> str:
    """Return the name that a card gives its model."""
    return str(card(folder).data.model_name)


def card(folder: Path) -> Any:
    return ModelCard.load(folder / "README.md")


def printed(folder: Path, verb: str) -> list[str]:
    """Return the words of the command `verb` that the card shows."""
    commands = re.findall(r"^optimum-cli modegpt (.*)$", card(folder).text.replace("\\\n", ""), re.MULTILINE)
    (words,) = (words for words in map(shlex.split, commands) if words[0] == verb)
    return words


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")


def evaluated(folder: Path, name: str, perplexity: float, **more: Any) -> dict[str, Any]:
    """Return a result as `evaluate` writes it."""
    text = {"name": name, "split": None, "revision": None, "text_column": None, "file_sha256": f"digest of {name}"}
    text |= {"windows": 4, "sequence_length": 32, "tokens": 128, "available_windows": 9, "sha256": "digest"}
    found = {"model": str(folder), "perplexity": perplexity, "tokens": 124, "parameters": 7, "text": text | more}
    return found | {"settings": {"reference": "dense", "flags": ["--dataset", name]}}


# ------------------------------------------------------------------------------------------------------- statements


def test_the_hub_can_read_the_header(folder: Path) -> None:
    data = card(folder).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert {"modegpt", "compressed"} <= set(data.tags)
    assert (data.license, data.license_name, data.language) == ("other", "tiny-licence", ["en", "de"])
    assert data.license_link == "https://example.org/LICENSE"
    assert data.base_model is None  # the name of a folder is not a name on the Hub
    assert data.eval_results is None


def test_the_figures_are_those_of_the_report(folder: Path) -> None:
    text, report = card(folder).text, json.loads((folder / "report.json").read_text())
    numbers = report["parameters"]
    assert f"{numbers['total_before']:,} → {numbers['total_after']:,}" in text
    assert f"{numbers['blocks_before']:,} → {numbers['blocks_after']:,}" in text
    before, after = (
        size / 1e6 for size in (4 * numbers["total_before"], (folder / "model.safetensors").stat().st_size)
    )
    assert f"{before:.2f} MB → {after:.2f} MB" in text
    assert report["weight_bytes"] == (folder / "model.safetensors").stat().st_size
    assert f"{100 * report['achieved_sparsity']:.2f} %" in text
    assert report["calibration"]["sha256"] in text
    assert report["calibration"]["file_sha256"] in text
    assert "8 × 32 tokens of `text.txt`" in text
    for block in report["blocks"]:
        cells = [f"{p['rank']} / {p['dense_rank']} | {p['relative_error']:.3f}" for p in block["parts"].values()]
        assert f"| {block['index']} | {' | '.join(cells)} |" in text
    assert "This model has not been evaluated yet." in text


def test_the_special_token_before_each_window_is_stated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder)]) == 0
    assert "starting with BOS" not in card(folder).text + capsys.readouterr().out
    edit(folder / "config.json", lambda config: config["modegpt"]["calibration"].update(first_token="<s>"))
    add_evaluation(folder, evaluated(folder, "a.txt", 9.0, first_token="<|begin|>"))
    add_evaluation(folder, evaluated(folder, "b.txt", 9.0, first_token=None))
    text = card(folder).text
    assert re.search(
        r"^\| calibration \| 8 × 32 tokens of `text.txt`.*, each window starting with BOS \|$", text, re.MULTILINE
    )
    assert "| `a.txt` | 4 × 32, each window starting with BOS |" in text
    assert "| `b.txt` | 4 × 32 |" in text
    assert main(["inspect", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "\ncalibrated with each window starting with BOS\n" in printed
    assert "a.txt, 4 × 32 tokens, each window starting with BOS: perplexity 9.0000" in printed
    assert "b.txt, 4 × 32 tokens: perplexity 9.0000" in printed


def test_warnings_of_the_compression_are_shown(folder: Path) -> None:
    edit(folder / "report.json", lambda report: report.update(warnings=["a warning of ours"]))
    assert "- a warning of ours" in write_card(folder).read_text(encoding="utf-8")


@pytest.mark.parametrize(("recovered", "relation"), [(None, "quantized"), ({"steps": 1200}, "finetune")])
def test_a_base_on_the_hub_is_linked(recovered: Any, relation: str, folder: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["modegpt"] |= {"base_model": "org/base", "base_revision": "abc"}
        config["modegpt"] |= {} if recovered is None else {"recovered": recovered}

    edit(folder / "config.json", change)
    write_card(folder)
    assert "| base model | `org/base`, revision `abc` |" in card(folder).text
    assert card(folder).data.base_model == "org/base"
    assert card(folder).data.base_model_relation == relation
    assert ("1,200 steps" in card(folder).text) == (recovered is not None)


@pytest.mark.parametrize("recovered", [{"distilled": True, "lora_rank": 4, "tokens": 5000, "dataset": "corpus"}])
def test_a_recovery_is_described(recovered: dict[str, Any], folder: Path) -> None:
    edit(folder / "config.json", lambda config: config["modegpt"].update(recovered=recovered))
    text = " ".join(write_card(folder).read_text(encoding="utf-8").split())
    assert "fine-tuned with distillation from `dense` on `corpus`, 5,000 tokens, LoRA of rank 4" in text


# ------------------------------------------------------------------------------------------------------- the licence


@pytest.mark.parametrize(
    "readme", [None, "# No header", "---\nlicense: no\n---\n", "---\nlicense: [\n---\n", "---\n- a\n---\n"]
)
def test_a_missing_licence_is_unknown(readme: str | None, folder: Path, tmp_path: Path) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    found = Source(str(tmp_path)).card()
    assert found == {}
    edit(folder / "config.json", lambda config: config["modegpt"].update(base_card=found))
    write_card(folder)
    assert card(folder).data.license == "unknown"
    assert "| licence | **unknown**" in card(folder).text


def test_a_relative_licence_link_of_a_folder_is_removed(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_link: LICENSE\n---\n", encoding="utf-8")
    assert Source(str(tmp_path)).card() == {"license": "other"}


def test_a_card_of_the_hub_comes_from_the_revision_that_was_read(tmp_path: Path) -> None:
    commit = 40 * "a"
    snapshot = tmp_path / "models--org--base" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: llama3\nlicense_link: LICENSE\n---\n", encoding="utf-8")
    found = Source("org/base", {"cache_dir": str(tmp_path), "revision": commit, "subfolder": "small"}).card()
    assert found["license"] == "llama3"
    assert found["license_link"].endswith(f"/org/base/resolve/{commit}/LICENSE")
    assert Source("org/other", {"cache_dir": str(tmp_path)}).card() == {}


# --------------------------------------------------------------------------------------------------- commands and code


def test_the_python_runs_as_printed(place: Path, tmp_path: Path) -> None:
    here = Path(shutil.copytree(place, tmp_path / "place"))
    readme = next(here.glob("dense-modegpt-*")) / "README.md"
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks[0].startswith("import optimum_modegpt")
    needs = [[name for word, names in NEEDS.items() if word in block for name in names] for block in blocks]
    runnable = [b for b, names in zip(blocks, needs, strict=True) if all(map(importlib.util.find_spec, names))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    check = "\nassert model.config.model_type == 'modegpt_llama' and tokenizer('a').input_ids"
    script = runnable[0] + check + "\n" + "".join(runnable[1:])
    done = run_forked(script, env=environment, cwd=here)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_command_makes_the_same_model_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (made,) = place.glob("dense-modegpt-*")
    for name in ("dense", "text.txt"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    assert main(printed(made, "compress")) == 0
    assert (tmp_path / made.name / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


def test_the_evaluation_command_measures_the_same_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path(shutil.copytree(place, tmp_path / "place"))
    (made,) = here.glob("dense-modegpt-*")
    monkeypatch.chdir(here)
    settings = ["--reference", "dense", "--dataset", "text.txt", "--max-windows", "3", "--update-card"]
    assert main(["evaluate", str(made), *settings]) == 0
    measured = (made / "evaluation.json").read_text(encoding="utf-8")
    command = printed(made, "evaluate")
    (made / "evaluation.json").unlink()
    assert main([*command, "--update-card"]) == 0
    assert (made / "evaluation.json").read_text(encoding="utf-8") == measured


# -------------------------------------------------------------------------------------------------------- evaluation


def test_evaluations_are_merged_and_newer_ones_replace_older(folder: Path) -> None:
    add_evaluation(folder, evaluated(folder, "one.txt", 5.0))
    add_evaluation(folder, evaluated(folder, "two.txt", 6.0))
    add_evaluation(folder, evaluated(folder, "one.txt", 4.5))
    task = {"value": 0.5, "stderr": 0.01}
    tasks = {
        "model": "x",
        "settings": {"reference": "dense", "flags": ["--tasks", "quiz"]},
        "tasks": {"quiz": {"acc": task}},
    }
    add_evaluation(folder, tasks | {"reference_tasks": {"quiz": {"acc": task}}})
    add_evaluation(folder, {"model": "x", "tasks": {"riddle": {"acc": task | {"stderr": None}}}})
    results = [
        (result.dataset_name, result.metric_type, result.metric_value) for result in card(folder).data.eval_results
    ]
    assert sorted(results) == [
        ("one.txt", "perplexity", 4.5),
        ("quiz", "acc", 0.5),
        ("riddle", "acc", 0.5),
        ("two.txt", "perplexity", 6.0),
    ]
    text = card(folder).text
    assert "| `one.txt` | 4 × 32 | **4.50** |" in text
    assert "5.00" not in text
    assert "**0.5000 ± 0.0100** | 0.5000 ± 0.0100 |" in text
    assert "**0.5000** | – |" in text
    commands = re.findall(r"^optimum-cli modegpt evaluate \S+ (.*)", text, re.MULTILINE)
    assert commands == ["--dataset two.txt", "--dataset one.txt", "--tasks quiz"]
    assert str(folder) not in (folder / "evaluation.json").read_text()


def test_measurements_on_more_or_longer_windows_are_all_shown(folder: Path) -> None:
    for more in ({}, {"windows": 9, "tokens": 288}, {"sequence_length": 16, "tokens": 64}):
        add_evaluation(folder, evaluated(folder, "one.txt", 4.0 + len(more) / 2 + more.get("windows", 0), **more))
    text = card(folder).text
    for row in ("4 × 32 | **4.00**", "9 × 32 | **14.00**", "4 × 16 | **5.00**"):
        assert f"| `one.txt` | {row} |" in text
    (result,) = card(folder).data.eval_results  # the Hub would read several as one
    assert (result.metric_value, result.dataset_args["windows"]) == (14.0, 9)


def test_a_measurement_with_a_reference_is_replaced_only_by_another(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    beside = {"kl": 0.1, "reference_perplexity": 4.0, "top1_agreement": 0.9}
    add_evaluation(folder, evaluated(folder, "one.txt", 6.0, first_token="<s>"))
    add_evaluation(folder, evaluated(folder, "one.txt", 5.0, first_token="<s>") | beside)
    assert "| **5.00** | 4.00 | 0.1000 | 90.0 % |" in card(folder).text
    assert caplog.text == ""
    add_evaluation(folder, evaluated(folder, "one.txt", 7.0, first_token="<s>"))
    assert "one.txt was already measured with a reference; that measurement is kept" in caplog.text
    add_evaluation(folder, evaluated(folder, "one.txt", 7.0, windows=9))
    kept, added = json.loads((folder / "evaluation.json").read_text())["texts"]
    assert (kept["perplexity"], kept["kl"], added["perplexity"]) == (5.0, 0.1, 7.0)
    add_evaluation(folder, evaluated(folder, "one.txt", 4.5, first_token="<s>") | beside | {"kl": 0.2})
    assert "| **4.50** | 4.00 | 0.2000 | 90.0 % |" in card(folder).text
    assert "**5.00**" not in card(folder).text


def test_report_and_evaluation_are_saved_with_the_same_weights(folder: Path, tmp_path: Path) -> None:
    add_evaluation(folder, evaluated(folder, "one.txt", 5.0))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "same")
    for name in ("report.json", "evaluation.json", "README.md"):
        there, here = (place.joinpath(name).read_text(encoding="utf-8") for place in (tmp_path / "same", folder))
        assert there.splitlines()[:20] == here.splitlines()[:20]
    model.save_pretrained(folder)  # the folder that it was loaded from
    assert "**5.00**" in card(folder).text
    model.get_output_embeddings().weight.data.mul_(2)
    model.save_pretrained(tmp_path / "changed")
    assert not {"report.json", "evaluation.json"} & {path.name for path in (tmp_path / "changed").iterdir()}


def test_measurements_of_other_weights_are_not_shown(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_evaluation(folder, evaluated(folder, "one.txt", 5.0))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_output_embeddings().weight.data.mul_(2)
    model.save_pretrained(folder)
    assert "one.txt" not in write_card(folder).read_text(encoding="utf-8")
    add_evaluation(folder, evaluated(folder, "two.txt", 6.0))
    assert "1 earlier measurements in evaluation.json are of other weights and were dropped" in caplog.text
    (result,) = card(folder).data.eval_results
    assert result.dataset_name == "two.txt"


def test_the_weights_are_recognised_in_any_number_of_shards(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert weights_digest(tmp_path / "sharded") == weights_digest(folder)


def test_a_card_of_changed_weights_states_the_change(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config["modegpt"].update(base_model="org/base", base_revision="abc"))
    fresh = write_card(folder).read_text(encoding="utf-8")
    assert ", without training" in fresh
    assert "made with" in fresh
    assert card(folder).data.base_model_relation == "quantized"
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_output_embeddings().weight.data.mul_(2)
    model.save_pretrained(folder)
    text = card(folder).text
    assert "the weights were changed after the compression" in text
    assert card(folder).data.base_model_relation == "finetune"
    assert not any(claim in text for claim in ("without training", "made with", "relative error"))
    (folder / "report.json").unlink()
    write_card(folder)
    assert "base_model_relation" not in card(folder).data.to_dict()  # it is unknown whether they were changed
    assert "without training" not in card(folder).text


def test_a_card_of_a_recovery_has_its_command_and_no_older_errors(folder: Path) -> None:
    recovered = {"dataset": "org/corpus", "revision": "abc", "steps": 20, "lora_rank": 8, "distilled": True}
    edit(folder / "config.json", lambda config: config["modegpt"].update(recovered=recovered | {"teacher": "dense"}))
    flags = ["--teacher", "dense", "--dataset", "org/corpus", "--steps", "20", "--lora-rank", "8"]
    edit(folder / "report.json", lambda report: report["commands"].update(recover=flags))
    text = write_card(folder).read_text(encoding="utf-8")
    assert "relative error" not in text
    assert "and fine-tuned afterwards" in text
    assert "without training" not in text
    name = named(folder)
    made = name.removesuffix("-recovered")
    assert printed(folder, "recover") == ["recover", made, *flags, "--output", name]
    assert printed(folder, "compress")[-1] == made
    assert card(folder).data.datasets == ["org/corpus"]


def test_a_report_without_commands_gives_a_card_without_them(folder: Path) -> None:
    edit(folder / "report.json", lambda report: report.pop("commands"))
    text = write_card(folder).read_text(encoding="utf-8")
    assert "made with" in text
    assert "modegpt compress" not in text
    assert "compression_config=ModeGPTConfig(sparsity=0.3, " in text


@pytest.mark.parametrize("older", [True, False])
def test_a_card_of_an_older_version_is_recognised(older: bool, folder: Path) -> None:
    mark = "Written by optimum_modegpt, and written again when there is news; to keep words of your own, delete this."
    (folder / "README.md").write_text(f"<!-- {mark if older else ''} -->\n# An old card\n", encoding="utf-8")
    assert ("An old card" not in write_card(folder).read_text(encoding="utf-8")) == older


def test_the_reference_and_the_settings_are_named(
    place: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    monkeypatch.chdir(place)
    settings = ["--dataset", "text.txt", "--sequence-length", "32", "--max-windows", "3", "--batch-size", "2"]
    settings += ["--dtype", "bfloat16"]
    assert main(["evaluate", str(folder), "--reference", str(other), *settings, "--update-card"]) == 0
    command = printed(folder, "evaluate")
    pairs = set(zip(command[2::2], command[3::2], strict=True))
    assert pairs == set(zip(settings[::2], settings[1::2], strict=True)) | {("--reference", "other")}
    text = card(folder).text
    (row,) = re.findall(r"^\| `text\.txt` .*", text, re.MULTILINE)
    assert "(`other`) |" in row
    assert main(["evaluate", str(folder), "--reference", "dense", *settings, "--update-card"]) == 0
    assert "other" not in re.findall(r"^\| `text\.txt` .*", card(folder).text, re.MULTILINE)[0]


# ----------------------------------------------------------------------------------------------- heads and quantisation


@pytest.mark.parametrize(
    ("auto", "task"), [(AutoModelForSequenceClassification, 'task_type="SEQ_CLS"'), (AutoModel, None)]
)
def test_the_task_of_a_model_with_another_head(auto: Any, task: str | None, folder: Path) -> None:
    model = auto.from_pretrained(folder)
    model.save_pretrained(folder.parent / "head")
    text = card(folder.parent / "head").text
    assert f"| all parameters | {sum(each.numel() for each in model.parameters()):,} |" in text
    assert "## Reproduce" not in text
    assert "## Serving" not in text
    assert 'target_modules="all-linear"' + (f", {task})" if task else ")") in text


def test_the_card_of_a_quantised_model_mentions_no_ordinary_layers(folder: Path) -> None:
    assert "ordinary `nn.Linear` modules" in card(folder).text
    edit(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "bitsandbytes"}))
    text = write_card(folder).read_text(encoding="utf-8")
    assert "ordinary `nn.Linear` modules" not in text
    assert "| all parameters |" not in text
    assert "## Serving" not in text


# ---------------------------------------------------------------------------------------------------------- serving


def section(folder: Path, title: str) -> str:
    """Return a section of the card, or "" if the card has none with this title."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## )", card(folder).text, re.MULTILINE | re.DOTALL)
    return "" if found is None else found[1]


def test_the_engines_are_those_of_servable_with_versions_and_commands(folder: Path) -> None:
    name, text = named(folder), section(folder, "Serving")
    rows = {row.engine: row for row in check_servable(folder, name=name) if row.serves}
    del rows["transformers"]  # the code at the top
    assert {"vLLM", "SGLang", "llama.cpp", "ONNX Runtime", "OpenVINO", "ExecuTorch"} == rows.keys()
    shown = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert shown == [[row.engine, row.works, row.checked, row.reason] for row in rows.values()]
    commands = re.findall(r"^# (.*)\n(.*)$", text, re.MULTILINE)
    assert commands == [(row.engine, row.command) for row in rows.values()]
    assert f"| vLLM | with package | run with {VLLM.runs[0].version} |" in text
    assert f"\nvllm serve {name}\n" in text


def test_the_commands_have_the_name_on_the_hub(folder: Path) -> None:
    write_card(folder, "me/small")
    assert "\nvllm serve me/small\n" in section(folder, "Serving")


def test_an_engine_that_does_not_run_the_model_is_not_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = {"vLLM": Verdict("no", "It is too new."), "SGLang": Verdict("unknown", "Nobody has looked.")}
    rules = [(engine, lambda shape, engine=engine: verdicts[engine.name]) for engine in (VLLM, SGLANG)]
    monkeypatch.setattr(servable, "RULES", rules)
    write_card(folder)
    assert section(folder, "Serving") == ""
    verdicts["vLLM"] = Verdict("yes", "It has a class.", "serve {model}")
    write_card(folder)
    text = section(folder, "Serving")
    assert f"| vLLM | yes | run with {VLLM.runs[0].version} | It has a class. |" in text
    assert "SGLang" not in text


# ------------------------------------------------------------------------------------------- a save that never fails


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("evaluation.json", b'{"texts": ['),
        ("evaluation.json", b"[]"),
        ("evaluation.json", b'{"texts": 3, "tasks": {"quiz": {"acc": "x"}}}'),
        ("report.json", b'{"report_version": 9}'),
        ("report.json", b'{"anything": 1}'),
        ("report.json", b"\xff"),
        ("README.md", "Übung".encode("latin-1")),
    ],
)
def test_foreign_and_broken_files_do_not_change(name: str, content: bytes, folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    place = tmp_path / "place"
    place.mkdir()
    (place / name).write_bytes(content)
    model.save_pretrained(place)
    assert (place / name).read_bytes() == content
    assert is_ours((place / "README.md").read_text(encoding="utf-8", errors="replace")) == (name != "README.md")


@pytest.mark.parametrize("name", ["ranks.png", "README.md", "report.json", "evaluation.json"])
def test_saving_succeeds_if_folders_have_the_names_of_files(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "place" / name).mkdir(parents=True)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "place")
    assert (tmp_path / "place" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "odd",
    [
        {"base_model": ["x"]},
        {"base_model": "/nowhere/on/this/machine"},
        {"recipe": None},
        {"recipe": {"sparsity": "x", "seed": [], "method": {}}},
        {"achieved": None},
        {"achieved": {"sparsity": "x", "parameters": {"total_before": 0}}},
        {"calibration": {"name": "x", "windows": 4, "sequence_length": "long"}},
        {"recovered": 3},
        {"base_card": {"license": {"a": 1}, "language": [None]}},
    ],
    ids=str,
)
def test_saving_succeeds_with_an_invalid_record(odd: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.modegpt = {**model.config.modegpt, **odd}
    model.save_pretrained(tmp_path / "place")
    text = (tmp_path / "place" / "README.md").read_text(encoding="utf-8")
    assert is_ours(text)
    assert "nowhere/on" not in text


def test_only_the_version_of_the_record_is_required(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(card_module, "plot_kept", empty_picture)
    whole = json.loads((folder / "config.json").read_text(encoding="utf-8"))["modegpt"]
    keys = [(key,) for key in whole if key != "format_version"]
    keys += [(outer, inner) for outer in ("recipe", "calibration", "achieved") for inner in whole[outer]]
    keys += [("achieved", "parameters", key) for key in whole["achieved"]["parameters"]]
    for *outer, last in keys:
        record = copy.deepcopy(whole)
        inner = record
        for key in outer:
            inner = inner[key]
        del inner[last]
        edit(folder / "config.json", lambda config, record=record: config.update(modegpt=record))
        text = write_card(folder).read_text(encoding="utf-8")
        assert is_ours(text)
        assert "Undefined" not in text, (*outer, last)
        assert caplog.text == "", (*outer, last)


def test_the_card_of_token_ids_in_memory_is_built_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    built = []
    build = card_module._card
    monkeypatch.setattr(card_module, "_card", lambda *args: built.append(args) or build(*args))
    for layout in ("per_layer", "stock"):
        model = AutoModelForCausalLM.from_pretrained(place / "dense")
        config = ModeGPTConfig(**RECIPE, layout=layout)
        windows = TokenWindows(tokens(8, 32), {"name": "mine", "windows": 8})
        compress(model, config, windows, progress=False)
        save_result(model, tmp_path / layout)
        assert "8 × 32 tokens of `mine`; seed 0 |" in card(tmp_path / layout).text
    assert len(built) == 2
    assert "invalid values" not in caplog.text


def test_values_do_not_break_lines(folder: Path) -> None:
    evil = "x`|\n```\n# Evil <script>"
    edit(folder / "config.json", lambda config: config["modegpt"].update(base_model=evil, base_revision=evil))
    edit(folder / "config.json", lambda config: config["modegpt"]["calibration"].update(name=evil, split=evil))
    edit(folder / "config.json", lambda config: config["modegpt"]["recipe"].update(dataset=evil, method=evil))
    text = write_card(folder).read_text(encoding="utf-8")
    assert not re.search("^# Evil", text, re.MULTILINE)
    assert "<script>" not in text
    assert card(folder).data.base_model is None


def test_words_of_a_stored_command_are_quoted(folder: Path) -> None:
    evil = "x`|\n```\n# Evil <script>"
    edit(folder / "report.json", lambda report: report["commands"].update(compress=[evil, "; rm -rf ~"]))
    entry = evaluated(folder, "one.txt", 5.0)
    add_evaluation(folder, entry | {"settings": {"reference": evil, "flags": ["--dataset", evil]}})
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert not re.search("^# Evil", text, re.MULTILINE)
    assert "<script>" not in text
    assert "'; rm -rf ~'" in text.replace(" \\\n   ", "")


def test_omitted_files_are_logged_and_the_model_is_saved(folder: Path, tmp_path: Path, caplog: Any) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'plot'")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "model.safetensors.index.json").write_text("{")
    (tmp_path / "place" / "ranks.png").symlink_to(tmp_path / "nowhere" / "ranks.png")
    model.save_pretrained(tmp_path / "place")
    assert (tmp_path / "place" / "model.safetensors").is_file()
    assert f"{tmp_path / 'place'} is saved, but not its card" in caplog.text


def test_an_evaluation_does_not_replace_a_foreign_file(folder: Path) -> None:
    (folder / "evaluation.json").write_text("[]")
    with pytest.raises(OutputError, match="was not written by this package"):
        add_evaluation(folder, evaluated(folder, "one.txt", 5.0))
    assert (folder / "evaluation.json").read_text() == "[]"


# ------------------------------------------------------------------------------------------------- whose card it is


def test_the_card_of_the_trainer_is_replaced(folder: Path) -> None:
    pytest.importorskip("accelerate", reason="needs the Trainer")
    arguments = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True)
    data = [{"input_ids": row, "labels": row} for row in tokens()]
    trainer = Trainer(AutoModelForCausalLM.from_pretrained(folder), arguments, train_dataset=data)
    trainer.create_model_card()
    assert "generated_from_trainer" in (folder / "README.md").read_text(encoding="utf-8")
    trainer.save_model()
    assert is_ours((folder / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("words", ["# My own words\n", "---\nlicense: mit\n---\n"])
def test_a_card_written_by_a_person_is_kept(words: str, folder: Path) -> None:
    (folder / "README.md").write_text(words, encoding="utf-8")
    assert write_card(folder) == folder / "README.md"
    add_evaluation(folder, evaluated(folder, "one.txt", 5.0))
    ModeGPTQuantizer().save(AutoModelForCausalLM.from_pretrained(folder), folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == words


def test_a_card_is_ours_until_its_mark_is_deleted(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert is_ours(text)
    assert not is_ours(text.replace(MARK, ""))


def test_the_same_files_give_the_same_card(folder: Path) -> None:
    before = (folder / "README.md").read_bytes()
    assert write_card(folder).read_bytes() == before


# ---------------------------------------------------------------------------------------------------- missing files


def test_without_matplotlib_no_picture_is_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "ranks.png").unlink(missing_ok=True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "ranks.png" not in write_card(folder).read_text(encoding="utf-8")
    assert not (folder / "ranks.png").exists()


def test_with_matplotlib_the_picture_is_in_the_same_folder(folder: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'plot'")
    (folder / "ranks.png").unlink(missing_ok=True)
    assert "](ranks.png)" in write_card(folder).read_text(encoding="utf-8")
    assert (folder / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_of_a_model_without_its_report_uses_its_record(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "report.json").unlink()
    write_card(tmp_path / "again")
    first, again = card(folder), card(tmp_path / "again")
    assert again.data.license == "other"
    assert "made with" in first.text
    assert "made with" not in again.text
    assert "AutoTokenizer" not in again.text
    for line in ("| all parameters |", "| weight files |", "| sha256 of its token ids |", "In Python, load `dense`"):
        assert re.findall(f"^{re.escape(line)}.*", first.text, re.MULTILINE) == re.findall(
            f"^{re.escape(line)}.*", again.text, re.MULTILINE
        )


def test_a_short_record_gives_a_short_card(tmp_path: Path) -> None:
    compressed("opt").save_pretrained(tmp_path)
    write_card(tmp_path)
    assert named(tmp_path) == "opt-modegpt"
    assert "## Reproduce" not in card(tmp_path).text
    assert "None" not in card(tmp_path).text


def test_the_report_of_another_model_is_ignored(folder: Path) -> None:
    edit(folder / "report.json", lambda report: report["config"].update(sparsity=0.5))
    assert "made with" not in write_card(folder).read_text(encoding="utf-8")


def test_a_dataset_in_memory_gives_no_command(place: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "dense")
    quantizer = ModeGPTQuantizer(RECIPE | {"dataset": (place / "text.txt").read_text(encoding="utf-8").split("\n\n")})
    quantizer.save(quantizer.quantize_model(model, progress=False), tmp_path)
    text = card(tmp_path).text
    assert "modegpt compress" not in text
    assert re.search(r"ModeGPTConfig\(sparsity=0\.3, .*dataset='in memory: list \d+ items'", text)


def test_a_dense_model_gets_no_card(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="contains a dense model"):
        write_card(save_dense(tmp_path))
    assert not (tmp_path / "README.md").exists()
