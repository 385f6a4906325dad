"""The arguments of `demo`."""

from __future__ import annotations

import argparse
from typing import Any

from optimum_modegpt.integration.arguments.common import add_debug, path

SPARSITY = 0.2
"""Fraction to remove by default; without 30 % of its weights so small a model no longer writes well."""


def add(verbs: Any) -> None:
    """Declare the arguments."""
    parser = verbs.add_parser("demo", help="The whole job on the embedded model: compress, evaluate, reload, generate.")
    parser.set_defaults(model="demo", revision=None, token=None, trust_remote_code=False)
    parser.set_defaults(dtype="auto", config=None, report=None, fresh=False, ignore_estimate=True)
    parser.add_argument("--output", type=path, metavar="DIR", help="keep the compressed model there")
    parser.add_argument("--overwrite", action="store_true", help="replace the result that stands there, after success")
    parser.add_argument("--sparsity", type=float, default=SPARSITY, help=f"as in compress; default {SPARSITY}")
    parser.add_argument("--method", default=argparse.SUPPRESS, help="as in compress")
    parser.add_argument("--device", default="auto", help="where to compute; auto takes an accelerator if there is one")
    add_debug(parser)
