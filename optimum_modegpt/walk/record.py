"""What was done, for people and programs: the record in config.json, and the report."""

from __future__ import annotations

import dataclasses
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from optimum_modegpt import distributed
from optimum_modegpt.allocation.plan import Plan
from optimum_modegpt.architectures import Architecture
from optimum_modegpt.budget.work import Extent, product_seconds, work_of
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.modeling.modegpt_common import FORMAT_VERSION
from optimum_modegpt.report import PARTS, BlockReport, Parameters, PartReport, Report, count_parameters
from optimum_modegpt.stages import product_rates
from optimum_modegpt.walk.state import Walk


def parameters_around(architecture: Architecture, blocks: list[nn.Module], weights: int, achieved: float) -> Parameters:
    """Parameters before and after, counted while both are there; `weights` are those of the dense projections."""
    before = count_parameters(architecture.model)
    dense = sum(count_parameters(block.module) for block in architecture.blocks)
    after = before - dense + sum(map(count_parameters, blocks))
    return Parameters(weights, round(weights * (1 - achieved)), before, after)


def make_record(walk: Walk, achieved: float, parameters: Parameters) -> dict[str, Any]:
    """What config.json says of the compression."""
    return {
        "format_version": FORMAT_VERSION,
        "base_model": walk.base.model,
        "base_revision": walk.base.revision,
        "recipe": portable(walk.config),
        "dtype": str(walk.architecture.model.dtype).removeprefix("torch."),
        "calibration": dict(walk.calibration.record),
        "achieved": {"sparsity": achieved, "parameters": dataclasses.asdict(parameters)},
    }


def make_report(
    walk: Walk, plan: Plan, errors: list[dict[str, float]], achieved: float, parameters: Parameters
) -> Report:
    """Everything that was done, for people and programs."""
    blocks = tuple(
        BlockReport(
            index,
            {
                part: PartReport(ranks[part], size[part].dense, 1 - ranks[part] / size[part].dense, error[part])
                for part in PARTS
            },
        )
        for index, (ranks, size, error) in enumerate(zip(plan, walk.sizes, errors, strict=True))
    )
    floor = floor_seconds(walk, plan)
    return Report(
        base_model=walk.base.model,
        revision=walk.base.revision,
        config=portable(walk.config),
        requested_sparsity=walk.config.sparsity,
        achieved_sparsity=achieved,
        parameters=parameters,
        blocks=blocks,
        calibration=dict(walk.calibration.record),
        stages=tuple(dataclasses.replace(stage, floor=floor.get(stage.name, {})) for stage in walk.clock.stages),
        memory_kind=walk.clock.memory_kind,
        device=str(walk.device),
        batch_size=walk.batch_size,
        streams=walk.streams,
        processes=distributed.world_size(),
        **walk.measured(),
        warnings=tuple(walk.warnings),
        self_check={} if walk.self_check is None else dataclasses.asdict(walk.self_check),
        versions=versions(),
    )


def floor_seconds(walk: Walk, plan: Plan) -> dict[str, dict[str, float]]:
    """By stage and step, how long this process's share of the matrix products takes at the rate of the device."""
    tokens, config = walk.calibration.tokens, walk.config
    windows = -(-len(tokens) // distributed.world_size())
    length, dtype = tokens.shape[1], walk.architecture.model.dtype
    extent = Extent(windows, length, walk.batch_size * length, dtype.itemsize)
    rates = product_rates(walk.device, dtype)
    ranks, variants = [ranks["mlp"] for ranks in plan], sum(map(len, walk.curves.values()))
    stages = work_of(walk.shapes, config, extent, mlp_ranks=ranks, variants=variants)
    names = {"allocate": f"allocate ({config.resolved_allocation})", "decompose": "decompose"}
    return {
        names[stage]: {step: product_seconds(work, rates) for step, work in steps.items()}
        for stage, steps in stages.items()
    }


def portable(config: ModeGPTConfig) -> dict[str, Any]:
    """The configuration for a record that travels: of local files and folders only the last part of the path."""
    fields = config.to_dict()
    for name in ("dataset", "tokenizer"):
        if isinstance(fields[name], str) and os.path.exists(fields[name]):
            fields[name] = Path(fields[name]).name
    return fields


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    return {name: version(name) for name in ("torch", "transformers", "optimum-modegpt")}
