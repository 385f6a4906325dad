"""What compressing a model would take: a calculation from shapes, before any weight is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_modegpt.architectures import check_model_type, read_blocks
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.methods.memory import Parts
from optimum_modegpt.methods.placement import Arrangement, Free, Needs, arrange, finished_size, host_memory
from optimum_modegpt.methods.work import Extent, block_forward, shapes_of, work_of
from optimum_modegpt.stages import compute_device
from optimum_modegpt.walk.checks import check_reachable, part_sizes

LIBRARIES = 12 * 2**20
"""Bytes on the host that numerical libraries take for themselves once they compute; measured 11 to 20 MiB."""


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a machine; multiply-adds in units of a forward pass of the blocks over calibration tokens.

    Attributes:
        parameters: of the model, tied ones once.
        block_parameters: those of the projections that can be cut.
        calibration_tokens: all of them.
        processes: how many compress it together on the machine.
        with_accelerator: where streams are kept and what is needed, above the programs themselves, with an accelerator
            for each process: such as the one that is there, else of unknown size. What is needed on the host and in
            files is the sum over the processes.
        without: the same where the host computes as well.
        mapped_weights: memory maps of the model's files: they count as resident size while they are in use, but the
            system takes the pages back where memory is short.
        disk: the unfinished work beside the output, and the result; files of streams come on top.
        forward_multiply_adds: of one forward pass.
        forward_passes: how many of them the steps are worth.
    """

    parameters: int
    block_parameters: int
    calibration_tokens: int
    processes: int
    with_accelerator: Arrangement
    without: Arrangement
    mapped_weights: int
    disk: Parts
    forward_multiply_adds: int
    forward_passes: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """All of it and the sums, safe for JSON."""
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
    """What the command `compress` would need for `model`, which may stand on the meta device.

    Counted are tensors: what the allocator keeps back of freed ones, and the program itself, come on top.

    Args:
        model: the dense model.
        config: what to do.
        sequence_length: tokens of a calibration window.
        weights_mapped: whether the weights stay in their files, as they do when they are loaded as they are stored.
        device: where to compute; None takes the accelerator where there is one.
        processes: how many are started together on this machine, each with an accelerator of its own where there are.

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
    """With what all processes need together, where one of them needs this; they share no accelerator."""
    host, files = (
        {name: processes * size for name, size in parts.items()}
        for parts in (arrangement.needs.host, arrangement.needs.files)
    )
    return replace(arrangement, needs=replace(arrangement.needs, host=host, files=files))


def _disk(result: int, finished: Parts, streams: int) -> Parts:
    """The checkpoint stays until the result is written; streams are replaced by later ones that are written first."""
    return {**finished, "residual streams": streams, "result, or the next streams": max(result, streams)}


def on_meta(model_class: Any, config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a configuration with shapes and no weights; `model_class` is an Auto class, `dtype` replaces its."""
    with torch.device("meta"):
        return model_class.from_config(config, dtype=dtype or config.dtype or torch.get_default_dtype())
