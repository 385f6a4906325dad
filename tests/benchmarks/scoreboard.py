"""Compress one real model with several recipes and sparsities, and compare every result with the dense model.

python tests/benchmarks/scoreboard.py --model DIR --texts DIR --tasks DIR [--sparsity 0.2 0.3] [--recipe NAME …]
python tests/benchmarks/scoreboard.py --model DIR --texts DIR --tasks DIR --compressed DIR …
python tests/benchmarks/scoreboard.py --table

A cell is one recipe at one sparsity. Its row has perplexities, zero-shot answers, greedy agreement, size, speed and the
time of the compression by stage. Rows are saved after every cell, and are not measured again if the model, the
calibration text, the settings and the code are the same. Sensitivities and influences do not depend on the sparsity,
so they are measured once. The rows that use them again include their time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import zero_shot
from machine import code, digest
from quality import MAIN, MLP_ONLY, RATIOS, RECIPES, Curves, measurement, plan_of
from rows import find, read, write
from scoreboard_table import DENSE, tables
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from optimum_modegpt import ModeGPTConfig, Report, benchmark, compare, perplexity
from optimum_modegpt.calibration.data import TokenWindows, calibration_windows, evaluation_windows
from optimum_modegpt.compress import compress
from optimum_modegpt.loading.calibration import context_of
from optimum_modegpt.modeling.modegpt_family import parts_among
from optimum_modegpt.report import count_parameters
from optimum_modegpt.stages import compute_device

RESULTS = Path(__file__).parent / "results" / "scoreboard.json"
TEXTS = ("wikitext2_test.txt", "c4_eval.jsonl", "tinystories_eval.txt")
TASKS = ("piqa", "arc_easy", "winogrande", "hellaswag")
MEASURES = ("texts", "tasks", "greedy", "speed")
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 2, 32, 64
"""Prompts of each text for the greedy agreement, their length, and the length of the continuations."""
SPEED = {"batch_sizes": [1], "prompt_lengths": [128], "new_tokens": 16, "repeats": 3}
ALLOCATE = "allocate"
"""First word of the name of the stage that measures sensitivities or influences."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    record = read(options.json)
    if not options.table:
        disable_progress_bar()
        measure_all(Subject(options), record)
    print("\n\n".join(tables(record["rows"])))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="DIR", help="the dense model")
    parser.add_argument("--texts", type=Path, metavar="DIR", help="folder with the texts")
    parser.add_argument("--tasks", type=Path, metavar="DIR", help="folder with the zero-shot tasks")
    parser.add_argument("--sparsity", type=float, nargs="+", default=RATIOS, help="fractions to remove")
    recipes = (*MAIN, MLP_ONLY)
    parser.add_argument(
        "--recipe", nargs="+", default=recipes, choices=RECIPES, metavar="NAME", help=", ".join(RECIPES)
    )
    parser.add_argument("--compressed", type=Path, nargs="+", metavar="DIR", help="measure saved models instead")
    parser.add_argument(
        "--calibration", nargs="+", default=["wikitext2_valid.txt"], metavar="FILE", help="mixed equally"
    )
    parser.add_argument("--num-samples", type=int, default=64, help="calibration windows of all files together")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens per window of every text")
    parser.add_argument("--evaluation", nargs="+", default=TEXTS, metavar="FILE", help="texts for perplexity")
    parser.add_argument("--max-windows", type=int, nargs="+", default=[48], help="of each text, or of all")
    parser.add_argument("--task", nargs="+", default=TASKS, metavar="NAME", help="names of files without suffix")
    parser.add_argument("--limit", type=int, help="questions per task (default: all)")
    parser.add_argument("--measure", nargs="+", default=MEASURES, choices=MEASURES, help="parts of a row")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="for the results (%(default)s)")
    parser.add_argument("--table", action="store_true", help="only print the saved results")
    options = parser.parse_args(arguments)
    if not options.table and None in (options.model, options.texts, options.tasks):
        parser.error("--model, --texts and --tasks are required without --table")
    if len(options.max_windows) not in (1, len(options.evaluation)):
        parser.error(f"--max-windows: expected 1 or {len(options.evaluation)} numbers, found {options.max_windows}")
    return options


def measure_all(subject: Subject, record: dict[str, Any]) -> None:
    """Measure the dense model and every cell that has no row yet, and save after each."""
    file, cell = subject.options.json, subject.cell(DENSE)
    if find(record, cell) is None:
        save(file, record, cell, subject.measured(subject.dense))
    if subject.options.compressed:
        for folder in subject.options.compressed:
            cell = subject.saved_cell(folder)
            if find(record, cell) is None:
                save(file, record, cell, subject.saved(folder))
        return
    for sparsity in subject.options.sparsity:
        for recipe in subject.options.recipe:
            cell = subject.cell(recipe, sparsity)
            if find(record, cell) is None:
                save(file, record, cell, subject.compressed(cell, record))


def save(file: Path, record: dict[str, Any], cell: dict[str, Any], found: dict[str, Any]) -> None:
    """Save the row of a cell. It replaces rows that differ only in their code."""
    same = {key: value for key, value in cell.items() if key != "code"}
    while (old := find(record, same)) is not None:
        record["rows"].remove(old)
    record["rows"].append(cell | found)
    write(file, record)
    print(f"saved: {cell['recipe']}, {cell['sparsity']:.0%} removed", flush=True)


@dataclass
class Subject:
    """Load the dense model, the texts and the questions when they are first needed."""

    options: argparse.Namespace

    @cached_property
    def device(self) -> torch.device:
        return compute_device(None, torch.device("cpu"))

    @cached_property
    def dense(self) -> Any:
        return self.load(self.options.model)

    def load(self, folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(self.device)

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.options.model)

    @cached_property
    def context(self) -> int | None:
        return context_of(self.dense.config)

    @cached_property
    def length(self) -> int:
        return min(self.options.sequence_length, self.context or self.options.sequence_length)

    @cached_property
    def calibration(self) -> TokenWindows:
        """Windows of all calibration files, in equal numbers and alternating, as a user's mixture has them."""
        files = [str(self.options.texts / file) for file in self.options.calibration]
        config = ModeGPTConfig(dataset=files, num_samples=self.options.num_samples)
        return calibration_windows(config, self.tokenizer, sequence_length=self.length)

    @cached_property
    def texts(self) -> dict[str, TokenWindows]:
        files, numbers = self.options.evaluation, self.options.max_windows
        found = {}
        for file, number in zip(files, numbers * (len(files) // len(numbers)), strict=True):
            path = str(self.options.texts / file)
            windows = evaluation_windows(path, self.tokenizer, sequence_length=self.length, max_windows=number)
            found[Path(file).stem] = windows
        return found

    @cached_property
    def tasks(self) -> dict[str, list[zero_shot.Question]]:
        found = {}
        for name in self.options.task:
            file = self.options.tasks / f"{name}.jsonl"
            found[name] = zero_shot.read_questions(file, self.tokenizer, self.context, self.options.limit)
        return found

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Return everything that a measurement depends on but the model."""
        found: dict[str, Any] = {"code": code("evaluation", "comparison")}
        if "texts" in self.options.measure or "greedy" in self.options.measure:
            found["texts"] = {name: windows.record["sha256"][:12] for name, windows in self.texts.items()}
        if "tasks" in self.options.measure:
            scorer = Path(zero_shot.__file__).read_bytes()
            found["tasks"] = {name: digest(scorer, repr(asked).encode()) for name, asked in self.tasks.items()}
        if "greedy" in self.options.measure:
            found["greedy"] = [PROMPTS, PROMPT_TOKENS, NEW_TOKENS]
        if "speed" in self.options.measure:
            found["speed"] = SPEED
        return found

    def cell(self, recipe: str, sparsity: float = 0.0) -> dict[str, Any]:
        """Return the fields that identify a row."""
        cell = {
            "model": self.options.model.name,
            "weights": weights_of(self.options.model),
            "recipe": recipe,
            "sparsity": sparsity,
            "calibration": None,
            "code": None,
            "settings": self.settings,
        }
        if recipe == DENSE:
            return cell
        return cell | {"calibration": about(self.calibration.record), "code": code()}

    def saved_cell(self, folder: Path) -> dict[str, Any]:
        """Return the fields that identify the row of a saved model."""
        record = AutoConfig.from_pretrained(folder).modegpt
        known = {"calibration": about(record["calibration"]), "code": weights_of(folder)}
        return self.cell(DENSE) | {"recipe": folder.name, "sparsity": record["recipe"]["sparsity"]} | known

    def saved(self, folder: Path) -> dict[str, Any]:
        """Measure a saved model. The time of its compression comes from its report."""
        report = Report.load(folder / "report.json")
        return self.measured(self.load(folder)) | described(report)

    def compressed(self, cell: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
        """Compress the dense model and measure the result."""
        model = self.load(self.options.model)
        recipe, samples = cell["recipe"], len(self.calibration.tokens)
        config = ModeGPTConfig(sparsity=cell["sparsity"], num_samples=samples, sequence_length=self.length)
        config = replace(config, **RECIPES[recipe])
        source = measuring_row(record, cell, measurement(config))
        curves = {}
        if source is not None:
            curves[measurement(config)] = Curves(**source["curves"])
        plan = plan_of(recipe, model, config, curves)
        report = compress(model, config, self.calibration, plan=plan, progress=False)
        found = self.measured(model) | described(report)
        if plan is None:
            curves = Curves(report.sensitivities, report.influences)
            return found | {"allocation": measurement(config), "curves": asdict(curves)}
        if source is not None and recipe != MLP_ONLY:
            found["stages"] = [stage for stage in source["stages"] if is_allocation(stage)] + found["stages"]
        return found

    def measured(self, model: Any) -> dict[str, Any]:
        """Return the requested parts of a row. Agreement and speed are relative to the dense model."""
        wanted = self.options.measure
        found: dict[str, Any] = {"parameters": count_parameters(model), "bytes": model.get_memory_footprint()}
        if "texts" in wanted:
            texts = self.texts.items()
            found["texts"] = {name: perplexity(model, windows.tokens).perplexity for name, windows in texts}
        if "tasks" in wanted:
            found["tasks"] = {}
            for name, questions in self.tasks.items():
                right = zero_shot.right_answers(model, questions)
                found["tasks"][name] = "".join(str(int(each)) for each in right)
        if model is self.dense:
            return found
        if "greedy" in wanted:
            found["greedy"] = self.agreement(model)
        if "speed" in wanted:
            (row,) = benchmark(model, self.dense, **SPEED).rows
            assert row.prefill_ratio is not None
            assert row.decode_ratio is not None
            found["speed"] = {"prefill": asdict(row.prefill_ratio), "decode": asdict(row.decode_ratio)}
        return found

    def agreement(self, model: Any) -> dict[str, float]:
        """Compare greedy continuations of the first words of windows with those of the dense model.

        `same` is the mean share of tokens before the first difference. `top1` is the share of positions in prompts and
        dense continuations at which both models have the same most likely token.
        """
        prompts = []
        for windows in self.texts.values():
            for window in windows.tokens[:PROMPTS, :PROMPT_TOKENS]:
                prompts.append(self.tokenizer.decode(window, skip_special_tokens=True))
        found = compare(model, self.dense, self.tokenizer, prompts, max_new_tokens=NEW_TOKENS)
        same = 0.0
        for each in found.records:
            same += (
                1.0
                if each.parting_token is None
                else each.parting_token / max(each.model.tokens, each.reference.tokens)
            )
        return {"prompts": len(prompts), "same": same / len(prompts), "top1": found.top1_agreement, "kl": found.kl}


def weights_of(folder: Path) -> str:
    """Return a digest of the weights in a folder."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no safetensors files; expected the folder of a saved model.")
    return digest(*(file.read_bytes() for file in files))


def about(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the calibration's record that identify it."""
    return {key: record[key] for key in ("name", "windows", "sequence_length")} | {"sha256": record["sha256"][:12]}


def described(report: Report) -> dict[str, Any]:
    """Return the sparsity, the widths by part, and the seconds by stage with their floor."""
    widths = {}
    for part in parts_among(block.parts for block in report.blocks):
        found = (block.parts.get(part) for block in report.blocks)
        widths[part] = [0 if each is None else each.rank for each in found]
    stages = []
    for stage in report.stages:
        floor = {step: round(seconds, 2) for step, seconds in stage.floor.items()}
        stages.append({"name": stage.name, "seconds": round(stage.seconds, 2), "floor": floor})
    return {"removed": report.achieved_sparsity, "widths": widths, "stages": stages}


def measuring_row(record: dict[str, Any], cell: dict[str, Any], measured: str) -> dict[str, Any] | None:
    """Return the row that measured the sensitivities or influences with the same code and calibration, or None."""
    same = {key: cell[key] for key in ("weights", "calibration", "code")}
    return find(record, same | {"allocation": measured})


def is_allocation(stage: dict[str, Any]) -> bool:
    return stage["name"].startswith(ALLOCATE)


if __name__ == "__main__":
    main()
