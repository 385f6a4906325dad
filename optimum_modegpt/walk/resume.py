"""Going on after an interruption: what a checkpoint is given, and what is taken over from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from optimum_modegpt import distributed
from optimum_modegpt.allocation.plan import Plan
from optimum_modegpt.architectures import Block
from optimum_modegpt.calibration.streams import Stream, in_batches
from optimum_modegpt.errors import ProcessError
from optimum_modegpt.methods import sensitivity
from optimum_modegpt.modeling.modegpt_common import Widths
from optimum_modegpt.report import Stage
from optimum_modegpt.walk.checkpoint import Progress, fingerprint
from optimum_modegpt.walk.record import versions
from optimum_modegpt.walk.state import Walk


@contextmanager
def taken_over(walk: Walk, plan: Plan | None) -> Iterator[None]:
    """The checkpoint, where there is one, opened for this compression; what was warned of before is warned of again."""
    if walk.checkpoint is None:
        yield
        return
    with walk.checkpoint.opened(identity(walk, plan)) as checkpoint:
        for message in checkpoint.progress.warnings:
            walk.warn(message)
        take_batch_size(walk, checkpoint.progress)
        if checkpoint.progress.seconds:
            walk.clock.stages.append(Stage("earlier runs", checkpoint.progress.seconds, 0))
        yield


def take_batch_size(walk: Walk, progress: Progress) -> None:
    """That of the interrupted run, unless another is asked for now: it may have been too large."""
    asked = walk.config.batch_size
    if asked in (None, progress.asked_batch_size):
        walk.batch_size = progress.batch_size or walk.batch_size
    progress.batch_size, progress.asked_batch_size = walk.batch_size, asked or progress.asked_batch_size


def identity(walk: Walk, plan: Plan | None) -> dict[str, Any]:
    """What has to be the same for unfinished work to be taken over and end in the same bits, safe for JSON."""
    model = walk.architecture.model
    read = {
        "model": fingerprint(model),
        "calibration": hashlib.sha256(walk.calibration.tokens.cpu().numpy().tobytes()).hexdigest(),
    }
    check_alike(read)
    own = {"device": walk.device.type, "threads": torch.get_num_threads(), "versions": versions()}
    configuration = {name: value for name, value in walk.config.to_dict().items() if name != "batch_size"}
    return {
        **read,
        "revision": walk.base.revision,
        "attention": model.config._attn_implementation,
        **{f"configuration, {name}": value for name, value in configuration.items()},
        "plan": plan,
        "processes": distributed.world_size(),
        **own,
        **{
            f"process {number}, {name}": value
            for number, other in enumerate(distributed.all_gather_object(own)[1:], start=2)
            for name, value in other.items()
        },
    }


def check_alike(read: dict[str, str]) -> None:
    """Refuses processes that have not read the same."""
    for number, other in enumerate(distributed.all_gather_object(read), start=1):
        if different := [name for name in read if other[name] != read[name]]:
            raise ProcessError(
                f"processes {distributed.rank() + 1} and {number} have not read the same {' and '.join(different)}; on "
                "all machines model, revision and text have to be the same."
            )


def known_plan(walk: Walk) -> Plan | None:
    """The plan of the interrupted run, None where it had none; what it measured for it is known from here on."""
    if walk.checkpoint is None or not (measured := walk.checkpoint.progress.measured):
        return None
    for name, curve in measured["sensitivities"].items():
        block, _, part = name.partition(".")
        walk.curves[int(block), part] = [(sparsity, divergence) for sparsity, divergence in curve]
    if budget := measured["sensitivity_budget"]:
        walk.budget = sensitivity.Budget(**{**budget, "ratios": tuple(budget["ratios"])})
    walk.influences = measured["influences"]
    return walk.checkpoint.progress.plan


def keep_plan(walk: Walk, plan: Plan | None) -> None:
    """Writes what was measured until now, and the plan where it is made."""
    if walk.checkpoint is not None:
        walk.checkpoint.keep_plan(plan, walk.measured(), walk.warnings)


def finished_blocks(walk: Walk, widths: list[Widths]) -> tuple[list[nn.Module], list[dict[str, float]], Stream, Stream]:
    """The blocks that the interrupted run finished, their errors, and both streams after them."""
    checkpoint, blocks, entering = walk.checkpoint, walk.architecture.blocks, walk.front.stream
    if checkpoint is None or not checkpoint.finished:
        return [], [], entering, entering
    modules = [
        checkpoint.restore_block(block.index, block.narrow(width), block.output.weight.device)
        for block, width in zip(blocks[: checkpoint.finished], widths, strict=False)
    ]
    dense, compressed = checkpoint.streams(walk.place.keep)
    before = in_batches(dense, walk.batch_size)
    after = before if compressed is dense else in_batches(compressed, walk.batch_size)
    return modules, list(checkpoint.progress.errors), before, after


def keep_block(
    walk: Walk, block: Block, module: nn.Module, errors: list[dict[str, float]], streams: tuple[Stream, Stream]
) -> nn.Module:
    """A finished block, back where the dense one is; written at once, where there is a checkpoint.

    Where memory is too small for the streams, it is for the finished blocks: they go into files like them.
    """
    home = block.output.weight.device
    if walk.checkpoint is None:
        module = module.to(home)
        if walk.place.folder is not None and home == walk.place.device:
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = walk.place.keep(tensor.data)
        return module
    module = walk.checkpoint.keep_block(block.index, module, home)
    walk.checkpoint.keep_streams(errors, walk.warnings, *streams)
    return module
