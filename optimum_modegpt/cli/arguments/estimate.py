"""The arguments of `estimate`."""

from __future__ import annotations

from typing import Any

from optimum_modegpt.cli.arguments.common import add_device, count, path, verb
from optimum_modegpt.cli.arguments.configuration import add_configuration


def add(verbs: Any) -> None:
    """Declare the arguments."""
    parser = verb(verbs, "estimate", "Estimate the memory and work of compressing MODEL without loading its weights.")
    parser.add_argument("--json", type=path, metavar="FILE", help="also write the result to this file")
    parser.add_argument(
        "--processes",
        type=count,
        default=1,
        metavar="N",
        help="number of processes that share the work on this machine; default 1",
    )
    add_configuration(parser)
    add_device(parser)
