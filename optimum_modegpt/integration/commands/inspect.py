"""`inspect`: ranks, parameters, record and measurements of a compressed model, which is not loaded."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from optimum_modegpt.architectures import FAMILIES
from optimum_modegpt.evaluation.inspection import inspection
from optimum_modegpt.integration.card.contents import EVALUATION, read
from optimum_modegpt.integration.commands.advice import NEW_FOLDER, advised
from optimum_modegpt.integration.commands.common import check_file, path, source_of, verb, write_json
from optimum_modegpt.integration.headers import read_headers
from optimum_modegpt.integration.reading import load_config
from optimum_modegpt.integration.tables import inspection_table


def add(verbs: Any) -> None:
    """Declares the arguments."""
    parser = verb(verbs, "inspect", run, "Ranks, parameters, record and measurements of MODEL, which is not loaded.")
    parser.add_argument("--json", type=path, metavar="FILE", help="also write the result there")


def run(options: Namespace) -> None:
    """Ranks, parameters, record and measurements of a compressed model, which is not loaded."""
    check_file(options.json)
    source = source_of(options)
    found = inspection(load_config(source), read_headers(source))
    evaluation = _evaluation(Path(source.path)) if found.blocks else {}
    write_json(options.json, {**found.to_dict(), "evaluation": evaluation})
    print(inspection_table(found, evaluation))
    if not found.blocks:
        command = advised(options, "compress", options.model, revision=options.revision, output=NEW_FOLDER)
        advice = f"To compress it: {command}"
        unknown = f"Models of its type cannot be compressed; known: {', '.join(sorted(FAMILIES))}."
        print(f"This is a dense model. {advice if found.model_type in FAMILIES else unknown}")


def _evaluation(folder: Path) -> dict[str, Any]:
    """What lies measured in a folder; its weights are read only to know whether they are the measured ones."""
    return read(folder).evaluation if (folder / EVALUATION).is_file() else {}
