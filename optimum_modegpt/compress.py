"""The walk: resolve, plan, cut block after block, adopt, report. The only place that knows the order."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_modegpt import distributed
from optimum_modegpt.allocation.plan import Plan, plan_sparsity, total_weights
from optimum_modegpt.allocation.sensitivity import plan_from_curves
from optimum_modegpt.allocation.targets import influence_targets, plan_from_targets, uniform_targets
from optimum_modegpt.architectures import Architecture, Block, resolve
from optimum_modegpt.budget.sizes import SPARSITY_TOLERANCE, part_sizes
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.calibration.influence import InfluenceSum
from optimum_modegpt.calibration.streams import Stream, check_dense, map_stream
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.psd import products_of
from optimum_modegpt.errors import IllConditionedWarning, naming
from optimum_modegpt.methods import published, residual_matched, sensitivity
from optimum_modegpt.modeling.adoption import become, built
from optimum_modegpt.modeling.modegpt_common import Widths
from optimum_modegpt.progress import bar
from optimum_modegpt.report import PARTS, Report
from optimum_modegpt.stages import compute_device
from optimum_modegpt.walk.checkpoint import Checkpoint
from optimum_modegpt.walk.checks import (
    check_plan,
    check_reading,
    check_request,
    check_result,
    check_tensors,
)
from optimum_modegpt.walk.record import make_record, make_report, parameters_around
from optimum_modegpt.walk.resume import finished_blocks, keep_block, keep_plan, known_plan, taken_over
from optimum_modegpt.walk.self_check import check_reloads, self_check
from optimum_modegpt.walk.state import Base, Walk

Result = TypeVar("Result")

ENOUGH_WINDOWS = 4
"""Fewer windows than these for the sensitivities' divergence are a warning."""


def compress(
    model: PreTrainedModel,
    config: ModeGPTConfig,
    calibration: TokenWindows,
    *,
    plan: Plan | None = None,
    device: torch.device | str | None = None,
    base: Base | None = None,
    checkpoint: Checkpoint | None = None,
    progress: bool = True,
) -> Report:
    """Compresses `model` in place: at the end the object is of the compressed class; until then it is untouched.

    Args:
        model: a dense causal language model of a known family, with its weights in memory.
        config: what to do.
        calibration: token windows of the model's own vocabulary.
        plan: kept widths by block and part, in place of the configuration's sparsity and allocation.
        device: where to compute, one block at a time; `None` takes the accelerator where there is one.
        base: where the model came from, for the record; what it does not know is taken from the model.
        checkpoint: where finished work is kept, and taken over from a run that was interrupted; `None` keeps it in
            memory. The caller removes it when the result is safe.
        progress: whether to show progress bars.

    Raises:
        AlreadyCompressed, UnsupportedModel, CalibrationDataError, InvalidConfig: before anything is computed.
        CheckpointError: the checkpoint is that of another compression, or in use, or cannot be written.
        NumericalError: with the block and part; the model is as it was.
    """
    architecture = resolve(model)
    device = compute_device(device, architecture.blocks[0].output.weight.device)
    check_tensors(architecture)
    sizes = part_sizes(architecture, config)
    if plan is not None:
        check_plan(plan, sizes)
        config = dataclasses.replace(config, sparsity=plan_sparsity(plan, sizes))
    base = (base or Base()).completed(model)
    walk = Walk(architecture, config, calibration, sizes, device, base, checkpoint, progress)
    check_request(walk)
    numbers = products_of(model.dtype)
    with torch.no_grad(), numbers, evaluation_mode(model), collected_warnings(walk), taken_over(walk, plan):
        recovering(walk, "embed", enter_model)
        plan = plan or known_plan(walk)
        if plan is None:
            plan = recovering(walk, f"allocate ({config.resolved_allocation})", make_plan)
            keep_plan(walk, plan)
        blocks, final_norm, errors = recovering(walk, "decompose", partial(cut_blocks, plan=plan))
    with walk.clock.stage("adopt"):
        achieved = plan_sparsity(plan, sizes)
        parameters = parameters_around(architecture, blocks, total_weights(sizes), achieved)
        record = make_record(walk, achieved, parameters)
        finished = assemble(architecture, blocks, final_norm, plan, record)
    with walk.clock.stage("self-check"), evaluation_mode(finished):
        check_reloads(finished)
        walk.self_check = self_check(finished, calibration.tokens[0])
    become(model, finished)
    return make_report(walk, plan, errors, achieved, parameters)


def recovering(walk: Walk, name: str, work: Callable[[Walk], Result]) -> Result:
    """Runs a stage. Where memory does not suffice it starts again, once, with half the batch size.

    That is kept for the stages after it. Several processes do not recover: the others would wait for this one's sums.
    """
    with walk.clock.stage(name):
        try:
            return work(walk)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or walk.batch_size == 1 or distributed.world_size() > 1:
                raise
        # Only here is the memory free: while an error is handled its traceback holds the tensors.
        halved = walk.batch_size // 2
        walk.warn(f"{name}: out of memory with batch_size={walk.batch_size}; started again with {halved}.")
        walk.halve_batches()
        return work(walk)


def out_of_memory(error: Exception) -> bool:
    """Whether an accelerator or the host had no memory left; torch has no error of its own for the host's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


# embed


def enter_model(walk: Walk) -> None:
    """The calibration tokens, as they enter the first block."""
    walk.front = walk.enter(walk.calibration.tokens)
    check_reading(walk)


# plan


def make_plan(walk: Walk) -> Plan:
    """Kept widths by block and part, by the configuration's allocation; a miss of the target is a warning."""
    config, sizes, blocks = walk.config, walk.sizes, len(walk.architecture.blocks)
    if config.sparsity == 0:
        return [{part: size.dense for part, size in block.items()} for block in sizes]
    if config.resolved_allocation == "sensitivity":
        measure_sensitivities(walk)
        plan = plan_from_curves(walk.curves, sizes, config.sparsity)
    elif config.resolved_allocation == "influence":
        walk.influences = measure_influences(walk)
        targets = influence_targets(
            walk.influences, config.sparsity, temperature=config.influence_temperature, cap=config.max_sparsity
        )
        plan = plan_from_targets(targets, sizes)
    else:
        plan = plan_from_targets(uniform_targets(blocks, config.sparsity), sizes)
    if abs((achieved := plan_sparsity(plan, sizes)) - config.sparsity) > SPARSITY_TOLERANCE:
        walk.warn(
            f"the widths allowed by round_to={config.round_to!r} give a sparsity of {achieved:.4f}, "
            f"not the requested {config.sparsity:.4f}."
        )
    return plan


def measure_sensitivities(walk: Walk) -> None:
    """How much each part of each block matters; what is measured is kept as it comes."""
    tokens, blocks = walk.calibration.tokens, len(walk.architecture.blocks)
    walk.budget = sensitivity.budget(blocks, len(tokens))
    if walk.budget.divergence_windows < min(ENOUGH_WINDOWS, len(tokens) // 3):
        walk.warn(
            f"with {blocks} blocks the sensitivities are measured on {walk.budget.divergence_windows} window(s) at "
            f"{len(walk.budget.ratios)} ratios, to stay near the cost of the rest; the plan is noisier for it."
        )
    moments, divergence = sensitivity.split(len(tokens), walk.budget)
    sweeps = sensitivity.Sweeps(
        walk.architecture,
        walk.sizes,
        walk.config,
        walk.budget.ratios,
        moments=walk.enter(tokens[moments], first=moments.start),
        divergence=walk.enter(tokens[divergence], first=divergence.start),
        device=walk.device,
    )
    for curves in sweeps.measured(walk.curves, progress=walk.progress):
        walk.curves |= curves
        keep_plan(walk, None)


def measure_influences(walk: Walk) -> list[float]:
    """Block influence of every block, over all calibration windows."""
    stream, influences = walk.front.stream, []
    for block in bar(walk.architecture.blocks, desc="influences", unit="block", shown=walk.progress):
        total = InfluenceSum()
        dense, arguments = block.on(walk.device), walk.front.on(block.index, walk.device)
        stream = list(map_stream(partial(influenced, dense, arguments, total), walk.device, stream))
        with naming(f"block {block.index}"):
            check_dense(stream, walk.front.windows)
            influences.append(total.value())
    return influences


def influenced(block: Block, arguments: dict[str, Any], total: InfluenceSum, entering: Tensor) -> Tensor:
    """The block's output; how much it turned the stream is added to `total`."""
    output = block.forward(entering, arguments)
    total.add(entering, output)
    return output


# decompose


def cut_blocks(walk: Walk, plan: Plan) -> tuple[list[nn.Module], nn.Module | None, list[dict[str, float]]]:
    """The compressed blocks, the final norm, and the relative errors by block and part. The model is not touched."""
    step = matched_step if walk.config.method == "default" else published_step
    widths = [Widths(ranks["qk"], ranks["vo"], ranks["mlp"]) for ranks in plan]
    modules, errors, dense, compressed = finished_blocks(walk, widths)
    blocks = walk.architecture.blocks
    total, finished = len(blocks), len(modules)
    with bar(desc="decompose", unit="block", total=total, initial=finished, shown=walk.progress) as shown:
        for block in blocks[finished:]:
            arguments = walk.front.on(block.index, walk.device)
            with naming(f"block {block.index}"):
                student, error, dense, compressed = step(walk, block, dense, compressed, widths[block.index], arguments)
                check_result(error, compressed, walk.front.windows)
            errors.append(error)
            modules.append(keep_block(walk, block, student.module, errors, (dense, compressed)))
            shown.set_postfix({part: f"{value:.3f}" for part, value in error.items()}, refresh=False)
            shown.update()
    final_norm = copy.deepcopy(walk.architecture.final_norm)
    if walk.config.method == "default" and final_norm is not None and compressed is not dense:
        final_norm = final_norm.to(walk.device)
        head, dense_norm = walk.architecture.head(walk.device), copy.deepcopy(final_norm)
        residual_matched.match_output(final_norm, head, dense, compressed, dense_norm)
        final_norm = final_norm.to(blocks[-1].output.weight.device)
    return modules, final_norm, errors


def matched_step(
    walk: Walk, block: Block, dense: Stream, compressed: Stream, widths: Widths, arguments: dict[str, Any]
) -> tuple[Block, dict[str, float], Stream, Stream]:
    """One block of the default method; a block is left exactly as it is while nothing before it was cut."""
    original = block.on(walk.device)
    student = original.student(walk.device)
    targets = residual_matched.run_dense(original, dense, arguments)
    check_dense(targets.after, walk.front.windows)
    if widths == block.dense_widths and compressed is dense:
        return student, dict.fromkeys(PARTS, 0.0), targets.after, targets.after
    errors, after = residual_matched.compress_block(
        student,
        dense,
        compressed,
        targets,
        widths,
        arguments=arguments,
        config=walk.config,
        keep_derivatives=walk.keep_derivatives,
    )
    return student, errors, targets.after, after


def published_step(
    walk: Walk, block: Block, dense: Stream, compressed: Stream, widths: Widths, arguments: dict[str, Any]
) -> tuple[Block, dict[str, float], Stream, Stream]:
    """One block of the published method: one shot, the dense stream alone; `compressed` is the same stream."""
    original = block.on(walk.device)
    moments, after = published.observe(original, dense, arguments)
    check_dense(after, walk.front.windows)
    student = original.student(walk.device)
    if widths == block.dense_widths:
        return student, dict.fromkeys(PARTS, 0.0), after, after
    return student, published.compress_block(student, moments, widths, walk.config), after, after


# adopt


def assemble(
    architecture: Architecture,
    blocks: list[nn.Module],
    final_norm: nn.Module | None,
    plan: Plan,
    record: dict[str, Any],
) -> PreTrainedModel:
    """Build the compressed model; it shares the tensors that were not compressed with the user's model."""
    widths = [Widths(ranks["qk"], ranks["vo"], ranks["mlp"]) for ranks in plan]
    model, classes = architecture.model, architecture.classes
    config = classes.config.from_dense(model.config, widths, record)
    config.tie_word_embeddings = architecture.head_is_tied  # the model's own configuration may say otherwise
    base = f"{model.base_model_prefix}." if model.base_model is not model else ""
    replacements = {f"{base}{classes.family.blocks}.{index}": block for index, block in enumerate(blocks)}
    if final_norm is not None:
        replacements[f"{base}{classes.family.head.norm}"] = final_norm
    return built(model, classes.causal_lm, config, replacements)


# helpers


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off inside, the modes of all modules back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def collected_warnings(walk: Walk) -> Iterator[None]:
    """Notes every numerical fallback for the report; other warnings go their way."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", IllConditionedWarning)
        show = warnings.showwarning

        def noted(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, IllConditionedWarning):
                walk.warn(str(message))
            else:
                show(message, category, *place, **more)

        warnings.showwarning = noted
        yield
