"""Measure the perplexity of real models after compression: ratios × methods × allocations, as tables and as JSON.

python tests/benchmarks/quality.py --models DIR --texts DIR [--all] [--json FILE] [NAME …]

Every model uses the texts and windows of its card. By default, a few models are compressed with the published method
and with the default at every ratio, and with ablations of the default at 30 %. Rows in the JSON file are not computed
again if the model, ratio, recipe, calibration, evaluation and code are the same. Sensitivities and influences do not
depend on the ratio, so they are measured once per model. The row that measures them includes their time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from cards import MODEL_CARDS, MODELS, WINDOWS
from machine import code, machine
from rows import find, read, write
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from optimum_modegpt import ModeGPTConfig, demo, perplexity
from optimum_modegpt.allocation.equal import equal_plan_from_curves
from optimum_modegpt.allocation.plan import Plan, total_weights
from optimum_modegpt.allocation.sensitivity import plan_from_curves
from optimum_modegpt.allocation.targets import influence_targets, plan_from_targets
from optimum_modegpt.architectures import resolve
from optimum_modegpt.budget.sizes import part_sizes
from optimum_modegpt.calibration.data import (
    TokenWindows,
    calibration_windows,
    evaluation_windows,
    resolve_sequence_length,
)
from optimum_modegpt.compress import compress

RESULTS = Path(__file__).parent / "results" / "quality.json"
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
TEMPERATURES = (0.03, 0.05, 0.1, 0.2)
MAIN: dict[str, dict[str, Any]] = {
    **{f"paper ε {t}": {"method": "paper", "influence_temperature": t} for t in TEMPERATURES},
    "paper uniform": {"method": "paper", "allocation": "uniform"},
    "default": {},
}
MLP_ONLY = "MLP only"
ABLATIONS: dict[str, dict[str, Any]] = {
    MLP_ONLY: {"method": "paper"},
    "default uniform": {"allocation": "uniform"},
    "default influence": {"allocation": "influence"},
    "default, no refit": {"refit_iterations": 0},
    "default, layout mlp": {"layout": "mlp"},
    "default, layout stock": {"layout": "stock"},
}
"""The paper's method on the MLPs only; the default with other allocations, without the refit of gate and up, and in the
other layouts."""
RECIPES = MAIN | ABLATIONS
FEW = ("stories260k", "shakespeare-opt-postln")
ABLATION_RATIO = 0.3
COLUMNS = {"paper, best ε": tuple(name for name in MAIN if "ε" in name)} | {
    name: (name,) for name in ("paper uniform", *ABLATIONS, "default")
}
"""Recipes by column of the table. A column shows the best of its recipes."""
CELL = ("model", "sparsity", "recipe", "calibration", "evaluation", "code")
"""Fields that identify a row of the results."""


def main() -> None:
    options = parse()
    disable_progress_bar()
    record = read(options.json)
    cells = [(name, ratio, recipe) for name in options.names for ratio, recipe in wanted(options)]
    bar = tqdm(cells, unit="cell", disable=not sys.stderr.isatty())
    subjects = {name: Subject(name, options) for name in options.names}
    for name, ratio, recipe in bar:
        bar.set_description(f"{name} {ratio:.0%} {recipe}")
        subject = subjects[name]
        record.setdefault("dense", {})[name] = subject.dense_perplexity
        if find(record, cell := subject.cell(ratio, recipe)) is None:
            record["rows"] = [row for row in record["rows"] if row["code"] == code()]
            record["rows"].append(cell | subject.measured(ratio, recipe))
            write(options.json, record)
    for name, subject in subjects.items():
        rows = [find(record, subject.cell(ratio, recipe)) for ratio, recipe in wanted(options)]
        print(f"{name}, dense {subject.dense_perplexity:.3f}\n\n{table(rows, subject.dense_perplexity)}\n")
        if options.cards:
            text = json.dumps(subject.results(rows), indent=2) + "\n"
            (MODEL_CARDS / name / "results.json").write_text(text, encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder with the dense models")
    parser.add_argument("--texts", type=Path, required=True, help="folder with the texts")
    parser.add_argument("--all", action="store_true", help="every model, and every recipe at every ratio")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="fractions to remove")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, metavar="RECIPE", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="for the results (%(default)s)")
    parser.add_argument("--cards", action="store_true", help="also write results.json next to the models' cards")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}; default: {', '.join(FEW)}")
    options = parser.parse_args()
    options.names = options.names or list(MODELS if options.all else FEW)
    if unknown := set(options.names) - set(MODELS):
        parser.error(f"no model {', '.join(sorted(unknown))}; expected {', '.join(MODELS)}")
    return options


def wanted(options: argparse.Namespace) -> list[tuple[float, str]]:
    """Return the ratios and recipes to measure for each model."""
    found = []
    for ratio in options.ratios:
        for recipe in options.recipes or RECIPES:
            if options.recipes or options.all or recipe in MAIN or ratio == ABLATION_RATIO:
                found.append((ratio, recipe))
    return found


@dataclass(frozen=True)
class Curves:
    """Sensitivities and influences of a report. They do not depend on the ratio."""

    sensitivities: dict[str, list[list[float]]]
    influences: list[float]


@dataclass
class Subject:
    """Load a model and its texts when needed, and keep measurements that several rows share."""

    name: str
    options: argparse.Namespace
    curves: dict[str, Curves] = field(default_factory=dict)
    """Measurements for all ratios, by `measurement`."""

    @property
    def source(self) -> Path:
        return demo.MODEL_DIR if MODELS[self.name].calibration is None else self.options.models / self.name

    @cached_property
    def config(self) -> ModeGPTConfig:
        file = MODELS[self.name].calibration
        text = demo.CALIBRATION_TEXT if file is None else self.options.texts / file
        return ModeGPTConfig(dataset=str(text), num_samples=MODELS[self.name].num_samples, round_to=1)

    @cached_property
    def calibration(self) -> TokenWindows:
        return calibration_windows(self.config, self.tokenizer, sequence_length=self.length)

    @cached_property
    def evaluation(self) -> TokenWindows:
        file = MODELS[self.name].evaluation
        text = demo.EVALUATION_TEXT if file is None else self.options.texts / file
        return evaluation_windows(str(text), self.tokenizer, sequence_length=self.length, max_windows=WINDOWS)

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.source)

    @cached_property
    def length(self) -> int:
        return resolve_sequence_length(MODELS[self.name].sequence_length, self.load().config.max_position_embeddings)

    @cached_property
    def dense_perplexity(self) -> float:
        return perplexity(self.load(), self.evaluation.tokens).perplexity

    def load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32)

    def cell(self, ratio: float, recipe: str) -> dict[str, Any]:
        """Return the values of the fields in `CELL`."""
        texts = self.calibration.record["sha256"], self.evaluation.record["sha256"]
        return dict(zip(CELL, (self.name, ratio, recipe, *texts, code()), strict=True))

    def measured(self, ratio: float, recipe: str) -> dict[str, Any]:
        """Compress the dense model and return the perplexity on the evaluation text and the seconds by stage."""
        model = self.load()
        config = replace(self.config, sparsity=ratio, **RECIPES[recipe])
        plan = plan_of(recipe, model, config, self.curves)
        report = compress(model, config, self.calibration, plan=plan, progress=False)
        if plan is None:
            self.curves[measurement(config)] = Curves(report.sensitivities, report.influences)
        return {
            "removed": report.achieved_sparsity,
            "perplexity": perplexity(model, self.evaluation.tokens).perplexity,
            "stages": {stage.name: round(stage.seconds, 2) for stage in report.stages},
        }

    def results(self, rows: list[Any]) -> dict[str, Any]:
        """Return the content of results.json in the card's folder."""
        return {
            "model": self.name,
            "calibration": self.calibration.record["name"],
            "evaluation": self.evaluation.record["name"],
            "num_samples": self.config.num_samples,
            "sequence_length": self.length,
            "max_windows": WINDOWS,
            "round_to": self.config.round_to,
            "seed": self.config.seed,
            "dense_perplexity": self.dense_perplexity,
            "results": [row | {"calibration": self.calibration.record} for row in rows],
            "machine": machine(),
        }


def measurement(config: ModeGPTConfig) -> str:
    """Return a name for the measurement behind a plan. It depends on the allocation and the layout."""
    if config.layout == "per_layer":
        return config.resolved_allocation
    return f"{config.resolved_allocation}, {config.layout}"


def plan_of(recipe: str, model: Any, config: ModeGPTConfig, curves: Mapping[str, Curves]) -> Plan | None:
    """Return the plan of a recipe from earlier measurements by `measurement`, or None if there are none."""
    if recipe == MLP_ONLY:
        return mlp_only(model, config)
    measured = curves.get(measurement(config))
    if measured is None or config.resolved_allocation == "uniform":
        return None
    sizes = part_sizes(resolve(model), config)
    if config.resolved_allocation == "influence":
        targets = influence_targets(
            measured.influences, config.sparsity, temperature=config.influence_temperature, cap=config.max_sparsity
        )
        return plan_from_targets(targets, sizes)
    by_part = {}
    for key, curve in measured.sensitivities.items():
        block, part = key.split(".")
        by_part[int(block), part] = [(sparsity, divergence) for sparsity, divergence in curve]
    choose = equal_plan_from_curves if config.layout == "stock" else plan_from_curves
    return choose(by_part, sizes, config.sparsity)


def mlp_only(model: Any, config: ModeGPTConfig) -> Plan:
    """Return a plan that removes the same number of weights, all of them from the MLPs."""
    sizes = part_sizes(resolve(model), config)
    mlps = sum(block["mlp"].weights for block in sizes)
    share = config.sparsity * total_weights(sizes) / mlps
    kept = Plan.dense(sizes).to_list()
    for widths, block in zip(kept, sizes, strict=True):
        widths["mlp"] = block["mlp"].nearest(block["mlp"].dense * (1 - share))
    return Plan.from_list(kept)


def table(rows: list[Any], dense: float) -> str:
    """Format a Markdown table with one line per ratio; g is log(default/dense) / log(best paper/dense)."""
    lines = [f"| removed | {' | '.join(COLUMNS)} | g |", "|---" * (len(COLUMNS) + 2) + "|"]
    for ratio in sorted({row["sparsity"] for row in rows}):
        found = {row["recipe"]: row["perplexity"] for row in rows if row["sparsity"] == ratio}
        cells = []
        for recipes in COLUMNS.values():
            values = [found[recipe] for recipe in recipes if recipe in found]
            cells.append(f"{min(values):.2f}" if values else "")
        published = [value for recipe, value in found.items() if recipe.startswith("paper")]
        if published and "default" in found:
            cells.append(f"{share_left(found['default'], min(published), dense):.2f}")
        else:
            cells.append("")
        lines.append(f"| {ratio:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def share_left(ours: float, published: float, dense: float) -> float:
    """Return our loss of log-perplexity as a fraction of the published method's loss."""
    return math.log(ours / dense) / math.log(published / dense)


if __name__ == "__main__":
    main()
