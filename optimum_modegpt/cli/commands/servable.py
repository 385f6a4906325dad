"""`servable`: show which serving engines run a model, or the result of a compression, and how."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from optimum_modegpt.cli.arguments import SERVABLE_FIELDS
from optimum_modegpt.cli.commands import common
from optimum_modegpt.cli.tables import servable_table
from optimum_modegpt.loading.models import load_config
from optimum_modegpt.modeling import DENSE_TYPES
from optimum_modegpt.serving.servable import RESULT, servable
from optimum_modegpt.serving.shape import shape_of


def run(options: Namespace) -> None:
    """Print, for every serving engine, whether it runs the model, why, and the command."""
    common.check_file(options.json)
    source = common.source_of(options)
    config, compression = load_config(source), None
    if options.config is not None or any(hasattr(options, name) for name in SERVABLE_FIELDS):
        compression = common.configuration(options)
    shape = shape_of(config, compression)
    found = servable(shape, RESULT if shape.forecast else source.path)
    result: dict[str, Any] = {"model": options.model, "model_type": config.model_type, "layout": shape.layout}
    result |= {"forecast": shape.forecast, "engines": [each.to_dict() for each in found]}
    common.write_json(options.json, result)
    print(servable_table(shape, found))
    if not shape.forecast and config.model_type in DENSE_TYPES:
        command = common.advised_command(
            options, "servable", options.model, computes=False, revision=options.revision, sparsity=0.3
        )
        print(f"This is the dense model. For a compressed one: {command}")
