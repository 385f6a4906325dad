"""Compress a model: resolve → plan → cut block after block → adopt → report. Only this page knows the order.

Whole experts, if requested, are removed before the plan is made.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_modegpt.allocation.plan import Plan, plan_sparsity
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.psd import products_of
from optimum_modegpt.errors import naming
from optimum_modegpt.layouts.records import stock_record
from optimum_modegpt.layouts.stock import stock_model
from optimum_modegpt.methods.method import CalibrationInputs
from optimum_modegpt.methods.registry import method_of
from optimum_modegpt.modeling.adoption import become, built
from optimum_modegpt.progress import bar
from optimum_modegpt.report import Report
from optimum_modegpt.walk.checkpoint import Checkpoint
from optimum_modegpt.walk.checks import check_reading, check_request, check_result
from optimum_modegpt.walk.fewer_experts import remove_experts
from optimum_modegpt.walk.guards import collected_warnings, evaluation_mode, retrying_on_oom
from optimum_modegpt.walk.planning import make_plan, measure_gradients
from optimum_modegpt.walk.prepare import prepare
from optimum_modegpt.walk.record import make_record, make_report, parameters_around, reached_target
from optimum_modegpt.walk.request import Base, Request
from optimum_modegpt.walk.resume import finished_blocks, keep_block, keep_plan, known_plan, resuming
from optimum_modegpt.walk.self_check import check_reloads, check_same, self_check
from optimum_modegpt.walk.shared_pairs import choose_pairs, kept_pairs
from optimum_modegpt.walk.state import State


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
    """Compress `model` in place. It becomes an object of the compressed class at the end, and is unchanged until then.

    If only whole experts are removed, it stays an object of its own class. With the layout "stock", it becomes an
    object of a class of transformers.

    Args:
        model: a dense causal language model of a known family, with its weights in memory.
        config: the settings.
        calibration: token windows of the model's own vocabulary.
        plan: the widths to keep. It replaces the sparsity and the allocation of the configuration.
        device: the compute device. Blocks are copied to it one at a time. None chooses the accelerator if available.
        base: the origin of the model, for the record. Missing fields are taken from the model.
        checkpoint: the working folder from which an interrupted run resumes. None keeps finished work in memory. Remove
            it after the result is saved.
        progress: whether to show progress bars.

    Raises:
        AlreadyCompressed, UnsupportedModel, CalibrationDataError, InvalidConfig: before anything is computed.
        CheckpointError: the checkpoint belongs to another compression, is in use, or cannot be written.
        NumericalError: a result is not finite. The message names block and part. The model is unchanged.
    """
    request = prepare(model, config, calibration, plan, device, base, checkpoint, progress)
    state = State.start(request)
    check_request(request, state)
    with torch.no_grad(), products_of(state.precision.compute), collected_warnings(state):
        if config.expert_sparsity:
            request = retrying_on_oom("experts", remove_experts, request, state)
        dense = request.architecture.model
        with evaluation_mode(dense), resuming(request, state), state.precision.applied(dense):
            retrying_on_oom("embed", embed, request, state)
            retrying_on_oom("gradients", measure_gradients, request, state)
            if request.config.layout == "stock":
                retrying_on_oom("rotary pairs", choose_pairs, request, state)
            plan = known_plan(request)
            if plan is None:
                stage = f"allocate ({request.config.resolved_allocation})"
                plan = retrying_on_oom(stage, make_plan, request, state)
                keep_plan(request, state, plan)
            blocks, norm, errors = retrying_on_oom("decompose", partial(cut_blocks, plan), request, state)
    with state.clock.stage("adopt"):
        achieved = plan_sparsity(plan, request.sizes)
        parameters = parameters_around(request, state, blocks, achieved)
        target = reached_target(request, plan)
        record = make_record(request, achieved, parameters, target)
        compressed = assemble(request, state, plan, blocks, norm, record)
    with state.clock.stage("self-check"), evaluation_mode(compressed):
        check_reloads(compressed)
        check = self_check(compressed, calibration.tokens[0])
    become(model, compressed)
    return make_report(request, state, plan, errors, achieved, parameters, target, check)


def embed(request: Request, state: State) -> None:
    """Embed the calibration tokens, and check that the model computes the same as its family."""
    state.inputs = state.embed(request)
    check_reading(request, state.inputs)


def cut_blocks(
    plan: Plan, request: Request, state: State
) -> tuple[list[nn.Module], nn.Module | None, list[dict[str, float]]]:
    """Return the compressed blocks, the final norm, and the relative errors by block and part."""
    measure_gradients(request, state)
    method, blocks, device = method_of(request.config), request.architecture.blocks, request.device
    shared = kept_pairs(plan, request, state)
    pairs = torch.tensor(shared, device=device) if shared else None
    modules, errors, streams = finished_blocks(request, state, plan)
    shown = bar(desc="decompose", unit="block", total=len(blocks), initial=len(modules), shown=request.show_progress)
    with shown:
        for block in blocks[len(modules) :]:
            gradients = state.gradients[block.index] if state.gradients else None
            with naming(f"block {block.index}"):
                cut = method.cut_block(
                    block.on(device),
                    plan.widths[block.index],
                    CalibrationInputs(
                        streams, state.inputs.on(block.index, device), state.inputs.windows, gradients, pairs
                    ),
                    state.keep_derivatives,
                )
                streams = cut.after
                check_result(cut.errors, streams.compressed, state.inputs.windows)
            errors.append(cut.errors)
            modules.append(keep_block(request, state, block, cut, errors))
            shown.set_postfix({part: f"{error:.3f}" for part, error in cut.errors.items()}, refresh=False)
            shown.update()
    norm = method.fit_final_norm(request.architecture, streams, device)
    if norm is not None:
        norm = state.precision.to_stored(norm, request.architecture.final_norm_path)
    return modules, norm, errors


def assemble(
    request: Request, state: State, plan: Plan, blocks: list[nn.Module], norm: nn.Module | None, record: dict[str, Any]
) -> PreTrainedModel:
    """Build the compressed model. It shares all tensors that were not compressed with the user's model."""
    architecture, classes = request.architecture, request.architecture.classes
    only_experts = state.removed is not None and plan == Plan.dense(request.sizes)
    if only_experts or request.config.layout == "stock":
        mlps = [block.mlp_width for block in architecture.blocks]
        record = stock_record(record, architecture.model.config.get_text_config(), architecture.family, mlps)
    if only_experts:
        architecture.model.config.modegpt = record
        return architecture.model
    config = classes.config.from_dense(architecture.model.config, list(plan.widths), record)
    config.tie_word_embeddings = architecture.head_is_tied  # the model's own configuration may differ
    paths = architecture.block_paths
    replacements = dict(zip(paths, blocks, strict=True))
    if norm is not None:
        replacements[architecture.final_norm_path] = norm
    compressed = built(architecture.model, classes.causal_lm, config, replacements)
    if request.config.layout != "stock":
        return compressed
    stock = stock_model(architecture, compressed, kept_pairs(plan, request, state))
    with evaluation_mode(compressed), evaluation_mode(stock):
        check_same(stock, compressed, request.calibration.tokens[0])
    return stock
