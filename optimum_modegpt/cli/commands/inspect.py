"""`inspect`: show ranks, parameters, record and measurements of a compressed model, and run its self-check."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from optimum_modegpt.cli.commands.advice import NEW_FOLDER, advised
from optimum_modegpt.cli.commands.common import check_file, source_of, write_json
from optimum_modegpt.cli.tables import inspection_table
from optimum_modegpt.evaluation.inspection import inspection
from optimum_modegpt.hub.result import EVALUATION, read
from optimum_modegpt.loading.models import load_config, load_model
from optimum_modegpt.loading.safetensors_index import read_headers
from optimum_modegpt.loading.source import Source
from optimum_modegpt.modeling import DENSE_TYPES

if TYPE_CHECKING:
    from optimum_modegpt.walk.self_check import SelfCheck


def run(options: Namespace) -> None:
    """Show a compressed model's ranks, parameters, record and measurements; load it only for the self-check."""
    check_file(options.json)
    source = source_of(options)
    found = inspection(load_config(source), read_headers(source))
    evaluation = _evaluation(Path(source.path)) if found.blocks else {}
    check = _check(source) if options.check else None
    checked = {} if check is None else {"self_check": asdict(check)}
    write_json(options.json, {**found.to_dict(), "evaluation": evaluation, **checked})
    print(inspection_table(found, evaluation))
    if check is not None:
        print(check)
    if not found.blocks:
        command = advised(options, "compress", options.model, revision=options.revision, output=NEW_FOLDER)
        advice = f"To compress it: {command}"
        unknown = f"Models of its type cannot be compressed; known: {', '.join(DENSE_TYPES)}."
        print(f"This is a dense model. {advice if found.model_type in DENSE_TYPES else unknown}")


def _check(source: Source) -> SelfCheck:
    """Load a model strictly and run the self-check on tokens spread over its vocabulary."""
    from optimum_modegpt.walk.self_check import PREFILL, STEPS, self_check  # imports the code of models

    model = load_model(source, "auto").eval()
    tokens = torch.linspace(0, model.config.get_text_config().vocab_size - 1, PREFILL + STEPS)
    return self_check(model, tokens.long())


def _evaluation(folder: Path) -> dict[str, Any]:
    """Return the measurements in a folder; weights are read only to check whether they were the measured ones."""
    return read(folder).evaluation if (folder / EVALUATION).is_file() else {}
