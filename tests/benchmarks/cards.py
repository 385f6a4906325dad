"""Make `model_cards/`: compress each model of the README by 30 % and evaluate it, by the package's own commands.

python tests/benchmarks/cards.py --models DIR --texts DIR [--recover] [NAME …]
python tests/benchmarks/cards.py --rewrite [NAME …]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_modegpt.cli.main import main as run_command
from optimum_modegpt.hub.card import write_card

MODEL_CARDS = Path(__file__).parents[2] / "model_cards"
KEPT = ("README.md", "config.json", "report.json", "evaluation.json", "tokenizer_config.json", "ranks.png")
"""The card and the files that it is generated from; weights are not kept."""
SPARSITY = "0.3"
WINDOWS = 64
"""Maximum number of windows of an evaluation."""
RECOVERIES = {"demo": {"0.3": (), "0.4": ()}, "stories260k": {"0.3": ("--steps", "60", "--sequence-length", "512")}}
"""Flags of the recoveries in the guides, by model and sparsity."""
MEASURED = ("perplexity", "kl", "top1_agreement")


@dataclass(frozen=True)
class Settings:
    """Texts of the calibration and the evaluation (None for the demo's own), windows and tokens per window."""

    calibration: str | None
    evaluation: str | None
    num_samples: int = 128
    sequence_length: int | None = None


STORIES = Settings("tinystories_calib.txt", "tinystories_eval.txt", num_samples=64)
MODELS = {
    "stories260k": STORIES,
    "atto-llama3-mqa": STORIES,
    "atto-qwen2-mqa": STORIES,
    "shakespeare-opt-postln": Settings("tinyshakespeare_train.txt", "tinyshakespeare_val.txt", sequence_length=128),
    "demo": Settings(None, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder with the dense models")
    parser.add_argument("--texts", type=Path, help="folder with the texts")
    parser.add_argument("--recover", action="store_true", help="make recovered.json in place of the cards")
    parser.add_argument(
        "--rewrite", action="store_true", help="only write the cards again from the files in their folders"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    options = parser.parse_args()
    if not options.rewrite and None in (options.models, options.texts):
        parser.error("--models and --texts are required without --rewrite")
    for name in options.names or (RECOVERIES if options.recover else MODELS):
        if options.rewrite:
            write_card(MODEL_CARDS / name)
            continue
        if options.recover:
            rows = [recovered(name, sparsity, options) for sparsity in RECOVERIES[name]]
            (MODEL_CARDS / name / "recovered.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
            continue
        with tempfile.TemporaryDirectory() as folder:
            make(name, SPARSITY, options, Path(folder) / name)
            for file in KEPT:
                shutil.copy(Path(folder) / name / file, MODEL_CARDS / name / file)


def make(name: str, sparsity: str, options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Compress a model, compare it with the dense one, write its card, and return the measurement."""
    settings = MODELS[name]
    compress = ["--sparsity", sparsity, "--round-to", "1", "--num-samples", str(settings.num_samples)]
    run(
        *("compress", dense(name, options), *dataset(settings.calibration, options), *compress),
        *(*length(settings), "--output", str(output)),
    )
    return evaluate(name, options, output)


def evaluate(name: str, options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Compare a model with the dense one, add the measurement to its card, and return it."""
    settings = MODELS[name]
    words = ["--reference", dense(name, options), "--max-windows", str(WINDOWS), *length(settings), "--update-card"]
    run("evaluate", str(output), *dataset(settings.evaluation, options), *words)
    (entry,) = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))["texts"]
    return entry


def recovered(name: str, sparsity: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a compressed model before and after a recovery with the dense one as the teacher."""
    with tempfile.TemporaryDirectory() as folder:
        small, better = Path(folder) / name, Path(folder) / "recovered"
        before = make(name, sparsity, options, small)
        words = [*dataset(MODELS[name].calibration, options), *RECOVERIES[name][sparsity], "--output", str(better)]
        run("recover", str(small), "--teacher", dense(name, options), *words)
        after = evaluate(name, options, better)
        record = json.loads((better / "config.json").read_text(encoding="utf-8"))["modegpt"]["recovered"]
    return {
        "sparsity": float(sparsity),
        "dense_perplexity": before["reference_perplexity"],
        "compressed": {key: before[key] for key in MEASURED},
        "recovered": {key: after[key] for key in MEASURED},
        "text": after["text"],
        "recovery": record,
    }


def dense(name: str, options: argparse.Namespace) -> str:
    return name if MODELS[name].calibration is None else str(options.models / name)


def dataset(file: str | None, options: argparse.Namespace) -> list[str]:
    return [] if file is None else ["--dataset", str(options.texts / file)]


def length(settings: Settings) -> list[str]:
    return [] if settings.sequence_length is None else ["--sequence-length", str(settings.sequence_length)]


def run(*words: str) -> None:
    if code := run_command([*words, "--dtype", "float32"]):
        raise SystemExit(code)


if __name__ == "__main__":
    main()
