"""Run the code of the README and its guides, and compare their figures with the result files and the cards."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hub import serving
from huggingface_hub import ModelCard
from tiny_models import dense, tokenizer
from transformers import AutoModelForCausalLM
from transformers.exporters import base as exporters

from optimum_modegpt.cli import main as cli
from optimum_modegpt.export.formats import FORMATS
from optimum_modegpt.hub.card import write_card
from optimum_modegpt.recovery.config import RecoveryConfig

ROOT = Path(__file__).parents[2]
CARDS = sorted((ROOT / "model_cards").iterdir())
CARD_SPARSITY = 0.3
GUIDES = ROOT / ".github" / "docs"
FILES = (ROOT / "README.md", *sorted(GUIDES.glob("*.md")))
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in FILES}
README, RESULTS, RECOVERING = PAGES["README"], PAGES["results"], PAGES["recovering"]
MOST_WORDS = 1200


@dataclass(frozen=True)
class CodeBlock:
    """A code block of a page, found by the heading above it."""

    page: str
    heading: str
    language: str
    text: str


def code_blocks(page: str) -> Iterator[CodeBlock]:
    """Yield the code blocks of a page, from top to bottom."""
    heading, language, lines = "", None, []
    for line in PAGES[page].splitlines():
        if language is not None:
            if line == "```":
                yield CodeBlock(page, heading, language, "\n".join(lines) + "\n")
                language, lines = None, []
            else:
                lines.append(line)
        elif line.startswith("```"):
            language = line.removeprefix("```")
        elif line.startswith("#"):
            heading = line.lstrip("# ")
    assert language is None, f"{page}: a code block has no end"


BLOCKS = [block for page in PAGES for block in code_blocks(page)]
PYTHON = {
    "sparsity": ("README", "Use it in Python"),
    "quantizer": ("python", "Compress a loaded model"),
    "checkpoint": ("large-models", "Resume"),
    "canary": ("canary", "Canary"),
    "onnx": ("exporting", "Run an ONNX model"),
    "executorch": ("exporting", "Run an ExecuTorch model"),
}
"""Names of the Python blocks, with page and heading."""
LINKING = (*FILES, *sorted((ROOT / ".github").glob("*.md")))


def shell_commands(start: str = "") -> list[str]:
    """Return the shell commands that start with `start`, README first, with continued lines joined."""
    lines = [line for one in BLOCKS if one.language == "bash" for line in one.text.replace("\\\n", "").splitlines()]
    return [line for line in lines if line.startswith(start)]


HUB_NAME, SMALL_NAME = "Qwen/Qwen2.5-1.5B", "HuggingFaceTB/SmolLM2-135M-Instruct"
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
"""
PROGRAMS = ("onnx", "executorch")
EXPORTED = [
    name
    for name in PROGRAMS
    if hasattr(exporters, "ExportedModel") and all(find_spec(package) for package in FORMATS[name].packages)
]
"""Those of `PROGRAMS` that transformers can save, and whose packages are installed."""
ROWS = re.findall(r"^\| (\S+) +\| (\d+) % \| (.+?) \|$", RESULTS.partition("<!-- results -->")[2], re.MULTILINE)

RECOVERED = re.findall(
    r"^\| (\w+)(?:, `--steps (\d+)`)? \| (\d+) % \| (.+?) \|$",
    RECOVERING.partition("<!-- recovered -->")[2].partition("\n\n")[0],
    re.MULTILINE,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Save a tiny model and a text, which replace the model and the dataset that the README names."""
    model = dense("llama-gqa-tied")
    model.save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("A short text about a long river. " * 400, encoding="utf-8")
    (tmp_path / "other.txt").write_text("Small boats sail home before the storm. " * 400, encoding="utf-8")
    return tmp_path


def test_the_python_runs_as_printed(folder: Path) -> None:
    first, second, resumable, third = map(python, ("sparsity", "quantizer", "checkpoint", "canary"))
    data = f'dataset="{folder}/text.txt", num_samples=8, sequence_length=32'
    first, resumable = (
        block.replace(HUB_NAME, str(folder / "dense")).replace("sparsity=0.3", f"sparsity=0.3, {data}")
        for block in (first, resumable)
    )
    second = second.replace('dataset="my_text.txt"', data)
    assert data in first
    assert data in second
    assert data in resumable
    loading = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model, reference = (AutoModelForCausalLM.from_pretrained({str(folder / 'dense')!r}) for _ in range(2))\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(folder / 'dense')!r})\n"
    )
    with serving() as hub:
        result = run(
            [sys.executable, "-c", first + loading + second + resumable + loading + third],
            folder,
            hub.environment(folder / "home"),
        )
        assert (
            "modegpt" in ModelCard(hub.repos["user/qwen-modegpt-30"].files("main")["README.md"].data.decode()).data.tags
        )
    assert "removed" in result.stdout
    assert "requests: 1 served, 1 compared" in result.stdout
    assert (folder / "qwen-modegpt-30" / "config.json").is_file()
    assert (folder / "small" / "report.json").is_file()
    assert (folder / "qwen-small" / "report.json").is_file()
    assert not (folder / "qwen-unfinished").exists()


def test_the_shell_commands_run_as_printed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "prompts.txt").write_text("The river\nA long text\n", encoding="utf-8")
    (folder / "task.jsonl").write_text('{"text": "The", "choices": [" river", " text"], "answer": 0}\n' * 4)
    for name in ("arc_easy", "hellaswag"):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=folder / "task.jsonl"))
    text = f"--dataset {folder}/text.txt --sequence-length 32"
    extra = {
        "compress": f"{text} --num-samples 8",
        "evaluate": f"{text} --max-windows 8",
        "benchmark": "--batch-sizes 1 --prompt-lengths 8 --new-tokens 2 --repeats 1",
        "compare": "--max-new-tokens 4 --max-kl 100",
        "recover": f"--dataset {folder}/other.txt --sequence-length 32 --num-samples 40 --steps 20",
    }
    for command in shell_commands("optimum-cli modegpt "):
        for name in (HUB_NAME, SMALL_NAME):
            command = command.replace(name, str(folder / "dense"))
        _, _, verb, *words = command.replace("--max-kl 0.2", "").split()
        if any(name in words for name in PROGRAMS if name not in EXPORTED):
            continue
        words = ["40kB" if word == "1GB" else word for word in words]  # the tiny model is smaller
        tasks = ["--include-path", str(folder)] * ("--tasks" in words)
        assert cli.main([verb, *words, *tasks, *extra.get(verb, "").split()]) == 0, command
    names = {path.name for path in folder.iterdir()}
    assert {"qwen-small", "qwen-recovered", "compare.html"} <= names
    assert {"report.json", "evaluation.json", "README.md"} <= {path.name for path in (folder / "qwen-small").iterdir()}
    for name in EXPORTED:
        result = run([sys.executable, "-I", "-c", python(name)], folder, dict(os.environ))
        small = AutoModelForCausalLM.from_pretrained(folder / "qwen-small")
        small.generation_config.eos_token_id = None
        ids = tokenizer()("The river", return_tensors="pt")
        text = small.generate(**ids, do_sample=False, max_new_tokens=20)
        assert result.stdout.splitlines() == tokenizer().decode(text[0], skip_special_tokens=True).splitlines()


def test_every_python_block_is_run() -> None:
    assert {(one.page, one.heading) for one in BLOCKS if one.language == "python"} == set(PYTHON.values())
    for name in PYTHON:
        assert python(name)


def test_every_shell_block_is_checked() -> None:
    commands = shell_commands()
    families = "python .github/families_table.py"
    vllm = "TORCH_COMPILE_DISABLE=1 python -m vllm."
    engines = ("llama-quantize ", "vllm serve ", vllm, "sglang serve ", "python -m pytest ")  # not run by the tests
    checked = ("optimum-cli modegpt ", "pip install ", "python tests/benchmarks/", "torchrun ", families, *engines)
    assert [one for one in commands if not one.startswith(checked)] == []
    assert {one.language for one in BLOCKS} == {"python", "bash"}


def test_the_processes_run_a_command_of_the_readme() -> None:
    (command,) = shell_commands("torchrun ")
    assert command.partition(" -m optimum_modegpt ")[2] in [
        one.removeprefix("optimum-cli modegpt ") for one in shell_commands("optimum-cli modegpt ")
    ]


@pytest.mark.parametrize("command", shell_commands("python tests/benchmarks/"))
def test_the_benchmarks_have_the_flags_shown(command: str) -> None:
    script = command.split()[1]
    source = (ROOT / script).read_text(encoding="utf-8")
    for flag in re.findall(r" (--[\w-]+)", command):
        assert f'"{flag}"' in source, (script, flag)


def test_the_extras_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = {one for page in PAGES.values() for one in re.findall(r"optimum-modegpt\[(\w+)\]", page)}
    assert extras
    assert all(f"\n{extra} = [" in project for extra in extras)


@pytest.mark.parametrize("path", LINKING, ids=lambda path: path.name)
def test_the_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", path.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, target


def test_the_readme_links_to_every_guide() -> None:
    assert all(f"(.github/docs/{path.name})" in README for path in GUIDES.glob("*.md"))


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= MOST_WORDS


def test_the_picture_is_drawn_from_the_results(tmp_path: Path) -> None:
    picture = pytest.importorskip("picture")
    figure = picture.draw(read(ROOT / "tests" / "benchmarks" / "results" / "quality.json"))
    figure.savefig(tmp_path / "picture.png")
    assert {panel.get_title() for panel in figure.axes} == {name for name, _, _ in ROWS}
    for panel in figure.axes:
        shown = {line.get_label(): list(line.get_ydata()) for line in panel.lines}
        cells = expected_cells(panel.get_title(), 0.3)
        assert [f"{values[3]:.2f}" for values in shown.values()] == [cells[6], cells[3], cells[4]]
    assert (GUIDES / "quality.png").is_file()


def test_the_readme_has_the_two_commands() -> None:
    named = re.findall(r"<!-- command: (\w+) -->\n```bash\n(.*?)```", README, re.DOTALL)
    assert [name for name, _ in named] == ["demo", "test"]


def test_the_results_are_those_of_the_files() -> None:
    assert ROWS
    for name, percent, cells in ROWS:
        shown = [cell.strip(" *") for cell in cells.split("|")]
        assert shown == expected_cells(name, int(percent) / 100), (name, percent)


def test_the_summary_is_that_of_the_files() -> None:
    rows = table_after("summary", README)
    assert {name for name, *_ in rows} == {folder.name for folder in CARDS}
    for name, *cells in rows:
        expected = expected_cells(name, CARD_SPARSITY)
        assert [cell.strip("*") for cell in cells] == [expected[place] for place in (0, 3, 4, 6)]


def test_the_real_model_is_that_of_the_scoreboard() -> None:
    """The README has the rows with tasks, and the page of results those without."""
    with_tasks, without = [], []
    for row in read(ROOT / "tests" / "benchmarks" / "results" / "scoreboard.json")["rows"]:
        accuracies = [answers.count("1") / len(answers) for answers in row.get("tasks", {}).values()]
        cells = [row["recipe"], *(f"{perplexity:.2f}" for perplexity in row["texts"].values())]
        if accuracies:
            with_tasks.append([*cells, f"{statistics.fmean(accuracies):.3f}"])
        else:
            without.append([f"{row['sparsity']:.0%}".replace("%", " %"), *cells])
    assert table_after("scoreboard", README) == with_tasks
    assert table_after("scoreboard", RESULTS) == sorted(without)


def test_the_recoveries_are_those_of_the_files() -> None:
    rows = {}
    for folder in CARDS:
        for row in read(folder / "recovered.json") if (folder / "recovered.json").is_file() else []:
            figures = row["dense_perplexity"], row["compressed"]["perplexity"], row["recovered"]["perplexity"]
            rows[folder.name, f"{row['sparsity']:.0%}"] = row["recovery"]["steps"], [f"{one:.3f}" for one in figures]
    assert rows
    default = RecoveryConfig().steps
    assert rows == {
        (name, f"{percent}%"): (int(steps or default), [cell.strip(" *") for cell in cells.split("|")])
        for name, steps, percent, cells in RECOVERED
    }


def test_ratios_and_allocations_are_those_of_the_file() -> None:
    data = read(ROOT / "tests" / "benchmarks" / "results" / "quality.json")
    found = {(row["model"], row["sparsity"], row["recipe"]): row["perplexity"] for row in data["rows"]}

    def published(name: str, ratio: float) -> float:
        return min(v for (m, s, recipe), v in found.items() if (m, s) == (name, ratio) and recipe.startswith("paper"))

    for name, dense_perplexity, method, *shown in table_after("ratios", RESULTS):
        values = [
            found[name, ratio, "default"] if method == "default" else published(name, ratio)
            for ratio in (0.1, 0.2, 0.3, 0.4, 0.5)
        ]
        assert [dense_perplexity, *shown] == [f"{value:.2f}" for value in (data["dense"][name], *values)]
    for name, *shown in table_after("allocations", RESULTS):
        recipes = ("default uniform", "default influence", "default")
        assert shown == [f"{found[name, 0.3, recipe]:.2f}" for recipe in recipes]


def test_the_speeds_are_those_of_the_file() -> None:
    results = read(ROOT / "tests" / "benchmarks" / "results" / "speed.json")["results"]
    for shown, result in zip(table_after("speed", PAGES["speed"]), results, strict=True):
        cells = [f"{result['sparsity'] * 100:.0f} %", f"{result['weights_ratio']:.2f}"]
        for run in ("prefill", "decode"):
            ratios = [row[f"{run}_ratio"]["median"] for row in result["rows"]]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        assert shown == cells


def test_every_model_of_the_table_has_a_card() -> None:
    assert {name for name, _, _ in ROWS} == {folder.name for folder in CARDS}


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_a_card_is_written_from_the_files_in_its_folder(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "card"))
    (copy / "README.md").unlink()
    assert write_card(copy).read_bytes() == (folder / "README.md").read_bytes()


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_card_results_and_readme_agree(folder: Path) -> None:
    shown = {(name, percent): cells.split(" | ") for name, percent, cells in ROWS}
    cells = [cell.strip(" *") for cell in shown[folder.name, f"{CARD_SPARSITY:.0%}".rstrip("%")]]
    results = read(folder / "results.json")
    (row,) = (r for r in results["results"] if (r["recipe"], r["sparsity"]) == ("default", CARD_SPARSITY))
    card: Any = ModelCard.load(folder / "README.md")
    (measured,) = card.data.eval_results
    dense_perplexity, perplexity = cells[0], cells[-2]
    assert f"{measured.metric_value:.2f}" == f"{row['perplexity']:.2f}" == perplexity
    assert f"| **{perplexity}** | {dense_perplexity} |" in card.text
    assert f"perplexity {dense_perplexity} → {perplexity} on" in card.text
    assert (measured.dataset_name, measured.dataset_args["windows"]) == (results["evaluation"], results["max_windows"])
    report = read(folder / "report.json")
    assert report["requested_sparsity"] == row["sparsity"]
    assert report["achieved_sparsity"] == pytest.approx(row["removed"])
    assert report["calibration"]["sha256"] == row["calibration"]["sha256"]
    assert report["config"]["round_to"] == results["round_to"]


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_cards_tell_nothing_of_the_machine_they_were_made_on(folder: Path) -> None:
    for path in folder.iterdir():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        assert not re.search(r"""(^|[\s"'`=(,])(/|~/|[A-Z]:\\)(home|root|tmp|work|opt|usr|mnt|Users)\b""", text), path


def python(name: str) -> str:
    """Return the text of a Python block by its name in PYTHON."""
    page, heading = PYTHON[name]
    (found,) = (one for one in BLOCKS if (one.page, one.heading, one.language) == (page, heading, "python"))
    return found.text


def table_after(mark: str, page: str) -> list[list[str]]:
    """Return the rows of the table after a comment, cell by cell."""
    table = page.partition(f"<!-- {mark} -->\n")[2].partition("\n\n")[0].splitlines()[2:]
    assert table
    return [line.strip("| ").split(" | ") for line in table]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def expected_cells(name: str, sparsity: float) -> list[str]:
    """Return the numbers of a README row from the result file, formatted as in the README."""
    data = read(ROOT / "model_cards" / name / "results.json")
    found = {row["recipe"]: row["perplexity"] for row in data["results"] if row["sparsity"] == sparsity}
    published = min(value for recipe, value in found.items() if recipe.startswith("paper"))
    columns = [found["paper ε 0.05"], found["paper ε 0.1"], published, found["MLP only"], found["default, no refit"]]
    dense_perplexity = data["dense_perplexity"]
    share = math.log(found["default"] / dense_perplexity) / math.log(published / dense_perplexity)
    return [f"{value:.2f}" for value in (dense_perplexity, *columns, found["default"], share)]


def run(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder`, and check that it succeeds."""
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result
