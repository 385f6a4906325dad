"""The arguments of `evaluate`."""

from __future__ import annotations

import argparse
from typing import Any

from optimum_modegpt.cli.arguments.common import (
    add_device,
    add_reference_revision,
    add_tokenizer,
    count,
    path,
    verb,
)


def add(verbs: Any) -> None:
    """Declare the arguments."""
    parser = verb(
        verbs, "evaluate", "Measure perplexity or task scores of MODEL, and compare them with those of DENSE."
    )
    parser.add_argument("--reference", metavar="DENSE", help="model to compare with, usually the dense one")
    add_reference_revision(parser)
    add_tokenizer(parser, "MODEL's own, else that of DENSE")
    parser.add_argument(
        "--batch-size",
        type=count,
        metavar="N",
        help="windows or requests per forward pass; default: chosen by the size of the logits, 1 for tasks",
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="also write the result to this file")
    parser.add_argument(
        "--update-card", action="store_true", help="also add the result to the folder MODEL and its model card"
    )
    add_device(parser)
    text = parser.add_argument_group(
        "perplexity", "Measured if --tasks is omitted, and in addition to tasks if --dataset is given."
    )
    text.add_argument("--dataset", metavar="NAME_OR_FILE", help="text; by default wikitext2, or the demo's own")
    text.add_argument(
        "--dataset-split",
        metavar="NAME",
        help="split to read, or a slice such as train[:10%%]; by default test, validation or train",
    )
    text.add_argument("--text-column", metavar="NAME", help="column that holds the text or token ids")
    text.add_argument("--sequence-length", type=int, metavar="N", help="tokens per window; default min(2048, context)")
    text.add_argument("--max-windows", type=count, metavar="N", help="score only the first N windows")
    tasks = parser.add_argument_group("tasks", "Measured with lm-eval: pip install 'optimum-modegpt[eval]'.")
    tasks.add_argument(
        "--tasks", type=_names, metavar="NAME,NAME", help="tasks, groups or tags; lm_eval ls tasks lists them"
    )
    tasks.add_argument(
        "--num-fewshot", type=_shots, metavar="N", help="examples before each question; by default the task's"
    )
    tasks.add_argument(
        "--limit", type=count, metavar="N", help="score only the first N samples of each task, as a trial"
    )
    tasks.add_argument(
        "--include-path", type=path, metavar="DIR", help="folder with YAML files that define your own tasks"
    )


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"expected names separated by commas, found {text!r}")
    return names


def _shots(text: str) -> int:
    return 0 if text == "0" else count(text)
