"""Resume an interrupted compression from its checkpoint, and write finished work to it."""

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
from optimum_modegpt.calibration.streams import in_batches
from optimum_modegpt.errors import ProcessError
from optimum_modegpt.methods.method import CutBlock, StreamPair
from optimum_modegpt.quantities import dtype_name
from optimum_modegpt.report import Stage
from optimum_modegpt.walk.checkpoint import fingerprint
from optimum_modegpt.walk.record import versions
from optimum_modegpt.walk.request import Request
from optimum_modegpt.walk.state import Measurements, State

ALGORITHM = 3
"""Number of the algorithm. It changes when the same settings give another result."""


@contextmanager
def resuming(request: Request, state: State) -> Iterator[None]:
    """Open the checkpoint, if any, and restore batch size, measurements and warnings of the interrupted run."""
    if request.checkpoint is None:
        yield
        return
    with request.checkpoint.opened(identity(request)) as checkpoint:
        manifest, asked = checkpoint.manifest, request.config.batch_size
        for message in manifest.warnings:
            state.warn(message)
        if asked in (None, manifest.asked_batch_size):  # else the user now wants another one
            state.batch_size = manifest.batch_size or state.batch_size
        manifest.compute_dtype = dtype_name(state.precision.compute)
        manifest.batch_size, manifest.asked_batch_size = state.batch_size, asked or manifest.asked_batch_size
        if manifest.measured:
            state.measurements = Measurements.from_dict(manifest.measured)
        if manifest.seconds:
            state.clock.stages.append(Stage("earlier runs", manifest.seconds, 0))
        yield


def identity(request: Request) -> dict[str, Any]:
    """Return the settings that must be equal for a run to resume and end bit-identical, safe for JSON."""
    model, config = request.architecture.model, request.config
    inputs = {
        "model": fingerprint(model),
        "calibration": hashlib.sha256(request.calibration.tokens.cpu().numpy().tobytes()).hexdigest(),
    }
    _check_equal_on_all_ranks(inputs)
    settings: dict[str, Any] = {
        **inputs,
        "revision": request.base.revision,
        "attention": model.config._attn_implementation,
    }
    for name, value in config.to_dict().items():
        if name != "batch_size":
            settings[f"configuration, {name}"] = value
    settings["algorithm"] = ALGORITHM
    settings["plan"] = None if request.plan is None else request.plan.to_list()
    settings["processes"] = distributed.world_size()
    machine = {"device": request.device.type, "threads": torch.get_num_threads(), "versions": versions()}
    settings |= machine
    for number, other in enumerate(distributed.all_gather_object(machine)[1:], start=2):
        for name, value in other.items():
            settings[f"process {number}, {name}"] = value
    return settings


def _check_equal_on_all_ranks(inputs: dict[str, str]) -> None:
    """Raise if another rank has read another model or another text."""
    for number, other in enumerate(distributed.all_gather_object(inputs), start=1):
        if different := [name for name in inputs if other[name] != inputs[name]]:
            raise ProcessError(
                f"processes {distributed.rank() + 1} and {number} have not read the same {' and '.join(different)}; on "
                "all machines model, revision and text have to be the same."
            )


def known_plan(request: Request) -> Plan | None:
    """Return the caller's plan, or the plan of the interrupted run, or None if neither exists."""
    if request.plan is not None or request.checkpoint is None or request.checkpoint.manifest.plan is None:
        return request.plan
    return Plan.from_list(request.checkpoint.manifest.plan)


def keep_plan(request: Request, state: State, plan: Plan | None) -> None:
    """Write the measurements so far, and the plan if it is already made, to the checkpoint, if any."""
    if request.checkpoint is not None:
        widths = None if plan is None else plan.to_list()
        request.checkpoint.keep_plan(widths, state.measurements.to_dict(), state.warnings)


def finished_blocks(
    request: Request, state: State, plan: Plan
) -> tuple[list[nn.Module], list[dict[str, float]], StreamPair]:
    """Return the blocks that the interrupted run finished, their errors, and the streams after them."""
    checkpoint, entering = request.checkpoint, state.inputs.stream
    if checkpoint is None or not checkpoint.finished:
        return [], [], StreamPair(entering, entering)
    modules = []
    for block, widths in zip(request.architecture.blocks[: checkpoint.finished], plan.widths, strict=False):
        home = block.device
        modules.append(checkpoint.restore_block(block.index, block.narrow(widths), home))
    dense, compressed = checkpoint.streams(state.storage.keep)
    dense_batches = in_batches(dense, state.batch_size)
    compressed_batches = dense_batches if compressed is dense else in_batches(compressed, state.batch_size)
    return modules, list(checkpoint.manifest.errors), StreamPair(dense_batches, compressed_batches)


def keep_block(
    request: Request, state: State, block: Block, cut: CutBlock, errors: list[dict[str, float]]
) -> nn.Module:
    """Return the compressed block on the device of the dense one, and write it to the checkpoint, if any.

    If memory is too small for the streams, it is too small for the finished blocks: they are stored in files too.
    """
    home, path = block.device, request.architecture.block_paths[block.index]
    module = state.precision.to_stored(cut.block.module, path)
    if request.checkpoint is not None:
        module = request.checkpoint.keep_block(block.index, module, home)
        request.checkpoint.keep_streams(errors, state.warnings, cut.after.dense, cut.after.compressed)
        return module
    module = module.to(home)
    if state.storage.folder is not None and home == state.storage.device:
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = state.storage.keep(tensor.data)
    return module
