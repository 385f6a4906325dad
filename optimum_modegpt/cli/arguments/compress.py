"""The arguments of `compress`."""

from __future__ import annotations

from typing import Any

from optimum_modegpt.cli.arguments.common import add_device, path, verb
from optimum_modegpt.cli.arguments.configuration import add_configuration


def add(verbs: Any) -> None:
    """Declare the arguments."""
    parser = verb(verbs, "compress", "Compress MODEL and save it.")
    parser.add_argument(
        "--output", type=path, required=True, metavar="DIR", help="folder to write; it appears only once complete"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="overwrite an existing result once compression succeeds"
    )
    parser.add_argument("--fresh", action="store_true", help="discard the checkpoint of an interrupted run")
    parser.add_argument("--ignore-estimate", action="store_true", help="continue even if memory or disk seem too small")
    parser.add_argument("--report", type=path, metavar="FILE.json", help="also write the report to this file")
    parser.add_argument("--push-to-hub", metavar="REPO", help="also upload the result to the Hub, as user/name")
    parser.add_argument("--private", action="store_true", help="make REPO private if it is new")
    parser.add_argument("--create-pr", action="store_true", help="upload as a pull request")
    add_configuration(parser)
    add_device(parser)
