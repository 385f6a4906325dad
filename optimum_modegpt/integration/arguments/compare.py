"""The arguments of `compare`."""

from __future__ import annotations

from typing import Any

from optimum_modegpt.integration.arguments.common import (
    add_access,
    add_device,
    add_reference_revision,
    add_tokenizer,
    count,
    path,
)

BROKEN = 1
"""Exit code where a threshold does not hold."""


def add(verbs: Any) -> None:
    """Declare the arguments."""
    text = "How COMPRESSED differs from DENSE, prompt by prompt; thresholds decide the exit code."
    parser = verbs.add_parser("compare", help=text, description=text)
    parser.add_argument("reference", metavar="DENSE", help="name on the Hub, folder, or demo for the embedded model")
    parser.add_argument("model", metavar="COMPRESSED", help="name on the Hub, or folder")
    add_access(parser, "COMPRESSED")
    add_reference_revision(parser)
    parser.add_argument(
        "--prompts",
        type=path,
        metavar="FILE",
        help='.txt: a prompt each line; .jsonl: {"prompt": …}, {"text": …} or {"messages": […]} each line; .json: a '
        "list of these or of strings. Left out, the demo takes its own text",
    )
    parser.add_argument("--max-new-tokens", type=count, default=48, metavar="N", help="of a continuation; default 48")
    add_tokenizer(parser, "that of the models")
    add_device(parser)
    limits = parser.add_argument_group(
        "thresholds", f"Exit code {BROKEN} where one is broken, 0 where all hold or none is set, 2 for an error."
    )
    limits.add_argument("--max-kl", type=float, metavar="X", help="most mean KL divergence, nats per position")
    limits.add_argument("--min-agreement", type=float, metavar="X", help="least top-1 agreement, a fraction")
    limits.add_argument("--max-perplexity-ratio", type=float, metavar="X", help="most perplexity over that of DENSE")
    files = parser.add_argument_group("files")
    files.add_argument("--html", type=path, metavar="FILE", help="write the comparison as one page that stands alone")
    files.add_argument("--jsonl", type=path, metavar="FILE", help="write a record a prompt as soon as it is measured")
    files.add_argument("--json", type=path, metavar="FILE", help="write everything at the end")
