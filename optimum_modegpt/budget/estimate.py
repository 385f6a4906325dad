"""Estimate the memory, disk space and work of a compression from tensor shapes, before any weight is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_modegpt.allocation.plan import total_weights
from optimum_modegpt.allocation.targets import plan_from_targets
from optimum_modegpt.architectures import check_dense, read_blocks
from optimum_modegpt.architectures.shapes import Shapes, shapes_of
from optimum_modegpt.budget.compute_dtype import compute_dtype, float32_weights
from optimum_modegpt.budget.experts import with_kept_experts
from optimum_modegpt.budget.placement import Free, Needs, Placement, choose_placement, finished_size
from optimum_modegpt.budget.size_target import Size, Target, plan_size, resolve_target
from optimum_modegpt.budget.sizes import check_reachable, part_sizes
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.layouts.limits import wide_parts
from optimum_modegpt.methods.cost import ByteCounts, Extent, block_forward
from optimum_modegpt.methods.registry import method_of, work_of
from optimum_modegpt.report import count_parameters, uncut_sentences
from optimum_modegpt.stages import compute_device

LIBRARIES = 12 * 2**20
"""Host bytes that numerical libraries allocate for themselves at their first use (measured: 11 to 20 MiB)."""


@dataclass(frozen=True)
class Estimate:
    """Peak bytes on one machine, and multiply-adds relative to a forward pass of the blocks over calibration tokens."""

    parameters: int  # tied ones count once
    block_parameters: int  # weights of the compressible projections, without the whole experts that are removed
    calibration_tokens: int
    processes: int  # of a distributed run on the machine
    with_accelerator: Placement  # with one accelerator per process
    without: Placement  # if the host computes
    mapped_weights: int  # bytes of memory maps of the model's files, which the system can reclaim
    disk: ByteCounts  # the checkpoint, which is kept until the result is written, and the result
    forward_multiply_adds: int  # of one forward pass
    forward_passes: dict[str, float]  # multiply-adds by step, in units of forward passes
    uncut: tuple[str, ...]  # sentences that name the parts that cannot be cut
    sparsity: float  # the requested one, or the one that reaches the target
    result: Size  # with uniform allocation; another may differ by the rounding of widths
    target: Target | None  # the requested size of the result

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and their sums, safe for JSON."""
        fields = asdict(self)
        for name in ("with_accelerator", "without"):
            for place, needed in fields[name]["needs"].items():
                fields[f"{name}_{place}_total"] = sum(needed.values())
        fields["disk_total"] = sum(self.disk.values())
        fields["forward_passes_total"] = sum(self.forward_passes.values())
        return fields


def estimate(
    model: PreTrainedModel,
    config: ModeGPTConfig,
    sequence_length: int,
    *,
    weights_mapped: bool = True,
    device: torch.device | None = None,
    processes: int = 1,
) -> Estimate:
    """Estimate the needs of the command `compress` for `model`, which may be on the meta device.

    Only tensors are counted. Memory that the allocator caches and the program itself are additional. The weights are
    memory maps of their files (`weights_mapped`) unless their dtype is changed. `device` is the compute device, or None
    for the accelerator if available. `processes` run on this machine, each with its own accelerator.

    Raises:
        AlreadyCompressed, UnsupportedModel, InvalidConfig: as `compress` would.
    """
    architecture = read_blocks(model, check_dense(model.config))
    remaining, target = with_kept_experts(architecture, config), Target.of(config)
    wide = wide_parts(architecture, config.layout)
    config, sizes = resolve_target(remaining, config, wide), part_sizes(remaining, config, wide)
    check_reachable(config, sizes)
    shapes, parameters = shapes_of(architecture), count_parameters(model)
    plan = plan_from_targets([config.sparsity] * len(sizes), sizes)
    size = plan_size(remaining, plan, target.quantization if target else None)
    host, mapped_weights = {"libraries": LIBRARIES}, parameters * model.dtype.itemsize
    if not weights_mapped:
        host["weights"], mapped_weights = mapped_weights, 0
    extent = Extent(config.num_samples, sequence_length, sequence_length, model.dtype.itemsize)

    def place(dtype: torch.dtype, free: Free, *, accelerated: bool) -> Placement:
        own = replace(extent, element=dtype.itemsize)
        held = Needs(host=host if dtype == model.dtype else host | float32_weights(model))
        return choose_placement(shapes, config, own, accelerated=accelerated, free=free, held=held, processes=processes)

    home = torch.device("cpu")
    chosen = compute_device(device, home)
    dtype, on_host = (compute_dtype(model, each, home, processes) for each in (chosen, home))
    free = Free.now(chosen)
    on_accelerator = model.dtype if chosen == home else dtype  # without one, nothing is known about it
    forward = shapes.blocks * block_forward(shapes, extent.windows, sequence_length)
    streams = method_of(config).streams * extent.tokens * shapes.d_model * dtype.itemsize
    finished = finished_size(shapes_of(remaining), config, model.dtype.itemsize)
    return Estimate(
        parameters=parameters,
        block_parameters=total_weights(sizes),
        calibration_tokens=extent.tokens,
        processes=processes,
        with_accelerator=place(on_accelerator, free, accelerated=True),
        without=place(on_host, Free(free.host), accelerated=False),
        mapped_weights=mapped_weights,
        disk=_disk(finished, streams, size.bytes),
        forward_multiply_adds=int(forward),
        forward_passes=_forward_passes(shapes_of(remaining), config, extent, forward),
        uncut=uncut_sentences(wide),
        sparsity=config.sparsity,
        result=size,
        target=target,
    )


def _disk(finished: ByteCounts, streams: int, result: int) -> ByteCounts:
    """Return the bytes of the checkpoint and the result on disk."""
    # New streams are written before the previous ones are deleted.
    return finished | {"residual streams": streams, "result, or the next streams": max(result, streams)}


def _forward_passes(shapes: Shapes, config: ModeGPTConfig, extent: Extent, forward: float) -> dict[str, float]:
    """Return the multiply-adds of every step, in units of those of a `forward` pass."""
    passes = {"experts": 1.0} if config.expert_sparsity else {}
    for steps in work_of(shapes, config, extent).values():
        for name, work in steps.items():
            passes[name] = sum(work.values()) / forward
    return passes


def on_meta(model_class: Any, config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Create the model of a configuration on the meta device, with shapes but no weights.

    `model_class` is an Auto class. `dtype` overrides the dtype of the configuration.
    """
    with torch.device("meta"):
        return model_class.from_config(config, dtype=dtype or config.dtype or torch.get_default_dtype())
