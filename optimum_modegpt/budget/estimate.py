"""Estimate the memory, disk space and work of a compression from tensor shapes, before any weight is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_modegpt.architectures import check_model_type, read_blocks
from optimum_modegpt.budget.memory import ByteCounts
from optimum_modegpt.budget.placement import Arrangement, Free, Needs, arrange, finished_size, host_memory
from optimum_modegpt.budget.sizes import check_reachable, part_sizes
from optimum_modegpt.budget.work import Extent, block_forward, shapes_of, work_of
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.stages import compute_device

LIBRARIES = 12 * 2**20
"""Host bytes that numerical libraries allocate for themselves at their first use (measured: 11 to 20 MiB)."""


@dataclass(frozen=True)
class Estimate:
    """Peak bytes on one machine, and multiply-adds relative to a forward pass of the blocks over calibration tokens.

    Attributes:
        parameters: number of parameters of the model. Tied ones count once.
        block_parameters: number of weights of the compressible projections.
        calibration_tokens: number of calibration tokens.
        processes: number of processes of a distributed run on the machine.
        with_accelerator: storage of the streams and bytes needed in addition to the programs themselves, with one
            accelerator per process. Its size is that of the present accelerator, else unknown. Bytes on the host and in
            files are the sum over processes.
        without: the same without an accelerator, if the host computes.
        mapped_weights: bytes of memory maps of the model's files. They count as resident size while they are in use,
            but the system can reclaim the pages if memory is short.
        disk: bytes of the checkpoint next to the output, and of the result. Files of streams are additional.
        forward_multiply_adds: multiply-adds of one forward pass.
        forward_passes: step -> its multiply-adds in units of forward passes.
    """

    parameters: int
    block_parameters: int
    calibration_tokens: int
    processes: int
    with_accelerator: Arrangement
    without: Arrangement
    mapped_weights: int
    disk: ByteCounts
    forward_multiply_adds: int
    forward_passes: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and their sums, safe for JSON."""
        sums = {
            f"{name}_{place}_total": sum(needed.values())
            for name in ("with_accelerator", "without")
            for place, needed in vars(getattr(self, name).needs).items()
        }
        totals = {"disk_total": sum(self.disk.values()), "forward_passes_total": sum(self.forward_passes.values())}
        return {**asdict(self), **sums, **totals}


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

    Only tensors are counted. Memory that the allocator caches and the program itself are additional.

    Args:
        model: the dense model.
        config: the settings of the compression.
        sequence_length: tokens per calibration window.
        weights_mapped: whether the weights are memory maps of their files, as they are if the dtype is not changed.
        device: the compute device. None chooses the accelerator if available.
        processes: number of processes on this machine, each with its own accelerator if available.

    Raises:
        AlreadyCompressed, UnsupportedModel, InvalidConfig: as `compress` would.
    """
    architecture = read_blocks(model, check_model_type(model.config.model_type))
    check_reachable(config, part_sizes(architecture, config))
    shapes = shapes_of(architecture)
    element, weights = model.dtype.itemsize, shapes.blocks * shapes.weights
    parameters = sum(parameter.numel() for parameter in model.parameters())
    loaded = {"libraries": LIBRARIES, **({} if weights_mapped else {"weights": parameters * element})}
    finished = finished_size(shapes, config, element)
    with_accelerator, without = (
        arrange(
            shapes,
            config,
            extent=Extent(config.num_samples, sequence_length, sequence_length, element),
            accelerated=accelerated,
            free=Free.beside(compute_device(device, torch.device("cpu"))) if accelerated else Free(host_memory()),
            besides=Needs(host=loaded),
            processes=processes,
        )
        for accelerated in (True, False)
    )
    extent = Extent(config.num_samples, sequence_length, with_accelerator.batch_size * sequence_length, element)
    streams = (2 if config.method == "default" else 1) * extent.tokens * shapes.d_model * element
    forward = shapes.blocks * block_forward(shapes, extent.windows, sequence_length)
    return Estimate(
        parameters=parameters,
        block_parameters=weights,
        calibration_tokens=extent.tokens,
        processes=processes,
        with_accelerator=_on_machine(with_accelerator, processes),
        without=_on_machine(without, processes),
        mapped_weights=parameters * element if weights_mapped else 0,
        disk=_disk(int((parameters - config.sparsity * weights) * element), finished, streams),
        forward_multiply_adds=int(forward),
        forward_passes={
            name: step.total / forward
            for steps in work_of(shapes, config, extent).values()
            for name, step in steps.items()
        },
    )


def _on_machine(arrangement: Arrangement, processes: int) -> Arrangement:
    """Multiply the host and file bytes of one process by the number of processes. They do not share an accelerator."""
    host, files = (
        {name: processes * size for name, size in parts.items()}
        for parts in (arrangement.needs.host, arrangement.needs.files)
    )
    return replace(arrangement, needs=replace(arrangement.needs, host=host, files=files))


def _disk(result: int, finished: ByteCounts, streams: int) -> ByteCounts:
    """Return the bytes on disk by purpose.

    The checkpoint is kept until the result is written. New streams are written before the previous ones are deleted.
    """
    return {**finished, "residual streams": streams, "result, or the next streams": max(result, streams)}


def on_meta(model_class: Any, config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Create the model of a configuration on the meta device, with shapes but no weights.

    `model_class` is an Auto class. `dtype` overrides the dtype of the configuration.
    """
    with torch.device("meta"):
        return model_class.from_config(config, dtype=dtype or config.dtype or torch.get_default_dtype())
