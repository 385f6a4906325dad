"""Make the request of a compression from the arguments of `compress`."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from optimum_modegpt.allocation.plan import Plan, plan_sparsity
from optimum_modegpt.architectures import resolve
from optimum_modegpt.architectures.shapes import shapes_of
from optimum_modegpt.budget.experts import with_kept_experts
from optimum_modegpt.budget.size_target import Target, resolve_target
from optimum_modegpt.budget.sizes import part_sizes
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.layouts.limits import wide_parts
from optimum_modegpt.stages import compute_device
from optimum_modegpt.walk.checkpoint import Checkpoint
from optimum_modegpt.walk.checks import check_equal_widths, check_plan, check_tensors
from optimum_modegpt.walk.request import Base, Request


def prepare(
    model: PreTrainedModel,
    config: ModeGPTConfig,
    calibration: TokenWindows,
    plan: Plan | None,
    device: torch.device | str | None,
    base: Base | None,
    checkpoint: Checkpoint | None,
    progress: bool,
) -> Request:
    """Resolve the model's family and the target of the size, and validate the tensors and the plan."""
    architecture = resolve(model)
    check_tensors(architecture)
    wide = wide_parts(architecture, config.layout)
    sizes = part_sizes(architecture, config, wide)
    target, remaining = Target.of(config), with_kept_experts(architecture, config)
    if plan is None:
        config = resolve_target(remaining, config, wide)
    else:
        check_plan(plan, sizes)
        if config.layout == "stock":
            check_equal_widths(plan, architecture)
        target, config = None, config.with_sparsity(plan_sparsity(plan, sizes))
    return Request(
        architecture=architecture,
        config=config,
        target=target,
        calibration=calibration,
        sizes=sizes,
        wide=wide,
        shapes=shapes_of(architecture),
        device=compute_device(device, architecture.blocks[0].device),
        base=(base or Base()).completed(model),
        plan=plan,
        checkpoint=checkpoint,
        show_progress=progress,
    )
