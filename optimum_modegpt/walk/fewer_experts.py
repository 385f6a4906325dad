"""Remove whole experts before the widths are cut: the result is a dense model of the same class with fewer experts."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_modegpt import distributed
from optimum_modegpt.architectures import Block, resolve
from optimum_modegpt.architectures.experts import routed
from optimum_modegpt.architectures.shapes import shapes_of
from optimum_modegpt.budget.experts import count_kept_experts
from optimum_modegpt.budget.sizes import part_sizes
from optimum_modegpt.calibration.streams import check_dense, map_stream
from optimum_modegpt.errors import naming
from optimum_modegpt.methods.whole_experts import ExpertUse, ExpertUseSum, kept_experts, select_experts_of
from optimum_modegpt.modeling.adoption import built
from optimum_modegpt.progress import bar
from optimum_modegpt.report import count_parameters
from optimum_modegpt.walk.guards import evaluation_mode
from optimum_modegpt.walk.request import Request
from optimum_modegpt.walk.state import RemovedExperts, State


def remove_experts(request: Request, state: State) -> Request:
    """Return the request for the model without its least salient experts.

    Raises:
        InvalidConfig: the model has no experts, or too few would be left.
    """
    dense, described = request.architecture.model, request.architecture.family.mlp.experts
    kept = count_kept_experts(request.architecture, request.config)
    assert described is not None
    groups = described.count_groups(dense.config)
    with evaluation_mode(dense), state.precision.applied(dense):
        uses = measure_use(request, state)
    chosen = distributed.broadcast_object([one.tolist() for one in kept_experts(uses, kept, groups)])
    model = without_experts(request, chosen)
    before = count_parameters(dense)
    state.removed = RemovedExperts(tuple(map(tuple, chosen)), before - count_parameters(model))
    state.inputs = dataclasses.replace(state.inputs, stream=[])
    architecture = resolve(model)
    return dataclasses.replace(
        request,
        architecture=architecture,
        sizes=part_sizes(architecture, request.config, request.wide),
        shapes=shapes_of(architecture),
    )


def measure_use(request: Request, state: State) -> list[ExpertUse]:
    """Measure the use of the experts of every block that has some, on all calibration windows."""
    state.inputs = state.embed(request)
    stream, uses = state.inputs.stream, []
    for block in bar(request.architecture.blocks, desc="experts", unit="block", shown=request.show_progress):
        dense, arguments = block.on(request.device), state.inputs.on(block.index, request.device)
        experts = dense.experts
        total = None if experts is None else ExpertUseSum(experts)
        stream = list(map_stream(partial(_add_use, total, dense, arguments), request.device, stream))
        with naming(f"block {block.index}"):
            check_dense(stream, state.inputs.windows)
        if total is not None:
            uses.append(total.value())
    return uses


def _add_use(total: ExpertUseSum | None, block: Block, arguments: dict[str, Any], entering: Tensor) -> Tensor:
    """Return the block's output, and add the use of its experts on these tokens to `total`."""
    if total is None:
        return block.forward(entering, arguments)
    with routed(total.experts.module) as calls:
        output = block.forward(entering, arguments)
    total.add(calls.pop()[0])
    return output


def without_experts(request: Request, kept: list[list[int]]) -> PreTrainedModel:
    """Build the model with the experts `kept` only. It shares all other tensors with the user's model."""
    architecture = request.architecture
    model, described = architecture.model, architecture.family.mlp.experts
    assert described is not None
    config, replacements, lists = copy.deepcopy(model.config), {}, iter(kept)
    for block, path in zip(architecture.blocks, architecture.block_paths, strict=True):
        if (experts := block.experts) is None:
            continue
        chosen = torch.tensor(next(lists))
        for name in (described.packed, described.router):
            part = _sharing_copy(block.module.get_submodule(name))
            select_experts_of(part, experts.count, chosen)
            replacements[f"{path}.{name}"] = part
    setattr(config, described.count, len(kept[0]))
    return built(model, type(model), config, replacements)


def _sharing_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module that shares its tensors."""
    tensors: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, tensors)
