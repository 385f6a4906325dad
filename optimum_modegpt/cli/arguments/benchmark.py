"""The arguments of `benchmark`."""

from __future__ import annotations

import argparse
from typing import Any

from optimum_modegpt.cli.arguments.common import add_device, add_reference_revision, count, path, verb

NEW_TOKENS, REPEATS = 32, 5
BATCH_SIZES, PROMPT_LENGTHS = (1, 8), (128, 1024)


def add(verbs: Any) -> None:
    """Declare the arguments."""
    parser = verb(verbs, "benchmark", "Measure prefill speed, decode speed and memory of MODEL.")
    parser.add_argument(
        "--reference", metavar="DENSE", help="model to measure in alternation with MODEL; ratios are relative to it"
    )
    add_reference_revision(parser)
    parser.add_argument(
        "--batch-sizes", type=counts, default=BATCH_SIZES, metavar="N,…", help="prompts per batch; default 1,8"
    )
    parser.add_argument(
        "--prompt-lengths",
        type=counts,
        default=PROMPT_LENGTHS,
        metavar="N,…",
        help="tokens, truncated to the context; default 128,1024",
    )
    parser.add_argument(
        "--new-tokens", type=count, default=NEW_TOKENS, metavar="N", help=f"decoding steps; default {NEW_TOKENS}"
    )
    parser.add_argument(
        "--repeats", type=count, default=REPEATS, metavar="N", help=f"measurements per setting; default {REPEATS}"
    )
    parser.add_argument("--compile", action="store_true", help="measure again under torch.compile; takes minutes")
    add_device(parser)
    files = parser.add_argument_group("files")
    files.add_argument("--json", type=path, metavar="FILE", help="write all measurements, the machine and versions")
    files.add_argument("--plot", type=path, metavar="FILE", help="plot the speeds; .png, .svg or .pdf")


def counts(text: str) -> tuple[int, ...]:
    """Parse integers of at least 1, separated by commas."""
    try:
        return tuple(count(part.strip()) for part in text.split(","))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"expected integers of at least 1 such as 1,8, found {text!r}") from error
