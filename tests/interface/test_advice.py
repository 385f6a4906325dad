"""Test that advised commands are complete, quoted, and without secrets."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from checkpoints import RECIPE, save_dense, save_text

from optimum_modegpt import check_servable
from optimum_modegpt.cli import main as cli
from optimum_modegpt.cli.commands import compress as compress_command
from optimum_modegpt.cli.commands import recover as recover_command
from optimum_modegpt.cli.commands.common import configuration, reference_of
from optimum_modegpt.loading.source import Source

FLAGS = [part for key, value in RECIPE.items() for part in (f"--{key.replace('_', '-')}", str(value))]
READ = ["--revision", "v1", "--token", "hf_secret", "--trust-remote-code", "--device", "cpu", "--dtype", "float32"]
SAME = ["--device", "cpu", "--dtype", "float32", "--token", "<your-token>", "--trust-remote-code"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("dense"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["compress", "m", "--output", "o", "--tokenizer", "words", "--sequence-length", "32"],
            *["evaluate o --reference m --reference-revision v1 --tokenizer words --sequence-length 32"],
        ),
        (
            ["compress", "m", "--output", "o", "--tokenizer", "words", "--allow-foreign-tokenizer"],
            *["evaluate o --reference m --reference-revision v1 --tokenizer words --allow-foreign-tokenizer"],
        ),
        (
            ["recover", "m", "--output", "o", "--teacher", "d", "--teacher-revision", "v2", "--dataset", "corpus"],
            *["evaluate o --reference d --reference-revision v2 --dataset corpus"],
        ),
        (
            ["recover", "m", "--output", "o", "--dataset", __file__, "--text-column", "words"],
            *["evaluate o --dataset '<your-text.txt>'"],
        ),
    ],
)
def test_the_next_step_reads_the_models_as_this_run_did(words: list[str], expected: str) -> None:
    parser = cli.build_parser("program")
    options = parser.parse_args([*words, *READ])
    if options.command == "compress":
        step = compress_command.next_step(options, configuration(options))
    else:
        step = recover_command.next_step(options)
    assert "hf_secret" not in step
    _, *advised = shlex.split(step.partition(": ")[2])
    assert advised == [*shlex.split(expected), *SAME]
    options = parser.parse_args(advised)
    assert options.reference_revision == (reference_of(options) or Source(None)).hub.get("revision")


def test_the_next_step_runs_as_printed(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, text = tmp_path / "small model", save_text(tmp_path / "text.txt")
    assert cli.main(["compress", str(checkpoint), "--output", str(output), "--dataset", str(text), *FLAGS]) == 0
    lines = capsys.readouterr().out.splitlines()
    step = next(line for line in lines if line.startswith("next")).partition(": ")[2]
    words = shlex.split(step.replace("<your-text.txt>", str(text)))[3:]
    assert cli.main(words) == 0
    assert "perplexity" in capsys.readouterr().out
    assert lines[-1] == f"to run it with vLLM: vllm serve {shlex.quote(str(output))}"
    command = next(each.command for each in check_servable(output) if each.engine == "transformers")
    names: dict[str, Any] = {}
    exec(str(command), names)
    assert names["model"].config.model_type == "modegpt_llama"


def test_a_revision_of_no_reference_is_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(checkpoint), "--reference-revision", "v1"]) == cli.FAILED
    assert "found a revision of the dense model, 'v1', but no dense model" in capsys.readouterr().err
