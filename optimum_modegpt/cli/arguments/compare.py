"""The arguments of `compare`."""

from __future__ import annotations

from typing import Any

from optimum_modegpt.cli.arguments.common import (
    add_access,
    add_device,
    add_reference_revision,
    add_tokenizer,
    count,
    path,
)

BROKEN = 1
"""Exit code if a threshold is not met."""


def add(verbs: Any) -> None:
    """Declare the arguments."""
    text = "Compare COMPRESSED with DENSE prompt by prompt; thresholds determine the exit code."
    parser = verbs.add_parser("compare", help=text, description=text)
    parser.add_argument("reference", metavar="DENSE", help="name on the Hub, folder, or demo for the embedded model")
    parser.add_argument("model", metavar="COMPRESSED", help="name on the Hub, or folder")
    add_access(parser, "COMPRESSED")
    add_reference_revision(parser)
    parser.add_argument(
        "--prompts",
        type=path,
        metavar="FILE",
        help='.txt: one prompt per line; .jsonl: {"prompt": …}, {"text": …} or {"messages": […]} per line; .json: a '
        "list of these or of strings. Required unless DENSE is demo, which has its own text",
    )
    parser.add_argument(
        "--max-new-tokens", type=count, default=48, metavar="N", help="length of a continuation; default 48"
    )
    add_tokenizer(parser, "that of the models")
    add_device(parser)
    limits = parser.add_argument_group(
        "thresholds", f"Exit code {BROKEN} if a threshold is not met, 0 if all are met or none is set, 2 for an error."
    )
    limits.add_argument("--max-kl", type=float, metavar="X", help="maximum mean KL divergence, in nats per position")
    limits.add_argument("--min-agreement", type=float, metavar="X", help="minimum top-1 agreement, as a fraction")
    limits.add_argument(
        "--max-perplexity-ratio",
        type=float,
        metavar="X",
        help="maximum perplexity of COMPRESSED divided by that of DENSE",
    )
    files = parser.add_argument_group("files")
    files.add_argument("--html", type=path, metavar="FILE", help="write the comparison as one self-contained page")
    files.add_argument(
        "--jsonl", type=path, metavar="FILE", help="write one record per prompt as soon as it is measured"
    )
    files.add_argument("--json", type=path, metavar="FILE", help="write all results at the end")
