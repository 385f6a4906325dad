"""Make the plan of a compression: measure the importance of blocks and parts, and choose the widths to keep."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from optimum_modegpt.allocation.equal import equal_plan, equal_plan_from_curves
from optimum_modegpt.allocation.plan import Plan, plan_sparsity
from optimum_modegpt.allocation.sensitivity import plan_from_curves
from optimum_modegpt.allocation.targets import influence_targets, plan_from_targets
from optimum_modegpt.architectures import Block
from optimum_modegpt.budget.size_target import plan_size
from optimum_modegpt.budget.sizes import SPARSITY_TOLERANCE
from optimum_modegpt.calibration.gradients import output_gradients
from optimum_modegpt.calibration.influence import InfluenceSum
from optimum_modegpt.calibration.streams import check_dense, map_stream
from optimum_modegpt.errors import naming
from optimum_modegpt.methods import sensitivity
from optimum_modegpt.methods.registry import uses_gradients
from optimum_modegpt.progress import bar
from optimum_modegpt.walk.request import Request
from optimum_modegpt.walk.resume import keep_plan
from optimum_modegpt.walk.state import State


def make_plan(request: Request, state: State) -> Plan:
    """Choose the widths by the configuration's allocation. A miss of the requested size is a warning."""
    config, sizes = request.config, request.sizes
    if config.sparsity == 0:
        return Plan.dense(sizes)
    if config.resolved_allocation == "sensitivity":
        measure_sensitivities(request, state)
        choose = equal_plan_from_curves if config.equal_widths else plan_from_curves
        plan = choose(state.measurements.curves(), sizes, config.sparsity)
    elif config.equal_widths:
        plan = equal_plan(sizes, config.sparsity)
    elif config.resolved_allocation == "influence":
        state.measurements.influences = measure_influences(request, state)
        targets = influence_targets(
            state.measurements.influences,
            config.sparsity,
            temperature=config.influence_temperature,
            cap=config.max_sparsity,
            sizes=[sum(part.weights for part in block.values()) for block in sizes],
        )
        plan = plan_from_targets(targets, sizes)
    else:
        plan = plan_from_targets([config.sparsity] * len(sizes), sizes)
    warn_of_miss(request, state, plan)
    return plan


def warn_of_miss(request: Request, state: State, plan: Plan) -> None:
    """Warn if a plan misses the requested size or sparsity."""
    config, target, achieved = request.config, request.target, plan_sparsity(plan, request.sizes)
    if target is not None:
        size = plan_size(request.architecture, plan, target.quantization)
        if target.is_missed(size):
            state.warn(
                f"the widths allowed by round_to={config.round_to!r} give {target.written(size)}, not the requested "
                f"{target}."
            )
    elif abs(achieved - config.sparsity) > SPARSITY_TOLERANCE:
        state.warn(
            f"the widths allowed by round_to={config.round_to!r} give a sparsity of {achieved:.4f}, "
            f"not the requested {config.sparsity:.4f}."
        )


def measure_sensitivities(request: Request, state: State) -> None:
    """Measure the sensitivity of every part of every block. Each sweep is written to the checkpoint."""
    measure_gradients(request, state)
    measurements, budget = state.measurements, measure_budget(request)
    measurements.budget = budget
    for_moments, for_gradients = sensitivity.split(len(request.calibration.tokens), budget)
    sweeps = sensitivity.Sweeps(
        request.architecture,
        request.sizes,
        request.config,
        budget,
        moments=state.embed(request, for_moments),
        divergence=state.embed(request, for_gradients, budget.length),
        gradients=state.gradients,
        device=request.device,
    )
    for measured in sweeps.measured(measurements.parts, progress=request.show_progress):
        measurements.parts |= measured
        keep_plan(request, state, None)


def moment_windows(request: Request) -> slice:
    """Return the calibration windows from which moments are measured before the blocks are cut."""
    return sensitivity.split(len(request.calibration.tokens), measure_budget(request))[0]


def measure_gradients(request: Request, state: State) -> None:
    """Measure the gradients of the dense model's predictions at every block, if the compression uses them.

    Known gradients are not measured again. They are dropped if memory runs out.
    """
    if state.gradients or not uses_gradients(request.config):
        return
    budget = measure_budget(request)
    _, for_gradients = sensitivity.split(len(request.calibration.tokens), budget)
    with torch.inference_mode(False), torch.no_grad():  # the caller's inference mode would forbid gradients
        state.gradients = output_gradients(
            request.architecture,
            state.embed(request, for_gradients, budget.length),
            request.device,
            seed=request.config.seed,
            progress=request.show_progress,
        )


def measure_budget(request: Request) -> sensitivity.Budget:
    """Return the part of the calibration that gradients and sensitivities use."""
    return sensitivity.budget(request.shapes, *request.calibration.tokens.shape)


def measure_influences(request: Request, state: State) -> list[float]:
    """Measure the block influence of every block over all calibration windows (the paper's Eq. 10)."""
    stream, influences = state.inputs.stream, []
    for block in bar(request.architecture.blocks, desc="influences", unit="block", shown=request.show_progress):
        total = InfluenceSum()
        dense, arguments = block.on(request.device), state.inputs.on(block.index, request.device)
        stream = list(map_stream(partial(_add_influence, total, dense, arguments), request.device, stream))
        with naming(f"block {block.index}"):
            check_dense(stream, state.inputs.windows)
            influences.append(total.value())
    return influences


def _add_influence(total: InfluenceSum, block: Block, arguments: dict[str, Any], entering: Tensor) -> Tensor:
    """Return the block's output, and add its influence on these tokens to `total`."""
    output = block.forward(entering, arguments)
    total.add(entering, output)
    return output
