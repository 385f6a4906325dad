"""Test the command line: results, error messages, and that a failed run leaves no files."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import RECIPE, save_dense, save_text
from optimum.commands.optimum_cli import main as optimum_main
from tiny_models import dense, tokenizer, tokens
from tqdm import tqdm
from transformers import AutoModelForCausalLM, XGLMConfig, XGLMForCausalLM

from optimum_modegpt import ModeGPTConfig, ModeGPTQuantizer, demo, perplexity
from optimum_modegpt.calibration.data import evaluation_windows
from optimum_modegpt.cli import main as cli
from optimum_modegpt.cli import register as cli_register
from optimum_modegpt.cli.arguments import field_texts
from optimum_modegpt.cli.commands import compress as compress_command
from optimum_modegpt.cli.commands import inspect as inspect_command
from optimum_modegpt.cli.commands.common import configuration
from optimum_modegpt.cli.commands.demo import whole_sentences
from optimum_modegpt.modeling import DENSE_TYPES
from optimum_modegpt.report import Report

FLAGS = [part for key, value in RECIPE.items() for part in (f"--{key.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("results") / "compressed"
    assert cli.main(["compress", str(checkpoint), "--output", str(folder), "--dataset", str(text), *FLAGS]) == 0
    return folder


def command(*arguments: Any, program: tuple[str, ...] = (sys.executable, "-m", "optimum_modegpt")) -> Any:
    """Run a command in a process and return the finished process."""
    return subprocess.run(
        [*program, *map(str, arguments)], capture_output=True, text=True, check=False, env={**os.environ}
    )


def refusal(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Run a command that fails, and return its error message."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return errors[errors.index("error: ") :]


# ------------------------------------------------------------------------------------------------------------- compress


def test_compress_and_evaluate_in_processes_of_their_own(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    output, report = tmp_path / "out", tmp_path / "report.json"
    done = command("compress", checkpoint, "--output", output, "--dataset", text, "--report", report, *FLAGS)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"out", "report.json"}
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "report.json"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "modegpt_common.py", "modegpt_llama.py"} <= names
    assert Report.load(report) == Report.load(output / "report.json")
    assert "removed 30." in done.stdout
    assert f"saved in {output}" in done.stdout
    assert done.stderr == ""


def test_the_command_gives_the_quantizers_model(checkpoint: Path, compressed: Path, text: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    ModeGPTQuantizer(dataset=str(text), **RECIPE).quantize_model(model, progress=False)
    reloaded = AutoModelForCausalLM.from_pretrained(compressed)
    with torch.no_grad():
        assert torch.equal(reloaded(tokens()).logits, model(tokens()).logits)


def test_a_loaded_model_needs_its_folder_no_more(text: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_dense(tmp_path / "gone"))
    shutil.rmtree(tmp_path / "gone")
    ModeGPTQuantizer(dataset=str(text), tokenizer=tokenizer(), **RECIPE).quantize_model(model, progress=False)
    assert model.config.modegpt["base_model"] == "gone"


def test_dtype_is_that_of_the_weights(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["compress", str(checkpoint), "--output", str(tmp_path / "out"), "--dataset", str(text), *FLAGS]
    assert cli.main([*arguments, "--dtype", "bfloat16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype is torch.bfloat16


def test_flags_win_over_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"sparsity": 0.4, "seed": 7, "quant_method": "modegpt"}))
    options = cli.build_parser().parse_args(
        ["compress", "m", "--output", "o", "--config", str(file), "--sparsity", "0.2", "--round-to", "1"]
    )
    assert configuration(options) == ModeGPTConfig(sparsity=0.2, seed=7, round_to=1)


VALUES = {
    "method": "paper",
    "allocation": "uniform",
    "layout": "mlp",
    "round_to": "16",
    "dataset": "c4",
    "target_quantization": "int8",
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ModeGPTConfig)])
def test_every_field_is_a_flag_with_its_help(field: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind = str(ModeGPTConfig.__dataclass_fields__[field].type).split(" ")[0]
    value = VALUES.get(field, {"float": "0.5", "int": "3", "bool": "True"}.get(kind, "word"))
    flag, words = f"--{field.replace('_', '-')}", [] if kind == "bool" else [value]
    single = [] if field == "dataset" else ["--dataset", "c4"]  # a split or a column is for a single text
    needed = {"target_size": "4GB"} if field == "target_quantization" else {}
    single += [word for name, size in needed.items() for word in (f"--{name.replace('_', '-')}", size)]
    options = cli.build_parser().parse_args(["compress", "m", "--output", "o", *single, flag, *words])
    expected = ModeGPTConfig.from_dict({"dataset": "c4", **needed, field: type(getattr(options, field))(value)})
    assert configuration(options) == expected
    assert str(getattr(expected, field)) == value
    with pytest.raises(SystemExit):
        cli.build_parser().parse_args(["compress", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert flag in printed
    assert field_texts()[field][:30] in printed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"sparsty": 0.3}', "unknown field 'sparsty' in the compression configuration. Did you mean 'sparsity'?"),
        ('{"sparsity": 30}', "for 30 % write sparsity=0.3"),
        ("sparsity: 0.3", "cannot be read as JSON"),
        ("[1]", "contains a list; expected an object of fields"),
        (None, "cannot be read as JSON"),
    ],
)
def test_a_bad_file_is_refused(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.json"
    if content is not None:
        file.write_text(content)
    assert message in refusal(capsys, "compress", "m", "--output", tmp_path / "o", "--config", file)


def test_percent_is_refused_with_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "compress", "m", "--output", tmp_path / "o", "--sparsity", 30)
    assert message == (
        "error: sparsity must be in [0, 1), found 30.0. Fractions, not percent: for 30.0 % write sparsity=0.3.\n"
    )


# --------------------------------------------------------------------------------------------------------------- output


def test_a_full_folder_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "note").touch()
    message = refusal(capsys, "compress", "no-such-model", "--output", tmp_path)
    assert message == (
        f"error: {tmp_path} exists and is not empty; choose another --output, or overwrite it with --overwrite.\n"
    )
    message = refusal(capsys, "compress", "no-such-model", "--output", tmp_path, "--overwrite")
    assert "has no readable config.json; --overwrite deletes compressed models only" in message
    assert "is a file; expected a folder as --output" in refusal(capsys, "compress", "m", "--output", tmp_path / "note")
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


@pytest.mark.parametrize("used", ["model", "dataset", "config", "report"])
def test_inputs_of_a_run_are_never_overwritten(
    used: str, compressed: Path, checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = shutil.copytree(compressed, tmp_path / "out")
    before = {path.name for path in output.iterdir()}
    flags = ["--output", output, "--overwrite", "--dataset", text]
    inside = {
        "model": ["compress", shutil.copytree(checkpoint, output / "inner") if used == "model" else checkpoint, *flags],
        "dataset": ["compress", checkpoint, *flags[:3], "--dataset", shutil.copy(text, output / "text.txt")],
        "config": ["compress", checkpoint, *flags, "--config", output / "config.json"],
        "report": ["compress", checkpoint, *flags, "--report", output / "r.json"],
    }
    (output / "config.json").write_text("{}") if used == "config" else None
    assert "which this run uses" in refusal(capsys, *inside[used], *FLAGS)
    assert before <= {path.name for path in output.iterdir()}
    message = refusal(capsys, "compress", checkpoint, "--output", checkpoint, "--overwrite", *FLAGS)
    assert "is an input of this run" in message


def test_overwrite_replaces_after_success_only(
    checkpoint: Path, compressed: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    shutil.copytree(compressed, output)
    (output / "old.txt").touch()
    arguments = ["compress", checkpoint, "--output", output, "--overwrite", *FLAGS]
    assert "nowhere.txt" in refusal(capsys, *arguments, "--dataset", "nowhere.txt")
    assert (output / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert cli.main([*map(str, arguments), "--dataset", str(text)]) == 0
    assert not (output / "old.txt").exists()
    assert (output / "report.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_filled(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    assert cli.main(["compress", str(checkpoint), "--output", str(output), "--dataset", str(text), *FLAGS]) == 0
    assert (output / "config.json").exists()


def test_a_report_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(
        capsys, "compress", "no-such-model", "--output", tmp_path / "o", "--report", tmp_path / "no" / "r.json"
    )
    assert "does not exist" in message


def test_interrupt_leaves_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    text = save_text(tmp_path / "text.txt", words=200_000)
    place = tmp_path / "new" / "place"
    arguments = ["compress", checkpoint, "--output", place / "out", "--dataset", text, "--num-samples", "15000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "optimum_modegpt", *map(str, arguments), "--sequence-length", "32"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # on busy cores, spinning threads delay a signal for minutes
    )
    end = time.monotonic() + 120
    while not (place.is_dir() and any(place.iterdir())) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 130, errors
    assert errors.endswith("Interrupted. No files were written.\n")
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_compressed_model_is_refused(compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["compress", compressed, "--output", tmp_path / "o"], ["estimate", compressed]):
        assert "already compressed" in refusal(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_family_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "xglm"
    config = XGLMConfig(num_layers=1, attention_heads=2, d_model=8, ffn_dim=8, vocab_size=260)
    XGLMForCausalLM(config).save_pretrained(model)
    for arguments in (["compress", model, "--output", tmp_path / "o"], ["estimate", model]):
        message = refusal(capsys, *arguments)
        assert f"model_type 'xglm' is not supported; known: {', '.join(DENSE_TYPES)}" in message
    assert [path.name for path in tmp_path.iterdir()] == ["xglm"]


def test_a_name_that_cannot_be_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["compress", "nobody/nothing", "--output", tmp_path / "o"], ["inspect", "nobody/nothing"]):
        assert "nobody/nothing" in refusal(capsys, *verb)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "nobody/nothing", "--debug"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("Traceback")
    assert "error: 'nobody/nothing' is not a local folder" in errors


def test_a_defect_is_no_broken_threshold(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def inspection(*_: Any) -> Any:
        raise RuntimeError("a shape was wrong")

    monkeypatch.setattr(inspect_command, "inspection", inspection)
    assert cli.main(["inspect", str(checkpoint)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("Traceback")
    assert "error: a shape was wrong\nThis looks like a bug" in errors


def test_a_device_that_is_not_there(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "o"
    for device in ("warp", "meta:x", "meta", "cpu:7"):
        message = refusal(
            capsys, "compress", checkpoint, "--output", output, "--dataset", text, "--device", device, *FLAGS
        )
        assert f"--device {device} cannot be used" in message


def test_a_broken_checkpoint_is_one_message(
    compressed: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(compressed, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["per_layer_config"]["0"]["intermediate_size"] -= 1
    (broken / "config.json").write_text(json.dumps(config))
    message = refusal(capsys, "evaluate", broken, "--dataset", text, "--sequence-length", 32, "--max-windows", 2)
    assert "does not fit its configuration" in message


@pytest.mark.parametrize("verb", ["evaluate", "inspect"])
def test_weights_that_are_cut_off_are_one_message(
    verb: str, checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    flags = ["--dataset", text] if verb == "evaluate" else []
    message = refusal(capsys, verb, broken, *flags)
    assert {"evaluate": "cut off or damaged", "inspect": "no readable safetensors"}[verb] in message


EDITS: dict[str, tuple[Any, str]] = {
    "dense type": (lambda c: c.update(model_type="llama"), "config.json was edited. It has the record of a compressed"),
    "no record": (lambda c: c.pop("modegpt"), "no `modegpt` record"),
    "no widths": (lambda c: c.pop("per_layer_config"), "qk_head_dim is None"),
    "text for widths": (lambda c: c.update(per_layer_config="x"), "cannot be loaded"),
    "no heads": (lambda c: c.update(num_attention_heads=0), "num_attention_heads is 0"),
    "other width": (lambda c: c["per_layer_config"]["0"].update(intermediate_size=31), "config.json and the weights"),
    "fewer blocks": (
        lambda c: c.update(num_hidden_layers=1, per_layer_config={"0": c["per_layer_config"]["0"]}),
        "more blocks than 1",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_inspect_tells_of_an_edited_configuration(
    edit: str, compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(compressed, tmp_path / "edited")
    config = json.loads((folder / "config.json").read_text())
    EDITS[edit][0](config)
    (folder / "config.json").write_text(json.dumps(config))
    assert EDITS[edit][1] in refusal(capsys, "inspect", folder)


# ------------------------------------------------------------------------------------------------------------- evaluate


def test_evaluate_finds_a_tokenizer(
    checkpoint: Path, compressed: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(compressed).save_pretrained(bare)
    arguments = ["evaluate", bare, "--dataset", text, "--max-windows", 1]
    message = refusal(capsys, *arguments)
    assert "--tokenizer" in message
    assert "object" not in message
    for more in (["--reference", checkpoint], ["--tokenizer", checkpoint]):
        assert cli.main([str(word) for word in (*arguments, *more)]) == 0


def test_a_tokenizer_of_another_size_is_a_warning(
    checkpoint: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    larger = tokenizer()
    larger.add_tokens([f"<{i}>" for i in range(9)])
    larger.save_pretrained(tmp_path / "larger")
    wide = save_dense(tmp_path / "wide", vocab_size=600)
    arguments = ["--dataset", str(text), "--max-windows", "1"]
    foreign = ["--tokenizer", str(tmp_path / "larger"), "--allow-foreign-tokenizer"]
    assert cli.main(["evaluate", str(checkpoint), *arguments, *foreign]) == 0
    assert f"the tokenizer has {len(larger)} tokens and the model's vocabulary 260" in caplog.text
    assert cli.main(["evaluate", str(wide), *arguments]) == 0
    assert f"the tokenizer has {len(tokenizer())} tokens and the model's vocabulary 600" in caplog.text


@pytest.mark.parametrize("flag", ["--batch-size", "--max-windows"])
def test_counts_below_one_are_refused_before_any_work(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", "nobody/nothing", flag, "0"])
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert "expected an integer of at least 1, found '0'" in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compress", "m", "--output", ""], "expected a path, found nothing"),
        (["compress", "m", "--outp", "o"], "Did you mean --output?"),
        (["compress", "m", "--output", "o", "--spars", "0.3"], "unknown option --spars. Did you mean --sparsity?"),
    ],
)
def test_an_error_of_arguments_is_short(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(words)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert lines[1:] == [lines[1]]
    assert lines[1].endswith("--help")


def test_the_help_speaks_of_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["compress", "--help"])
    printed = capsys.readouterr().out
    for words in ("Default: None", "None takes", "list of strings", "object"):
        assert words not in printed


@pytest.mark.parametrize(
    "words", [["compress", "m", "--output", "o", "--report"], ["evaluate", "m", "--json"], ["inspect", "m", "--json"]]
)
def test_a_file_that_is_a_folder_is_refused_before_any_work(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    assert "sub is a folder; expected a file to write" in refusal(capsys, *words, "sub")


def next_step(words: list[str]) -> str:
    options = cli.build_parser("program").parse_args(words)
    return compress_command.next_step(options, configuration(options))


def test_the_next_step_is_ready_for_a_shell(tmp_path: Path) -> None:
    words = ["compress", "my model", "--output", "my result", "--trust-remote-code"]
    assert next_step(words) == "next: program evaluate 'my result' --reference 'my model' --trust-remote-code"


def test_the_next_step_names_another_text_than_the_calibrations(text: Path) -> None:
    words = ["compress", "m", "--output", "o", "--dataset", str(text), "--sequence-length", "32"]
    assert next_step(words) == (
        "next, on text that it was not calibrated on: program evaluate o --reference m --dataset '<your-text.txt>' "
        "--sequence-length 32"
    )


@pytest.mark.parametrize(("sparsity", "warns"), [(0.4, False), (0.45, True)])
def test_a_steep_sparsity_is_told_before_the_work(
    sparsity: float, warns: bool, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["compress", checkpoint, "--output", tmp_path / "o", "--dataset", "nowhere.txt", *FLAGS]
    assert cli.main([str(word) for word in (*arguments, "--sparsity", sparsity)]) == 2
    assert ("quality drops quickly" in caplog.text and f"recover {tmp_path / 'o'}" in caplog.text) == warns


def test_the_table_has_a_legend(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compress", checkpoint, "--output", tmp_path / "o", "--dataset", text, *FLAGS]
    assert cli.main([str(word) for word in arguments]) == 0
    assert "err: relative error of the part's fit" in capsys.readouterr().out


def test_a_path_that_leads_nowhere_is_told_whoever_reads_it(
    compressed: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, output = tmp_path / "no" / "such", tmp_path / "o"
    for words in (
        ["compress", gone, "--output", output],
        ["inspect", gone],
        ["evaluate", gone, "--dataset", text],
        ["evaluate", compressed, "--reference", gone, "--dataset", text],
        ["recover", compressed, "--teacher", gone, "--output", output, "--dataset", text],
        ["compare", gone, compressed, "--prompts", text],
        ["benchmark", compressed, "--reference", gone],
    ):
        assert refusal(capsys, *words) == (
            f"error: {str(gone)!r} does not exist, and no model on the Hub can have this name. Expected a folder "
            "with config.json and weights, or a name such as user/model.\n"
        )
    message = refusal(capsys, "evaluate", compressed, "--tokenizer", gone, "--dataset", text)
    assert f"no tokenizer could be loaded from {str(gone)!r}: {str(gone)!r} does not exist" in message
    assert list(tmp_path.iterdir()) == []


def test_a_file_for_a_folder_and_a_folder_for_a_file(
    compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = compressed / "config.json"
    expected = f"error: {str(file)!r} is a file; expected a model folder, perhaps {str(compressed)!r}.\n"
    for words in (["inspect", file], ["evaluate", file], ["compress", file, "--output", tmp_path / "o"]):
        assert refusal(capsys, *words) == expected
    message = refusal(capsys, "compress", compressed, "--output", tmp_path / "o", "--config", compressed)
    assert message == (
        f"error: --config {compressed} is a folder; expected a JSON file with fields of the configuration.\n"
    )


def test_a_folder_without_weights_is_told(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    compress_words = ["compress", bare, "--output", tmp_path / "o", "--dataset", text, *FLAGS]
    for words in (["evaluate", bare, "--dataset", text, "--max-windows", 1], compress_words):
        message = refusal(capsys, *words)
        assert message.startswith(f"error: the weights of {str(bare)!r} could not be read: ")
        assert message.endswith("or with shards and their index. Save or download the model again.\n")


def test_a_dataset_that_cannot_be_reached_names_the_flag(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    message = refusal(capsys, "compress", checkpoint, "--output", tmp_path / "o")
    start = "error: allenai/c4, subset en cannot be read: "
    assert message.startswith(start)
    assert "(--dataset FILE on the command line): a local .txt" in message


def test_evaluate_writes_the_printed_results(
    checkpoint: Path, compressed: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dataset", str(text), "--sequence-length", "32", "--max-windows", "7", "--json", str(tmp_path / "s")]
    assert cli.main(["evaluate", str(compressed), "--reference", str(checkpoint), *flags]) == 0
    found = json.loads((tmp_path / "s").read_text())
    model = AutoModelForCausalLM.from_pretrained(compressed)
    windows = evaluation_windows(str(text), tokenizer(), sequence_length=32, max_windows=7).tokens
    assert windows.flatten().tolist() == tokenizer()(text.read_text(), add_special_tokens=False).input_ids[: 7 * 32]
    assert found["perplexity"] == pytest.approx(perplexity(model, windows).perplexity)
    assert found["tokens"] == 7 * 31
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    reference = perplexity(AutoModelForCausalLM.from_pretrained(checkpoint), windows).perplexity
    assert found["reference_perplexity"] == pytest.approx(reference)
    assert found["kl"] > 0
    assert 0 <= found["top1_agreement"] <= 1
    printed = capsys.readouterr().out
    assert f"{found['perplexity']:.4f}" in printed
    assert f"{found['kl']:.4f}" in printed


def test_evaluate_without_a_reference(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    flags = ["--dataset", str(text), "--max-windows", "2", "--json", str(tmp_path / "scores")]
    assert cli.main(["evaluate", str(checkpoint), *flags]) == 0
    found = json.loads((tmp_path / "scores").read_text())
    assert found["tokens"] == 2 * 63  # the context of 64 is the default length
    assert not {"kl", "reference_perplexity"} & found.keys()


def test_evaluate_refuses_incomparable_models(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "longer than the model's context of 64" in refusal(
        capsys, "evaluate", checkpoint, "--dataset", text, "--sequence-length", 65
    )
    dense("llama-gqa-tied").save_pretrained(tmp_path / "other")
    other = tokenizer()
    other.add_tokens(["<new>"])
    other.save_pretrained(tmp_path / "other")
    message = refusal(capsys, "evaluate", checkpoint, "--reference", tmp_path / "other", "--dataset", text)
    assert "differ in 1 tokens of their vocabularies" in message
    small = save_dense(tmp_path / "short", max_position_embeddings=16)
    message = refusal(capsys, "evaluate", checkpoint, "--reference", small, "--dataset", text, "--max-windows", 1)
    assert "longer than the model's context of 16" in message


# ------------------------------------------------------------------------------------------------- inspect and estimate


def test_inspect_reads_no_weights(
    compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    assert cli.main(["inspect", str(compressed), "--json", str(tmp_path / "found")]) == 0
    found = json.loads((tmp_path / "found").read_text())
    report = Report.load(compressed / "report.json")
    assert found["sparsity"] == pytest.approx(report.achieved_sparsity)
    assert found["parameters"] == report.parameters.total_after
    printed = capsys.readouterr().out
    assert f"removed {report.achieved_sparsity:.2%} of the block projections" in printed
    assert "of the block projections (requested 30.00%)" in printed
    assert "\n  sparsity = 0.3\n" in printed
    assert printed.startswith(f"modegpt_llama, {found['parameters']:,} parameters, float32\n")
    for noise in ("None", "quant_method", "measured", "fine-tuned"):
        assert noise not in printed


def test_inspect_shows_later_training_and_measurements(
    checkpoint: Path, compressed: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, scores = shutil.copytree(compressed, tmp_path / "made"), tmp_path / "scores"
    config = json.loads((folder / "config.json").read_text())
    config["modegpt"]["recovered"] = {"dataset": "corpus", "steps": 20, "teacher": "dense"}
    (folder / "config.json").write_text(json.dumps(config))
    flags = ["--dataset", str(text), "--max-windows", "2", "--json", str(scores), "--update-card"]
    assert cli.main(["evaluate", str(folder), "--reference", str(checkpoint), *flags]) == 0
    measured = json.loads(scores.read_text())
    capsys.readouterr()
    assert cli.main(["inspect", str(folder), "--json", str(scores)]) == 0
    assert capsys.readouterr().out.endswith(
        "fine-tuned afterwards: on corpus, steps 20, teacher dense\nmeasured\n"
        f"  text.txt, 2 × 64 tokens: perplexity {measured['perplexity']:.4f} "
        f"(reference {measured['reference_perplexity']:.4f}, KL divergence {measured['kl']:.4f})\n"
    )
    assert json.loads(scores.read_text())["evaluation"]["texts"][0]["kl"] == measured["kl"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_output_embeddings().weight.data.mul_(2)
    model.save_pretrained(folder)
    capsys.readouterr()
    assert cli.main(["inspect", str(folder)]) == 0
    assert "measured" not in capsys.readouterr().out


def test_inspect_a_dense_model(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(checkpoint)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("llama, ")
    assert f"This is a dense model. To compress it: python -m optimum_modegpt compress {checkpoint}" in printed


def test_inspect_recommends_only_possible_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = XGLMConfig(num_layers=1, attention_heads=2, d_model=8, ffn_dim=8, vocab_size=260)
    XGLMForCausalLM(config).save_pretrained(tmp_path)
    assert cli.main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"cannot be compressed; known: {', '.join(DENSE_TYPES)}" in printed
    assert "To compress it" not in printed


def test_estimate_needs_no_weights(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(checkpoint / "config.json", tmp_path)
    assert cli.main(["estimate", str(tmp_path), "--json", str(tmp_path / "found"), *FLAGS]) == 0
    assert capsys.readouterr().out.startswith("ESTIMATE")
    found = json.loads((tmp_path / "found").read_text())
    assert found["calibration_tokens"] == 8 * 32
    assert found["parameters"] == sum(p.numel() for p in dense("llama-gqa-tied").parameters())


# ---------------------------------------------------------------------------------------------------------- optimum-cli


def optimum_cli(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> Any:
    """Run `optimum-cli` with these arguments and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["optimum-cli", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        optimum_main()
    return ended.value.code


def test_optimum_cli_is_the_same_command(
    compressed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    assert optimum_cli(monkeypatch, "modegpt", "inspect", compressed) == 0
    through = capsys.readouterr().out
    assert cli.main(["inspect", str(compressed)]) == 0
    assert through == capsys.readouterr().out


def test_optimum_cli_hands_on_options_and_exit_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert optimum_cli(monkeypatch, "modegpt", "--help") == 0
    assert capsys.readouterr().out.startswith("usage: optimum-cli modegpt")
    assert optimum_cli(monkeypatch, "modegpt", "compress", "--help") == 0
    assert capsys.readouterr().out.startswith("usage: optimum-cli modegpt compress")
    assert optimum_cli(monkeypatch, "modegpt", "compress", "m", "--output", tmp_path, "--sparsity", "30") == 2
    assert "write sparsity=0.3" in capsys.readouterr().err


def test_optimum_cli_help_stays_light() -> None:
    code = """
import sys
sys.argv = ["optimum-cli", "--help"]
from optimum.commands.optimum_cli import main
try:
    main()
finally:
    print(sorted({"torch", "transformers", "optimum_modegpt"} & sys.modules.keys()))
"""
    done = command("-c", code, program=(sys.executable,))
    assert "modegpt" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_registered_file_is_the_one_of_the_package() -> None:
    from optimum.commands.register import register_modegpt

    assert Path(register_modegpt.__file__).read_text() == Path(cli_register.__file__).read_text(), (
        "the installed copy is older than the package's: install the package again"
    )


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("program", [cli.PROGRAM, "optimum-cli modegpt"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compress", "demo", "--foo"], "unknown option --foo."),
        (["compress", "demo", "--output", "o", "--foo"], "unknown option --foo."),
        (["compress", "demo", "--ouput", "o"], "unknown option --ouput. Did you mean --output?"),
        (
            ["compress", "demo", "--output", "o", "--sparcity=0.2"],
            "unknown option --sparcity. Did you mean --sparsity?",
        ),
        (["compress", "demo", "-output", "o"], "unknown option -output. Did you mean --output?"),
        (["inspect", "demo", "more"], "unexpected argument: more"),
        (["evaluate", "demo", "--", "--more"], "unexpected argument: --more"),
        (["compress", "demo"], "the following arguments are required: --output"),
    ],
)
def test_a_mistake_names_the_help_of_its_command(
    words: list[str], message: str, program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words, program=program)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\nsee {program} {words[0]} --help\n"


def test_a_value_may_look_like_a_negative_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert "found -1.0" in refusal(capsys, "compress", "m", "--output", "o", "--sparsity", "-1")


# ------------------------------------------------------------------------------------ characters that cannot be printed

ENCODINGS = pytest.mark.parametrize("encoding", ["ascii", "cp1252"])


def printing(encoding: str, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> tuple[int, str, str]:
    """Run a command on a terminal of this encoding, and return its exit code, output and errors."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    with monkeypatch.context() as patch:
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        code = cli.main([str(argument) for argument in arguments])
    for stream in streams.values():
        stream.flush()
    out, errors = (stream.buffer.getvalue().decode(encoding) for stream in streams.values())  # pyright: ignore
    return code, out, errors


@ENCODINGS
def test_a_path_that_cannot_be_printed_is_escaped(
    encoding: str, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, page = tmp_path / "出力", tmp_path / "頁.html"
    code, out, _ = printing(
        encoding, monkeypatch, "compress", checkpoint, "--output", output, "--dataset", text, *FLAGS
    )
    assert code == 0
    assert f"saved in {tmp_path}/\\u51fa\\u529b\n" in out
    assert (output / "report.json").is_file()
    for words in (["inspect", output], ["evaluate", output, "--dataset", text, "--max-windows", 2]):
        assert printing(encoding, monkeypatch, *words)[0] == 0
    prompts = tmp_path / "入力.txt"
    prompts.write_text("A river\n", encoding="utf-8")
    words = ["compare", checkpoint, output, "--prompts", prompts, "--max-new-tokens", 2, "--html", page]
    code, out, _ = printing(encoding, monkeypatch, *words)
    assert (code, page.is_file()) == (0, True)
    assert "\\u9801.html" in out
    code, _, errors = printing(encoding, monkeypatch, "inspect", tmp_path / "無い")
    assert code == 2
    assert "\\u7121\\u3044' does not exist" in errors


@ENCODINGS
def test_help_is_printed_in_every_encoding(encoding: str) -> None:
    for name in ("benchmark", "compare", "compress"):
        done = subprocess.run(
            [sys.executable, "-m", "optimum_modegpt", name, "--help"],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": encoding},
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b"")


@ENCODINGS
def test_warnings_and_progress_bars_are_printed_in_every_encoding(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(options: Any) -> None:
        print("出")
        print("力", file=sys.stderr)
        logging.StreamHandler().emit(logging.makeLogRecord({"msg": "警告"}))
        for _ in tqdm([0], desc="進行"):
            pass

    monkeypatch.setattr(inspect_command, "run", run)
    code, out, errors = printing(encoding, monkeypatch, "inspect", "demo")
    assert (code, out) == (0, "\\u51fa\n")
    assert "\\u529b\n\\u8b66\\u544a\n" in errors
    assert "\\u9032\\u884c" in errors


# ----------------------------------------------------------------------------------------------------------------- demo


def test_demo_does_the_whole_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert cli.main(["demo", "--output", str(output), "--method", "paper"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"The compressed model was saved in {output}."
    assert "top-1 agreement" in printed
    [samples] = re.findall(r"--- dense:(.*)\n\n--- compressed:(.*)\n\n4. verdict", printed, re.DOTALL)
    assert min(len(text.split()) for text in samples) > 20
    verdict = printed.partition("4. verdict\n")[2].splitlines()[:3]
    starts = ("size: 606,240 -> ", "speed: reads a prompt ", "quality: perplexity 1.74 -> ")
    assert all(line.startswith(start) for line, start in zip(verdict, starts, strict=True))
    assert "compress MODEL --sparsity 0.2 --output DIR" in printed
    headings = ("1. compress the", "2. reload and evaluate", "3. generate 120 tokens", "4. verdict")
    assert [line for line in printed.splitlines() if line.startswith(headings)] == [
        next(line for line in printed.splitlines() if line.startswith(heading)) for heading in headings
    ]
    assert "err: relative error" in printed
    assert whole_sentences('"Go," said Mr. Oak. Then old Mr. Ash') == '"Go," said Mr. Oak.'
    assert whole_sentences("no end") == "no end"
    record = json.loads((output / "config.json").read_text())["modegpt"]
    assert record["base_model"] == record["recipe"]["dataset"] == record["calibration"]["name"] == "demo"
    assert str(demo.MODEL_DIR) not in (output / "config.json").read_text()
    assert cli.main(["evaluate", str(output), "--max-windows", "2", "--json", str(tmp_path / "scores")]) == 0
    assert json.loads((tmp_path / "scores").read_text())["text"]["name"] == demo.EVALUATION_TEXT.name


def test_a_reader_that_has_had_enough_is_no_error(checkpoint: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m optimum_modegpt inspect {shlex.quote(str(checkpoint))} | true"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
