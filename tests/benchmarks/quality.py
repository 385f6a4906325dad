"""Perplexity of a model after compression: methods, temperatures and ratios side by side, as a table and as JSON.

python tests/benchmarks/quality.py --model DIR --calibration FILE --evaluation FILE
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_modegpt import ModeGPTConfig, perplexity
from optimum_modegpt.allocation.plan import Plan, total_weights
from optimum_modegpt.architectures import resolve
from optimum_modegpt.calibration.data import (
    TokenWindows,
    calibration_windows,
    evaluation_windows,
    resolve_sequence_length,
)
from optimum_modegpt.compress import compress, part_sizes

TEMPERATURES = (0.03, 0.05, 0.1, 0.2)
RECIPES: dict[str, dict[str, Any]] = {
    **{f"paper ε {t}": {"method": "paper", "influence_temperature": t} for t in TEMPERATURES},
    "paper uniform": {"method": "paper", "allocation": "uniform"},
    "MLP only": {"method": "paper"},
    "default, no refit": {"refit_iterations": 0},
    "default": {},
}


def main() -> None:
    options = parse()
    rows = []
    for sparsity in options.sparsity:
        for name in options.recipes:
            row = measure(options, name, sparsity)
            rows.append(row)
            measured = f"{row['perplexity']:8.3f}  removed {row['removed']:.4f}  {row['seconds']:.1f} s"
            print(f"{sparsity:.0%} {name:<20}{measured}", flush=True)
    dense = score(options, load(options))
    print(f"\n{table(rows, dense, options)}")
    if options.json:
        options.json.write_text(json.dumps(record(options, rows, dense), indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name of a dense model")
    parser.add_argument("--calibration", required=True, help="calibration text, a file")
    parser.add_argument("--evaluation", required=True, help="evaluation text, a file")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.3], help="fractions to remove")
    parser.add_argument("--num-samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--sequence-length", type=int, help="tokens per window; default min(2048, context)")
    parser.add_argument("--max-windows", type=int, default=64, help="evaluation windows")
    parser.add_argument("--round-to", type=int, default=1, help="rounding of widths")
    parser.add_argument("--seed", type=int, default=0, help="seed of the calibration windows")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args()


def measure(options: argparse.Namespace, name: str, sparsity: float) -> dict[str, Any]:
    """One compression from the dense model, scored on the evaluation text."""
    model = load(options)
    config = ModeGPTConfig(
        sparsity=sparsity,
        dataset=options.calibration,
        num_samples=options.num_samples,
        round_to=options.round_to,
        seed=options.seed,
        **RECIPES[name],
    )
    windows = calibration_windows(config, tokenizer(options), sequence_length=length(options, model))
    plan = mlp_only(model, config) if name == "MLP only" else None
    report = compress(model, config, windows, plan=plan, progress=False)
    seconds = {stage.name: round(stage.seconds, 2) for stage in report.stages}
    return {
        "recipe": name,
        "sparsity": sparsity,
        "removed": report.achieved_sparsity,
        "perplexity": score(options, model),
        "seconds": sum(seconds.values()),
        "stages": seconds,
        "calibration": report.calibration,
    }


def mlp_only(model: Any, config: ModeGPTConfig) -> Plan:
    """The same number of weights, all taken from the MLPs."""
    sizes = part_sizes(resolve(model), config)
    mlps = sum(block["mlp"].weights for block in sizes)
    share = config.sparsity * total_weights(sizes) / mlps
    return [
        {
            **{part: size.dense for part, size in block.items()},
            "mlp": block["mlp"].nearest(block["mlp"].dense * (1 - share)),
        }
        for block in sizes
    ]


def load(options: argparse.Namespace) -> Any:
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)


def tokenizer(options: argparse.Namespace) -> Any:
    return AutoTokenizer.from_pretrained(options.model)


def length(options: argparse.Namespace, model: Any) -> int:
    return resolve_sequence_length(options.sequence_length, model.config.max_position_embeddings)


def score(options: argparse.Namespace, model: Any) -> float:
    windows: TokenWindows = evaluation_windows(
        options.evaluation, tokenizer(options), sequence_length=length(options, model), max_windows=options.max_windows
    )
    return perplexity(model, windows.tokens).perplexity


def table(rows: list[dict[str, Any]], dense: float, options: argparse.Namespace) -> str:
    """A Markdown table, one line a ratio; the last column is log(default/dense) / log(best paper/dense)."""
    names = [name for name in RECIPES if name in options.recipes]
    lines = [f"dense {dense:.3f}", "", "| removed | " + " | ".join(names) + " | g |", "|" + "---|" * (len(names) + 2)]
    for sparsity in options.sparsity:
        found = {row["recipe"]: row["perplexity"] for row in rows if row["sparsity"] == sparsity}
        published = [value for name, value in found.items() if name.startswith("paper")]
        share = f"{share_left(found['default'], min(published), dense):.2f}" if published and "default" in found else ""
        lines.append(f"| {sparsity:.0%} | " + " | ".join(f"{found[name]:.2f}" for name in names) + f" | {share} |")
    return "\n".join(lines)


def share_left(ours: float, published: float, dense: float) -> float:
    """The share of the published method's loss that is left."""
    return math.log(ours / dense) / math.log(published / dense)


def record(options: argparse.Namespace, rows: list[dict[str, Any]], dense: float) -> dict[str, Any]:
    """The results, with what made them."""
    return {
        "model": Path(options.model).name,
        "calibration": Path(options.calibration).name,
        "evaluation": Path(options.evaluation).name,
        "num_samples": options.num_samples,
        "sequence_length": options.sequence_length,
        "max_windows": options.max_windows,
        "round_to": options.round_to,
        "seed": options.seed,
        "dense_perplexity": dense,
        "results": rows,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


if __name__ == "__main__":
    main()
