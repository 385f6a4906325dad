"""The arguments of `demo`."""

from __future__ import annotations

import argparse
from typing import Any

from optimum_modegpt.cli.arguments.common import add_debug, path

SPARSITY = 0.2
"""Fraction to remove by default; a model this small no longer writes well without 30 % of its weights."""


def add(verbs: Any) -> None:
    """Declare the arguments."""
    parser = verbs.add_parser("demo", help="Compress the embedded model, reload it, evaluate it and generate text.")
    parser.set_defaults(model="demo", revision=None, token=None, trust_remote_code=False)
    parser.set_defaults(dtype="auto", config=None, report=None, fresh=False, ignore_estimate=True)
    parser.add_argument("--output", type=path, metavar="DIR", help="save the compressed model in this folder")
    parser.add_argument(
        "--overwrite", action="store_true", help="overwrite an existing result once the command succeeds"
    )
    parser.add_argument("--sparsity", type=float, default=SPARSITY, help=f"as in compress; default {SPARSITY}")
    parser.add_argument("--method", default=argparse.SUPPRESS, help="as in compress")
    parser.add_argument(
        "--device", default="auto", help="device to compute on; auto uses an accelerator if one is available"
    )
    add_debug(parser)
