"""`inspect`: ranks, parameters and record of a compressed model, without loading its weights."""

from __future__ import annotations

import shlex
from argparse import Namespace
from typing import Any

from optimum_modegpt.architectures import FAMILIES
from optimum_modegpt.evaluation.inspection import inspection
from optimum_modegpt.integration.commands.common import check_file, path, source_of, verb, write_json
from optimum_modegpt.integration.headers import read_headers
from optimum_modegpt.integration.reading import load_config
from optimum_modegpt.integration.tables import inspection_table


def add(verbs: Any) -> None:
    """Declares the arguments."""
    parser = verb(verbs, "inspect", run, "Ranks, parameters and record of MODEL; loads no weights.")
    parser.add_argument("--json", type=path, metavar="FILE", help="also write the result there")


def run(options: Namespace) -> None:
    """Ranks, parameters and record of a compressed model, without loading its weights."""
    check_file(options.json)
    source = source_of(options)
    found = inspection(load_config(source), read_headers(source))
    write_json(options.json, found.to_dict())
    print(inspection_table(found))
    if not found.blocks:
        advice = f"To compress it: {options.program} compress {shlex.quote(options.model)} --output DIR"
        unknown = f"Models of its type cannot be compressed; known: {', '.join(sorted(FAMILIES))}."
        print(f"This is a dense model. {advice if found.model_type in FAMILIES else unknown}")
