"""Choose the rotary pairs that all heads of all blocks keep, for the layout "stock"."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from optimum_modegpt import distributed
from optimum_modegpt.allocation.plan import Plan
from optimum_modegpt.architectures import Block
from optimum_modegpt.calibration.moments import QueryKeyMoments
from optimum_modegpt.calibration.streams import Stream, check_dense, map_stream
from optimum_modegpt.errors import naming
from optimum_modegpt.methods.method import CalibrationInputs, StreamPair
from optimum_modegpt.methods.registry import method_of
from optimum_modegpt.progress import bar
from optimum_modegpt.walk.planning import measure_gradients, moment_windows
from optimum_modegpt.walk.request import Request
from optimum_modegpt.walk.resume import keep_plan, known_plan
from optimum_modegpt.walk.state import State


def choose_pairs(request: Request, state: State) -> None:
    """Choose the order in which all heads lose pairs, unless it is known or no head can be cut."""
    blocks = [block for block in request.architecture.blocks if block.paired]
    floors = {request.sizes[block.index]["qk"].floor for block in blocks}
    if state.measurements.shared_pairs or floors <= {block.head_dim for block in blocks} or not request.config.sparsity:
        return
    found = method_of(request.config).shared_pairs(blocks, measure_moments(request, state), min(floors) // 2)
    state.measurements.shared_pairs = distributed.broadcast(found.order).tolist()
    if found.losses is not None:
        losses = distributed.broadcast(found.losses).tolist()
        state.measurements.pair_losses = {block.index: lost for block, lost in zip(blocks, losses, strict=True)}
        state.measurements.pair_step = 2 / blocks[0].head_dim
    keep_plan(request, state, known_plan(request))


def kept_pairs(plan: Plan, request: Request, state: State) -> list[int]:
    """Return the pairs that all heads keep, increasing; an empty list if each head keeps its own, or all of them."""
    order = state.measurements.shared_pairs
    widths = {plan.widths[block.index].qk for block in request.architecture.blocks if block.paired}
    dense = request.architecture.blocks[0].head_dim
    if not order or widths <= {dense}:
        return []
    (width,) = widths
    return sorted(set(range(dense // 2)) - set(order[: (dense - width) // 2]))


def measure_moments(request: Request, state: State) -> list[QueryKeyMoments]:
    """Measure the moments of queries and keys of every block that keeps pairs, on the dense stream.

    Samples are left out: those of all blocks together would be large.
    """
    measure_gradients(request, state)
    inputs, moments = state.embed(request, moment_windows(request)), []
    stream = inputs.stream
    for block in bar(request.architecture.blocks, desc="rotary pairs", unit="block", shown=request.show_progress):
        dense, arguments = block.on(request.device), inputs.on(block.index, request.device)
        with naming(f"block {block.index}"):
            if dense.paired:
                gradients = state.gradients[block.index] if state.gradients else None
                own = CalibrationInputs(StreamPair(stream, stream), arguments, inputs.windows, gradients)
                moments.append(_moments_of(dense, own, request))
            stream: Stream = list(map_stream(partial(dense.forward, arguments=arguments), request.device, stream))
            check_dense(stream, inputs.windows)
    return moments


def _moments_of(block: Block, inputs: CalibrationInputs, request: Request) -> QueryKeyMoments:
    moments = method_of(request.config).query_key_moments(block, inputs)
    assert moments is not None, "a part that stays at full width has no pairs to choose"
    return replace(moments, samples=None)
