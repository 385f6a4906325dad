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
from optimum_modegpt.walk.resume import keep_plan
from optimum_modegpt.walk.state import State


def choose_pairs(plan: Plan, request: Request, state: State) -> None:
    """Choose the pairs from the moments of all blocks together, unless they are known or no pair is removed."""
    blocks = [block for block in request.architecture.blocks if block.paired]
    if state.measurements.pairs or all(plan.widths[block.index].qk == block.head_dim for block in blocks):
        return
    kept = plan.widths[blocks[0].index].qk // 2
    moments = measure_moments(request, state)
    pairs = method_of(request.config).shared_pairs(blocks, moments, kept)
    state.measurements.pairs = distributed.broadcast(pairs).tolist()
    keep_plan(request, state, plan)


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
