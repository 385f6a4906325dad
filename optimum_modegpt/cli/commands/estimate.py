"""`estimate`: estimate memory and work of a compression without loading the weights."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from optimum_modegpt import distributed
from optimum_modegpt.architectures import check_dense
from optimum_modegpt.budget.estimate import Estimate, estimate, on_meta
from optimum_modegpt.calibration.data import resolve_sequence_length
from optimum_modegpt.cli.arguments import SERVABLE_FIELDS
from optimum_modegpt.cli.commands import common
from optimum_modegpt.cli.tables import estimate_table, servable_line
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.evaluation.perplexity import context_of
from optimum_modegpt.loading.models import auto_class_of, load_config, pick_device, readable
from optimum_modegpt.loading.source import Source
from optimum_modegpt.serving.servable import check_servable


def run(options: Namespace) -> None:
    """Print the memory and work that a compression needs, without loading the weights."""
    common.check_file(options.json)
    source, device = common.source_of(options), pick_device(options.device)
    config, model_config = common.configuration(options), load_config(source)
    found = estimate_of(source, model_config, config, options.dtype, device, options.processes)
    common.write_json(options.json, found.to_dict())
    print(estimate_table(found))
    print(f"{servable_line(check_servable(model_config, config))}; details: {servable_command(options, config, found)}")


def servable_command(options: Namespace, config: ModeGPTConfig, found: Estimate) -> str:
    """Return the command that shows which engines run the result, and how."""
    fields = {name: getattr(options, name) for name in SERVABLE_FIELDS if hasattr(options, name)}
    if options.config is None:
        fields["sparsity"] = round(found.sparsity, 4)  # without a field, the table would be about the dense model
    words = ("servable", options.model)
    return common.advised_command(
        options, *words, computes=False, revision=options.revision, config=options.config, **fields
    )


def estimate_of(
    source: Source,
    model_config: Any,
    config: ModeGPTConfig,
    dtype: str,
    device: torch.device | None,
    processes: int | None = None,
) -> Estimate:
    """Estimate the cost of compressing a model whose weights are loaded as `dtype`; "auto" is the stored type.

    `processes` is the number of processes that share the work; None uses the current number of ranks.
    """
    check_dense(model_config)
    length = resolve_sequence_length(config.sequence_length, context_of(model_config))
    stored = model_config.dtype or torch.get_default_dtype()
    wanted = stored if dtype == "auto" else getattr(torch, dtype)
    with readable(source):
        return estimate(
            on_meta(auto_class_of(model_config), model_config, wanted),
            config,
            length,
            weights_mapped=wanted == stored,
            device=device,
            processes=processes or distributed.world_size(),
        )
