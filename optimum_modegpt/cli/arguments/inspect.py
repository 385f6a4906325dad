"""The arguments of `inspect`."""

from __future__ import annotations

from typing import Any

from optimum_modegpt.cli.arguments.common import path, verb


def add(verbs: Any) -> None:
    """Declare the arguments."""
    parser = verb(
        verbs, "inspect", "Show the ranks, parameters, compression record and measurements of MODEL without loading it."
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="also load MODEL and compare its logits with and without the key-value cache on a few tokens",
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="also write the result to this file")
