"""The arguments and argument types that several commands share."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")


def verb(verbs: Any, name: str, text: str) -> argparse.ArgumentParser:
    """Add the parser of a command that works on one model."""
    parser = verbs.add_parser(name, help=text, description=text)
    parser.add_argument("model", metavar="MODEL", help="name on the Hub, folder, or demo for the embedded model")
    add_access(parser, "MODEL")
    return parser


def add_access(parser: argparse.ArgumentParser, model: str) -> None:
    """Add the flags for access to the model whose argument is called `model`."""
    parser.add_argument("--revision", metavar="R", help=f"branch, tag or commit of {model}")
    parser.add_argument("--token", metavar="T", help="access token of the Hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add_debug(parser)


def add_reference_revision(parser: argparse.ArgumentParser, flag: str = "--reference-revision") -> None:
    """Add the flag for the revision of the dense model."""
    text = "branch, tag or commit of DENSE"
    parser.add_argument(flag, dest="reference_revision", metavar="R", help=text)


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Add the flag that shows tracebacks."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the flags for device and data type."""
    parser.add_argument(
        "--device", default="auto", help="device to compute on; auto uses an accelerator if one is available"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="data type of the weights; auto keeps the stored one"
    )


def add_tokenizer(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the flags that choose a tokenizer; `default` describes the tokenizer that is used without them."""
    parser.add_argument("--tokenizer", metavar="NAME", help=f"name or folder; by default {default}")
    parser.add_argument(
        "--allow-foreign-tokenizer",
        action="store_true",
        help="accept a --tokenizer that differs from the model's own, with a warning",
    )


def count(text: str) -> int:
    """Parse an integer of at least 1."""
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, found {text!r}")
    return int(text)


def path(text: str) -> Path:
    """Parse a path, and refuse an empty one: it would mean the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found nothing")
    return Path(text)
