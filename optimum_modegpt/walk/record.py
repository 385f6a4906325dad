"""Make the record in config.json and the report of a compression."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from typing import Any

from torch import nn

from optimum_modegpt import distributed
from optimum_modegpt.allocation.plan import Plan, total_weights
from optimum_modegpt.budget.size_target import plan_size
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.methods.cost import Extent, product_seconds
from optimum_modegpt.methods.registry import work_of
from optimum_modegpt.mixture import without_folders
from optimum_modegpt.modeling.modegpt_config import FORMAT_VERSION
from optimum_modegpt.quantities import dtype_name
from optimum_modegpt.report import BlockReport, Parameters, PartReport, Report, count_parameters, uncut_sentences
from optimum_modegpt.stages import product_rates
from optimum_modegpt.walk.request import Request
from optimum_modegpt.walk.self_check import SelfCheck
from optimum_modegpt.walk.state import State


def parameters_around(request: Request, state: State, blocks: list[nn.Module], achieved: float) -> Parameters:
    """Count the parameters before and after, while both models exist. Whole experts count before."""
    weights = total_weights(request.sizes)
    before = count_parameters(request.architecture.model)
    dense = sum(count_parameters(block.module) for block in request.architecture.blocks)
    after = before - dense + sum(map(count_parameters, blocks))
    removed = 0 if state.removed is None else state.removed.parameters
    return Parameters(weights, round(weights * (1 - achieved)), before + removed, after)


def reached_target(request: Request, plan: Plan) -> dict[str, Any]:
    """Return the requested size of the result and the one that `plan` reaches; an empty dict if none was requested.

    The model must still be the dense one.
    """
    if (target := request.target) is None:
        return {}
    return target.record(plan_size(request.architecture, plan, target.quantization))


def make_record(request: Request, achieved: float, parameters: Parameters, target: dict[str, Any]) -> dict[str, Any]:
    """Return the record of the compression for config.json."""
    return {
        "format_version": FORMAT_VERSION,
        "base_model": request.base.model,
        "base_revision": request.base.revision,
        "recipe": portable(request.config),
        **({"target": target} if target else {}),
        "dtype": dtype_name(request.architecture.model.dtype),
        "calibration": dict(request.calibration.record),
        "achieved": {"sparsity": achieved, "parameters": dataclasses.asdict(parameters)},
    }


def make_report(
    request: Request,
    state: State,
    plan: Plan,
    errors: list[dict[str, float]],
    achieved: float,
    parameters: Parameters,
    target: dict[str, Any],
    check: SelfCheck,
) -> Report:
    """Return the report of a finished compression."""
    floor = floor_seconds(request, state, plan)
    return Report(
        base_model=request.base.model,
        revision=request.base.revision,
        config=portable(request.config),
        requested_sparsity=request.config.sparsity,
        achieved_sparsity=achieved,
        target=target,
        parameters=parameters,
        blocks=tuple(_block_report(index, request, plan, error) for index, error in enumerate(errors)),
        calibration=dict(request.calibration.record),
        stages=tuple(dataclasses.replace(stage, floor=floor.get(stage.name, {})) for stage in state.clock.stages),
        memory_kind=state.clock.memory_kind,
        device=str(request.device),
        compute_dtype=dtype_name(state.precision.compute),
        batch_size=state.batch_size,
        streams=state.streams,
        processes=distributed.world_size(),
        **state.measurements.for_report(),
        kept_experts=() if state.removed is None else state.removed.kept,
        warnings=tuple(state.warnings),
        uncut=uncut_sentences(request.wide),
        self_check=dataclasses.asdict(check),
        versions=versions(),
    )


def _block_report(index: int, request: Request, plan: Plan, errors: dict[str, float]) -> BlockReport:
    parts = {}
    for part, size in request.sizes[index].items():
        rank, dense = getattr(plan.widths[index], part), size.dense
        parts[part] = PartReport(rank, dense, 1 - rank / dense, errors[part])
    return BlockReport(index, parts)


def floor_seconds(request: Request, state: State, plan: Plan) -> dict[str, dict[str, float]]:
    """Return the least seconds of this rank's matrix products at the rate of the device, by stage and step."""
    tokens, config = request.calibration.tokens, request.config
    windows = -(-len(tokens) // distributed.world_size())
    length, dtype = tokens.shape[1], state.precision.compute
    extent = Extent(windows, length, state.batch_size * length, dtype.itemsize)
    rates = product_rates(request.device, dtype)
    kept = [widths.mlp for widths in plan.widths]
    stages = work_of(request.shapes, config, extent, widths=kept)
    floor = {}
    for stage, steps in stages.items():
        name = f"allocate ({config.resolved_allocation})" if stage == "allocate" else stage
        floor[name] = {step: product_seconds(work, rates) for step, work in steps.items()}
    return floor


def portable(config: ModeGPTConfig) -> dict[str, Any]:
    """Return the configuration for a record, with only the last part of the paths of local files and folders."""
    fields = config.to_dict()
    for name in ("dataset", "tokenizer"):
        if fields[name] is not None:
            fields[name] = without_folders(fields[name])
    return fields


def versions() -> dict[str, str]:
    """Return the versions of the packages that the numbers depend on."""
    return {name: version(name) for name in ("torch", "transformers", "optimum-modegpt")}
