"""The walk: resolve, plan, cut block after block, adopt, report. The only place that knows the order."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from optimum_modegpt import processes
from optimum_modegpt.allocation.plan import (
    Plan,
    Sizes,
    head_step,
    largest_sparsity,
    mlp_step,
    part_size,
    plan_sparsity,
    total_weights,
)
from optimum_modegpt.allocation.sensitivity import plan_from_curves
from optimum_modegpt.allocation.targets import influence_targets, plan_from_targets, uniform_targets
from optimum_modegpt.architectures import Architecture, Block, resolve
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.calibration.influence import InfluenceSum
from optimum_modegpt.calibration.streams import Front, Place, Stream, enter, in_batches, kept
from optimum_modegpt.checkpoint import Checkpoint, fingerprint
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.psd import products_of
from optimum_modegpt.errors import (
    CalibrationDataError,
    CheckpointError,
    IllConditionedWarning,
    InvalidConfig,
    NumericalError,
    UnsupportedModel,
    naming,
)
from optimum_modegpt.methods import published, residual_matched, sensitivity
from optimum_modegpt.methods.placement import Arrangement, Free, Needs, Streams, arrange
from optimum_modegpt.methods.work import Extent, Shapes, product_seconds, shapes_of, work_of
from optimum_modegpt.modeling.adoption import adopt
from optimum_modegpt.modeling.modegpt_common import FORMAT_VERSION, Widths
from optimum_modegpt.report import PARTS, BlockReport, Parameters, PartReport, Report, Stage, count_parameters
from optimum_modegpt.stages import StageClock, compute_device, product_rates

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

SPARSITY_TOLERANCE = 0.005
"""A plan that misses the requested sparsity by more is a warning."""
DISTINCT_SHARE = 0.9
"""A smaller share of distinct calibration windows is a warning."""
ENOUGH_WINDOWS = 4
"""Fewer windows than these for the sensitivities' divergence are a warning."""
READING_TOLERANCE = 1e-3
"""Largest relative difference between a block's own forward pass and our reading of it."""


@dataclass(frozen=True)
class Base:
    """Where a dense model came from: a name of the Hub, or of a folder the last part of its path; and the commit."""

    model: str | None = None
    revision: str | None = None

    def completed(self, model: PreTrainedModel) -> Base:
        """With what `model` itself remembers in place of what is not known."""
        name = getattr(model.config, "_name_or_path", None) or None
        own = Path(name).name if name and os.path.isdir(name) else name
        return Base(self.model or own, self.revision or getattr(model.config, "_commit_hash", None))


@dataclass
class Walk:
    """What one compression carries from stage to stage."""

    architecture: Architecture
    config: ModeGPTConfig
    calibration: TokenWindows
    device: torch.device
    progress: bool
    clock: StageClock
    warnings: list[str] = field(default_factory=list)
    curves: dict[tuple[int, str], list[tuple[float, float]]] = field(default_factory=dict)
    influences: list[float] = field(default_factory=list)
    budget: sensitivity.Budget | None = None
    checkpoint: Checkpoint | None = None
    shapes: Shapes = field(init=False)
    """Of the dense model, taken before it changes."""
    batch_size: int = field(init=False)
    """Windows per forward pass; halved where memory does not suffice."""
    streams: Streams = field(init=False)
    """Where the residual streams are kept, and `place`, the same as a place."""
    place: Place = field(init=False)

    def __post_init__(self) -> None:
        self.shapes = shapes_of(self.architecture.model, self.architecture.family)
        arrangement = arranged(self)
        host, folder = torch.device("cpu"), Path(tempfile.gettempdir())
        files = Place(host, folder if self.checkpoint is None else self.checkpoint.folder)
        self.batch_size, self.streams = arrangement.batch_size, arrangement.streams
        self.place = {"device": Place(self.device), "host": Place(host), "files": files}[self.streams]

    def warn(self, message: str) -> None:
        """Logs a warning and keeps it for the report, once."""
        if message not in self.warnings:
            logger.warning(message)
            self.warnings.append(message)

    def measured(self) -> dict[str, Any]:
        """What the plan was made from, safe for JSON."""
        budget = {} if self.budget is None else {**vars(self.budget), "ratios": list(self.budget.ratios)}
        curves = {f"{block}.{part}": [list(point) for point in curve] for (block, part), curve in self.curves.items()}
        return {"sensitivities": curves, "sensitivity_budget": budget, "influences": self.influences}


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
    walk = Walk(architecture, config, calibration, device, progress, StageClock(device), checkpoint=checkpoint)
    check_request(walk, sizes)
    numbers = products_of(model.dtype)
    with torch.no_grad(), numbers, evaluation_mode(model), collected_warnings(walk), taken_over(walk, plan):
        with walk.clock.stage("embed"):
            front = enter(architecture, calibration.tokens, walk.batch_size, walk.place)
            check_reading(walk, front)
        if plan is None:
            plan = known_plan(walk)
        if plan is None:
            plan = recovering(walk, f"allocate ({config.resolved_allocation})", front, partial(make_plan, sizes=sizes))
            keep_plan(walk, plan)
        blocks, final_norm, errors = recovering(walk, "decompose", front, partial(cut_blocks, plan=plan))
    with walk.clock.stage("adopt"):
        achieved = plan_sparsity(plan, sizes)
        parameters = parameters_around(architecture, blocks, total_weights(sizes), achieved)
        record = make_record(walk, achieved, parameters, (base or Base()).completed(model))
        install(architecture, blocks, final_norm, plan, record)
    return make_report(walk, sizes, plan, errors, record, parameters)


# before the work


def arranged(walk: Walk) -> Arrangement:
    """Where streams are kept and how many windows go at once, by what memory is free.

    Finished blocks go where the dense ones are; those of the host take no memory where streams or a checkpoint are in
    files.
    """
    model, config = walk.architecture.model, walk.config
    element, length = model.dtype.itemsize, walk.calibration.tokens.shape[1]
    finished = int((1 - config.sparsity) * walk.shapes.blocks * walk.shapes.weights * element)
    on_host = walk.architecture.blocks[0].output.weight.device.type == "cpu"
    held = {} if on_host and walk.checkpoint is not None else {"finished blocks": finished}
    free = Free.beside(walk.device)
    return arrange(
        walk.shapes,
        config,
        windows=-(-len(walk.calibration.tokens) // processes.count()),
        length=length,
        element=element,
        accelerated=walk.device.type != "cpu",
        free=dataclasses.replace(free, host=free.host // processes.count()),
        besides=Needs(files=held) if on_host else Needs(device=held),
    )


def part_sizes(architecture: Architecture, config: ModeGPTConfig) -> Sizes:
    """What can be cut where: dense widths, weights per unit of width, grids."""

    def sizes(block: Block) -> dict[str, Any]:
        dense, d_model, cap = block.dense_widths, block.down.out_features, config.max_sparsity
        head_unit = (block.heads + block.kv_heads) * d_model
        mlp_unit = (len(block.layout.mlp_inputs) + 1) * d_model
        qk_step = head_step(dense.qk, config.round_to, pairs=block.rotary)
        vo_step = head_step(dense.vo, config.round_to, pairs=False)
        return {
            "mlp": part_size(dense.mlp, mlp_unit, mlp_step(dense.mlp, config.round_to), cap),
            "qk": part_size(dense.qk, head_unit, qk_step, cap),
            "vo": part_size(dense.vo, head_unit, vo_step, cap),
        }

    return [sizes(block) for block in architecture.blocks]


def check_request(walk: Walk, sizes: Sizes) -> None:
    """What can be refused before any computing is refused here."""
    tokens, config, model = walk.calibration.tokens, walk.config, walk.architecture.model
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and tokens.shape[1] > context:
        raise CalibrationDataError(
            f"calibration windows have {tokens.shape[1]} tokens, the model's context is {context}; "
            f"set sequence_length to {context} or less."
        )
    check_reachable(config, sizes)
    if len(tokens) < processes.count():
        raise CalibrationDataError(
            f"{len(tokens)} calibration windows cannot be shared among {processes.count()} processes; start at most "
            f"{len(tokens)}, or calibrate on more windows with num_samples."
        )
    if (distinct := len(tokens.unique(dim=0))) < DISTINCT_SHARE * len(tokens):
        walk.warn(
            f"only {distinct} of the {len(tokens)} calibration windows differ: the text repeats itself, and the model "
            "will be good at nothing else. Calibrate on varied text like that which the model will see."
        )
    widest = max(block["mlp"].dense for block in sizes)
    if tokens.numel() < widest:
        walk.warn(
            f"only {tokens.numel()} calibration tokens for an MLP width of {widest}: the moments are rank deficient. "
            f"Use at least {widest} tokens, better {4 * widest}."
        )


def check_reachable(config: ModeGPTConfig, sizes: Sizes) -> None:
    """Refuses a sparsity above what the widths allow."""
    if (limit := largest_sparsity(sizes)) + SPARSITY_TOLERANCE < config.sparsity:
        raise InvalidConfig(
            f"sparsity={config.sparsity} cannot be reached: with max_sparsity={config.max_sparsity} and "
            f"round_to={config.round_to!r} at most {limit:.3f} can be removed from this model."
        )


def check_plan(plan: Plan, sizes: Sizes) -> None:
    """A plan from outside must have every part of every block at an allowed width."""
    if len(plan) != len(sizes):
        raise InvalidConfig(f"the plan has {len(plan)} blocks, the model {len(sizes)}.")
    for index, (ranks, block) in enumerate(zip(plan, sizes, strict=True)):
        if set(ranks) != set(block):
            raise InvalidConfig(f"plan, block {index}: parts {sorted(ranks)}, expected {sorted(block)}.")
        for part, size in block.items():
            if ranks[part] not in size.widths():
                raise InvalidConfig(
                    f"plan, block {index}: {part} width {ranks[part]}; allowed are {size.dense} and the multiples of "
                    f"{size.step} from {size.floor} up to it (round_to and max_sparsity of the configuration)."
                )


def check_reading(walk: Walk, front: Front) -> None:
    """Compares every block's own forward pass with that of its compressed class at full width, on one window.

    A block that computes something else than its family's would come out of the walk as something it never was.
    """
    window = front.stream[0][:1].to(walk.device)
    for block in walk.architecture.blocks:
        arguments = front.on(block.index, walk.device)
        own = block.on(walk.device).forward(window, arguments)
        ours = block.student(walk.device).composed_forward(window, arguments)
        if not own.isfinite().all():
            raise NumericalError(
                f"block {block.index}: its output is not finite on the calibration text. Load the model in bfloat16 or "
                "float32, or check its weights."
            )
        difference = float((own.float() - ours.float()).norm() / own.float().norm().clamp_min(1e-30))
        if difference > max(READING_TOLERANCE, 10 * torch.finfo(own.dtype).eps):
            raise UnsupportedModel(
                f"{type(walk.architecture.model).__name__}, block {block.index} computes something else than its "
                f"family's norm, attention, norm, MLP (relative difference {difference:.1e}); this variant is not "
                "supported."
            )
        window = own


def check_tensors(architecture: Architecture) -> None:
    """Refuses a model with tensors that its compressed class would not have."""
    family, config = architecture.family, architecture.model.config
    widths = [block.dense_widths for block in architecture.blocks]
    model_class: Any = family.models["AutoModelForCausalLM"]
    with torch.device("meta"):
        known = model_class(family.config.from_dense(config, widths, {"format_version": FORMAT_VERSION})).state_dict()
    if unknown := sorted(architecture.model.state_dict().keys() - known.keys()):
        raise UnsupportedModel(
            f"{type(architecture.model).__name__} has tensors that its family does not: {', '.join(unknown[:5])}"
            f"{' …' if len(unknown) > 5 else ''}. Compress the plain model."
        )


def recovering(walk: Walk, name: str, front: Front, work: Callable[[Walk, Front], Result]) -> Result:
    """Runs a stage. Where the device's memory does not suffice it starts again, once, with half the batch size.

    That is kept for the stages after it. Several processes do not recover: the others would wait for this one's sums.
    """
    front = dataclasses.replace(front, stream=in_batches(front.stream, walk.batch_size))
    with walk.clock.stage(name):
        try:
            return work(walk, front)
        except torch.OutOfMemoryError:
            if walk.batch_size == 1 or processes.count() > 1:
                raise
        # Only here is the memory free: while an error is handled its traceback holds the tensors.
        halved = walk.batch_size // 2
        walk.warn(f"{name}: out of memory with batch_size={walk.batch_size}; started again with {halved}.")
        walk.batch_size = halved
        if walk.checkpoint is not None:
            walk.checkpoint.keep_batch_size(halved)
        return work(walk, dataclasses.replace(front, stream=in_batches(front.stream, halved)))


# plan


def make_plan(walk: Walk, front: Front, sizes: Sizes) -> Plan:
    """Kept widths by block and part, by the configuration's allocation; a miss of the target is a warning."""
    config, blocks = walk.config, len(walk.architecture.blocks)
    if config.sparsity == 0:
        return [{part: size.dense for part, size in block.items()} for block in sizes]
    if config.resolved_allocation == "sensitivity":
        walk.budget = sensitivity.budget(blocks, len(walk.calibration.tokens))
        if walk.budget.divergence_windows < min(ENOUGH_WINDOWS, len(walk.calibration.tokens) // 3):
            walk.warn(
                f"with {blocks} blocks the sensitivities are measured on {walk.budget.divergence_windows} window(s) at "
                f"{len(walk.budget.ratios)} ratios, to stay near the cost of the rest; the plan is noisier for it."
            )
        walk.curves = sensitivity.measure(
            walk.architecture,
            walk.calibration.tokens,
            sizes,
            config,
            plan=walk.budget,
            enter=partial(enter, walk.architecture, batch_size=walk.batch_size, place=walk.place),
            device=walk.device,
            progress=walk.progress,
        )
        plan = plan_from_curves(walk.curves, sizes, config.sparsity)
    elif config.resolved_allocation == "influence":
        walk.influences = measure_influences(walk, front)
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


def measure_influences(walk: Walk, front: Front) -> list[float]:
    """Block influence of every block, over all calibration windows."""
    stream, influences = front.stream, []
    for block in tqdm(walk.architecture.blocks, desc="influences", unit="block", disable=not walk.progress):
        total, after = InfluenceSum(), []
        dense, arguments = block.on(walk.device), front.on(block.index, walk.device)
        for batch in stream:
            output = dense.forward(batch.to(walk.device), arguments)
            total.add(batch.to(walk.device), output)
            after.append(kept(output, batch))
        with naming(f"block {block.index}"):
            influences.append(total.value())
        stream = after
    return influences


# decompose


def cut_blocks(
    walk: Walk, front: Front, plan: Plan
) -> tuple[list[nn.Module], nn.Module | None, list[dict[str, float]]]:
    """The compressed blocks, the final norm, and the relative errors by block and part. The model is not touched."""
    step = matched_step if walk.config.method == "default" else published_step
    widths = [Widths(ranks["qk"], ranks["vo"], ranks["mlp"]) for ranks in plan]
    modules, errors, dense, compressed = finished_blocks(walk, widths, front)
    blocks = walk.architecture.blocks
    bar = tqdm(blocks, desc="blocks", unit="block", disable=not walk.progress, initial=len(modules))
    for block in blocks[len(modules) :]:
        arguments = front.on(block.index, walk.device)
        with naming(f"block {block.index}"):
            student, error, dense, compressed = step(walk, block, dense, compressed, widths[block.index], arguments)
            check_result(error, compressed)
        errors.append(error)
        modules.append(keep_block(walk, block, student.module, errors, (dense, compressed)))
        bar.set_postfix({part: f"{value:.3f}" for part, value in error.items()}, refresh=False)
        bar.update()
    bar.close()
    final_norm = copy.deepcopy(walk.architecture.final_norm)
    if walk.config.method == "default" and final_norm is not None and compressed is not dense:
        final_norm = final_norm.to(walk.device)
        head, dense_norm = walk.architecture.head(walk.device), copy.deepcopy(final_norm)
        residual_matched.match_output(final_norm, head, dense, compressed, dense_norm)
        final_norm = final_norm.to(blocks[-1].output.weight.device)
    return modules, final_norm, errors


def check_result(error: dict[str, float], compressed: Stream) -> None:
    """A block whose fit or output is not finite is never installed."""
    for part, value in error.items():
        if not math.isfinite(value):
            raise NumericalError(f"{part}: its fit is not finite; calibrate on more, and more varied, text.")
    if not all(batch.isfinite().all() for batch in compressed):
        raise NumericalError("the compressed block's output is not finite; calibrate on more, and more varied, text.")


def matched_step(
    walk: Walk, block: Block, dense: Stream, compressed: Stream, widths: Widths, arguments: dict[str, Any]
) -> tuple[Block, dict[str, float], Stream, Stream]:
    """One block of the default method; a block is left exactly as it is while nothing before it was cut."""
    original, student = block.on(walk.device), block.student(walk.device)
    targets = residual_matched.run_dense(original, dense, arguments)
    if widths == block.dense_widths and compressed is dense:
        return student, dict.fromkeys(PARTS, 0.0), targets.after, targets.after
    errors, after = residual_matched.compress_block(
        student, dense, compressed, targets, widths, arguments=arguments, config=walk.config
    )
    return student, errors, targets.after, after


def published_step(
    walk: Walk, block: Block, dense: Stream, compressed: Stream, widths: Widths, arguments: dict[str, Any]
) -> tuple[Block, dict[str, float], Stream, Stream]:
    """One block of the published method: one shot, the dense stream alone; `compressed` is the same stream."""
    moments, after = published.observe(block.on(walk.device), dense, arguments)
    student = block.student(walk.device)
    if widths == block.dense_widths:
        return student, dict.fromkeys(PARTS, 0.0), after, after
    return student, published.compress_block(student, moments, widths, walk.config), after, after


# go on after an interruption


@contextmanager
def taken_over(walk: Walk, plan: Plan | None) -> Iterator[None]:
    """The checkpoint, where there is one, opened for this compression; what was warned of before is warned of again."""
    if walk.checkpoint is None:
        yield
        return
    if processes.count() > 1:
        raise CheckpointError(
            f"{walk.checkpoint.folder}: only a process alone keeps unfinished work, found {processes.count()} of them; "
            "pass no checkpoint."
        )
    with walk.checkpoint.opened(identity(walk, plan)) as checkpoint:
        for message in checkpoint.progress.warnings:
            walk.warn(message)
        walk.batch_size = checkpoint.progress.batch_size = checkpoint.progress.batch_size or walk.batch_size
        if checkpoint.progress.seconds:
            walk.clock.stages.append(Stage("earlier runs", checkpoint.progress.seconds, 0))
        yield


def identity(walk: Walk, plan: Plan | None) -> dict[str, Any]:
    """What has to be the same for unfinished work to be taken over and end in the same bits, safe for JSON."""
    return {
        "model": fingerprint(walk.architecture.model),
        **{f"configuration, {name}": value for name, value in walk.config.to_dict().items()},
        "plan": plan,
        "calibration": hashlib.sha256(walk.calibration.tokens.cpu().numpy().tobytes()).hexdigest(),
        "device": walk.device.type,
        "processes": processes.count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def known_plan(walk: Walk) -> Plan | None:
    """The plan of the interrupted run, with what it was made from; None where there is none."""
    if walk.checkpoint is None or walk.checkpoint.progress.plan is None:
        return None
    measured = walk.checkpoint.progress.measured
    for name, curve in measured["sensitivities"].items():
        block, _, part = name.partition(".")
        walk.curves[int(block), part] = [(sparsity, divergence) for sparsity, divergence in curve]
    if budget := measured["sensitivity_budget"]:
        walk.budget = sensitivity.Budget(**{**budget, "ratios": tuple(budget["ratios"])})
    walk.influences = measured["influences"]
    return walk.checkpoint.progress.plan


def keep_plan(walk: Walk, plan: Plan) -> None:
    """Writes the plan, where there is a checkpoint."""
    if walk.checkpoint is not None:
        walk.checkpoint.keep_plan(plan, walk.measured(), walk.warnings)


def finished_blocks(
    walk: Walk, widths: list[Widths], front: Front
) -> tuple[list[nn.Module], list[dict[str, float]], Stream, Stream]:
    """The blocks that the interrupted run finished, their errors, and both streams after them."""
    checkpoint, blocks = walk.checkpoint, walk.architecture.blocks
    if checkpoint is None or not checkpoint.finished:
        return [], [], front.stream, front.stream
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


# adopt and report


def install(
    architecture: Architecture,
    blocks: list[nn.Module],
    final_norm: nn.Module | None,
    plan: Plan,
    record: dict[str, Any],
) -> None:
    """The only place where the user's model changes: its blocks, its final norm, its class."""
    widths = [Widths(ranks["qk"], ranks["vo"], ranks["mlp"]) for ranks in plan]
    model, family = architecture.model, architecture.family
    config = family.config.from_dense(model.config, widths, record)
    base = f"{model.base_model_prefix}." if model.base_model is not model else ""
    replacements = {f"{base}{family.layout.blocks}.{index}": block for index, block in enumerate(blocks)}
    if final_norm is not None:
        replacements[f"{base}{family.final_norm}"] = final_norm
    adopt(model, family.models["AutoModelForCausalLM"], config, replacements)  # pyright: ignore[reportArgumentType]


def parameters_around(architecture: Architecture, blocks: list[nn.Module], weights: int, achieved: float) -> Parameters:
    """Parameters before and after, counted while both are there; `weights` are those of the dense projections."""
    before = count_parameters(architecture.model)
    dense = sum(count_parameters(block.module) for block in architecture.blocks)
    after = before - dense + sum(map(count_parameters, blocks))
    return Parameters(weights, round(weights * (1 - achieved)), before, after)


def make_record(walk: Walk, achieved: float, parameters: Parameters, base: Base) -> dict[str, Any]:
    """What config.json says of the compression."""
    return {
        "format_version": FORMAT_VERSION,
        "base_model": base.model,
        "base_revision": base.revision,
        "recipe": portable(walk.config),
        "dtype": str(walk.architecture.model.dtype).removeprefix("torch."),
        "calibration": dict(walk.calibration.record),
        "achieved": {"sparsity": achieved, "parameters": dataclasses.asdict(parameters)},
    }


def make_report(
    walk: Walk,
    sizes: Sizes,
    plan: Plan,
    errors: list[dict[str, float]],
    record: dict[str, Any],
    parameters: Parameters,
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
        for index, (ranks, size, error) in enumerate(zip(plan, sizes, errors, strict=True))
    )
    floor = floor_seconds(walk, plan)
    return Report(
        base_model=record["base_model"],
        revision=record["base_revision"],
        config=portable(walk.config),
        requested_sparsity=walk.config.sparsity,
        achieved_sparsity=record["achieved"]["sparsity"],
        parameters=parameters,
        blocks=blocks,
        calibration=dict(walk.calibration.record),
        stages=tuple(dataclasses.replace(stage, floor=floor.get(stage.name, {})) for stage in walk.clock.stages),
        memory_kind=walk.clock.memory_kind,
        device=str(walk.device),
        batch_size=walk.batch_size,
        streams=walk.streams,
        processes=processes.count(),
        **walk.measured(),
        warnings=tuple(walk.warnings),
        versions=versions(),
    )


def floor_seconds(walk: Walk, plan: Plan) -> dict[str, dict[str, float]]:
    """By stage and step, how long this process's share of the matrix products takes at the rate of the device."""
    tokens, config = walk.calibration.tokens, walk.config
    windows = -(-len(tokens) // processes.count())
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


# helpers


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
    """Notes every numerical fallback in the report; other warnings go their way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", IllConditionedWarning)
        yield
    for message in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, IllConditionedWarning)):
        walk.warn(message)
    for other in caught:
        if not issubclass(other.category, IllConditionedWarning):
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
