"""The arguments of `estimate`."""

from __future__ import annotations

from typing import Any

from optimum_modegpt.integration.arguments.common import add_device, count, path, verb
from optimum_modegpt.integration.arguments.configuration import add_configuration


def add(verbs: Any) -> None:
    """Declare the arguments."""
    parser = verb(verbs, "estimate", "Memory and work that compressing MODEL needs; loads no weights.")
    parser.add_argument("--json", type=path, metavar="FILE", help="also write the result there")
    parser.add_argument(
        "--processes", type=count, default=1, metavar="N", help="processes started together on this machine; default 1"
    )
    add_configuration(parser)
    add_device(parser)
