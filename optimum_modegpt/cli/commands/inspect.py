"""`inspect`: show ranks, parameters, record and measurements of a compressed model, and run its self-check."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from optimum_modegpt.cli.commands import common
from optimum_modegpt.cli.tables import inspection_table
from optimum_modegpt.evaluation.inspection import inspection
from optimum_modegpt.hub.result import EVALUATION, read
from optimum_modegpt.loading.models import load_config, load_model
from optimum_modegpt.loading.safetensors_index import read_headers
from optimum_modegpt.modeling import DENSE_TYPES


def run(options: Namespace) -> None:
    """Show a compressed model's ranks, parameters, record and measurements; load it only for the self-check."""
    common.check_file(options.json)
    source = common.source_of(options)
    found = inspection(load_config(source), read_headers(source))
    evaluation: dict[str, Any] = {}
    if found.blocks and Path(source.path, EVALUATION).is_file():
        evaluation = read(Path(source.path)).evaluation
    result = {**found.to_dict(), "evaluation": evaluation}
    check = None
    if options.check:
        from optimum_modegpt.walk.self_check import PREFILL, STEPS, self_check  # slow: imports the code of models

        model = load_model(source, "auto").eval()
        tokens = torch.linspace(0, model.config.get_text_config().vocab_size - 1, PREFILL + STEPS)
        check = self_check(model, tokens.long())
        result["self_check"] = asdict(check)
    common.write_json(options.json, result)
    print(inspection_table(found, evaluation))
    if check is not None:
        print(check)
    if found.blocks:
        return
    if found.model_type in DENSE_TYPES:
        command = common.advised_command(
            options, "compress", options.model, revision=options.revision, output=common.NEW_FOLDER
        )
        print(f"This is a dense model. To compress it: {command}")
    else:
        known = ", ".join(DENSE_TYPES)
        print(f"This is a dense model. Models of its type cannot be compressed; known: {known}.")
