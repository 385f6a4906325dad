"""Makes `model_cards/`: each model of the README compressed by 30 % and evaluated, by the package's own commands.

python tests/benchmarks/cards.py --models DIR --texts DIR [NAME …]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from optimum_modegpt.integration.cli import main as run_command

MODEL_CARDS = Path(__file__).parents[2] / "model_cards"
KEPT = ("README.md", "config.json", "report.json", "evaluation.json", "tokenizer_config.json", "ranks.png")
"""The card and all that it is written from; weights are not kept."""
SPARSITY = "0.3"
WINDOWS = "64"


@dataclass(frozen=True)
class Settings:
    """How a model is calibrated and evaluated: files of texts, None for the demo's own, and flags."""

    calibration: str | None
    evaluation: str | None
    compress: tuple[str, ...] = ()
    both: tuple[str, ...] = ()


STORIES = Settings("tinystories_calib.txt", "tinystories_eval.txt", compress=("--num-samples", "64"))
MODELS = {
    "stories260k": STORIES,
    "atto-llama3-mqa": STORIES,
    "atto-qwen2-mqa": STORIES,
    "shakespeare-opt-postln": Settings(
        "tinyshakespeare_train.txt", "tinyshakespeare_val.txt", both=("--sequence-length", "128")
    ),
    "demo": Settings(None, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder with the dense models")
    parser.add_argument("--texts", type=Path, required=True, help="folder with the texts")
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="NAME", help="default: all")
    options = parser.parse_args()
    for name in options.names:
        with tempfile.TemporaryDirectory() as folder:
            make(name, MODELS[name], options, Path(folder) / name)
            for file in KEPT:
                shutil.copy(Path(folder) / name / file, MODEL_CARDS / name / file)


def make(name: str, settings: Settings, options: argparse.Namespace, output: Path) -> None:
    """The compressed model, evaluated beside the dense one, with its card."""
    model = name if settings.calibration is None else str(options.models / name)
    compress = ["--sparsity", SPARSITY, "--round-to", "1", *settings.compress, *settings.both]
    run("compress", model, *dataset(settings.calibration, options), *compress, "--output", str(output))
    evaluate = ["--reference", model, "--max-windows", WINDOWS, *settings.both, "--update-card"]
    run("evaluate", str(output), *dataset(settings.evaluation, options), *evaluate)


def dataset(file: str | None, options: argparse.Namespace) -> list[str]:
    return [] if file is None else ["--dataset", str(options.texts / file)]


def run(*words: str) -> None:
    if code := run_command([*words, "--dtype", "float32"]):
        raise SystemExit(code)


if __name__ == "__main__":
    main()
