"""How much each part of each block matters: measured, by cutting it alone (ours)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from optimum_modegpt import processes
from optimum_modegpt.allocation.plan import PartSize, Sizes
from optimum_modegpt.architectures import Architecture, Block
from optimum_modegpt.calibration.moments import QueryKeyMoments
from optimum_modegpt.calibration.streams import Front, Stream, kept
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.least_squares import LinearMoments
from optimum_modegpt.decompositions.psd import raised
from optimum_modegpt.errors import NumericalError, naming
from optimum_modegpt.methods import residual_matched
from optimum_modegpt.report import PARTS

RATIOS = (0.15, 0.3, 0.45, 0.6, 0.75, 1.0)
"""Sparsities at which a part is cut; 1 stands for the cap."""
FEWER_RATIOS = (0.3, 0.6, 1.0)
MOMENT_WINDOWS, DIVERGENCE_WINDOWS = 32, 16
LEAST_BUDGET = 8192
"""Block-forwards of a window that are always allowed: they cost little in models with few blocks."""
LOGITS_AT_ONCE = 2**26


@dataclass(frozen=True)
class Budget:
    """What the measurement uses of the calibration: windows for moments, other windows for the divergence, ratios."""

    moment_windows: int
    divergence_windows: int
    ratios: tuple[float, ...]


def budget(blocks: int, windows: int) -> Budget:
    """As many block-forwards of a window as the two streams take, or `LEAST_BUDGET`: fewer windows, then fewer ratios.

    The least it can be, one window at three ratios, costs more than that in models of more than about 55 blocks.
    """
    moment_windows = max(1, min(MOMENT_WINDOWS, windows * 2 // 3))
    available = max(1, min(DIVERGENCE_WINDOWS, windows - moment_windows))
    allowed = max(LEAST_BUDGET, 2 * blocks * windows)
    for ratios in (RATIOS, FEWER_RATIOS):
        each = len(PARTS) * len(ratios) * blocks * (blocks + 1) // 2
        if (affordable := min(available, allowed // each)) >= min(2, available):
            return Budget(moment_windows, affordable, ratios)
    return Budget(moment_windows, 1, FEWER_RATIOS)


def measure(
    architecture: Architecture,
    tokens: Tensor,
    sizes: Sizes,
    config: ModeGPTConfig,
    *,
    plan: Budget,
    enter: Callable[[Tensor], Front],
    device: torch.device,
    progress: bool,
) -> dict[tuple[int, str], list[tuple[float, float]]]:
    """Curves of (sparsity, mean KL(dense ‖ cut) in nats per token) by block index and part.

    Every part is cut alone, with dense statistics and its own dense output as the target, without token weights, norm
    gains and the refit of gate and up; the rest of the model stays dense. `enter` takes tokens to the first block.
    """
    split = min(plan.moment_windows, len(tokens) - 1) if len(tokens) > 1 else 0
    moment_front, front = enter(tokens[: max(1, split)]), enter(tokens[split : split + plan.divergence_windows])
    tail = architecture.tail(device)
    reference = _through(architecture, 0, front.stream, front, device)
    curves, stream, entering = {}, moment_front.stream, front.stream
    for block, size in tqdm(
        list(zip(architecture.blocks, sizes, strict=True)), desc="sensitivities", unit="block", disable=not progress
    ):
        dense = block.on(device)
        arguments, passing = moment_front.on(block.index, device), front.on(block.index, device)
        targets = residual_matched.run_dense(dense, stream, arguments, weighted=False)
        students = _students(dense, stream, targets, arguments, size, plan.ratios, config)
        with naming(f"block {block.index}"):
            changed = [(part, sparsity, _run(student, entering, passing)) for part, sparsity, student in students]
        # All variants pass a later block together, so that it comes to the device once.
        joined = _through(architecture, block.index + 1, [b for *_, out in changed for b in out], front, device)
        divergences = _divergences(tail, reference, joined, len(changed))
        for (part, sparsity, _), divergence in zip(changed, divergences, strict=True):
            if not math.isfinite(divergence):
                raise NumericalError(
                    f"block {block.index}, {part}: with {sparsity:.0%} of it removed the output distribution is not "
                    "finite. Load the model in bfloat16 or float32, or check its weights."
                )
            curves.setdefault((block.index, part), []).append((sparsity, divergence))
        stream, entering = targets.after, _run(dense, entering, passing)
    return curves


def _students(
    dense: Block,
    stream: Stream,
    targets: residual_matched.DenseTargets,
    arguments: dict[str, Any],
    sizes: Mapping[str, PartSize],
    ratios: tuple[float, ...],
    config: ModeGPTConfig,
) -> Iterator[tuple[str, float, Block]]:
    """Copies of the block with one part cut, at every ratio: (part, sparsity, block)."""
    device = dense.output.weight.device
    student = dense.student(device)
    query_key = residual_matched.observe_query_key(student, stream, arguments)
    heads = residual_matched.head_outputs(student, stream, arguments)
    output = residual_matched.observe_output(student, stream, heads, targets.attention, None)
    middle = [kept(student.after_attention(batch.to(device)), batch) for batch in targets.attention]
    mlp = residual_matched.observe_mlp(student, middle, targets.mlp, None)
    for part, size in sizes.items():
        ranks = {size.nearest(max(size.floor, size.dense * (1 - ratio))) for ratio in ratios} - {size.dense}
        with naming(part):
            cut = _cutter(part, student, (query_key, output, mlp), min(ranks, default=size.dense), config)
            for rank in sorted(ranks):
                variant = dense.student(device)
                cut(variant, rank)
                yield part, 1 - rank / size.dense, variant


def _cutter(
    part: str,
    student: Block,
    moments: tuple[QueryKeyMoments, LinearMoments, LinearMoments],
    least: int,
    config: ModeGPTConfig,
) -> Callable[[Block, int], None]:
    """Cuts a part of a block to a rank of at least `least`; what goes first is found once for all ranks."""
    query_key, output, mlp = moments
    if part == "qk":
        pairs = residual_matched.eliminate_query_key(student, query_key, least)

        def cut(block: Block, rank: int) -> None:
            factors = residual_matched.cut_query_key(block, query_key, pairs, rank, config)
            block.install_query_key(factors.query, factors.key, factors.pairs)

    elif part == "vo":

        def cut(block: Block, rank: int) -> None:
            factors = residual_matched.cut_value_output(block, output, rank, config)
            block.install_value_output(factors.value, factors.output)

    else:
        order = residual_matched.eliminate_mlp(student, mlp, least, config)

        def cut(block: Block, rank: int) -> None:
            factors = residual_matched.cut_mlp(block, mlp, order[: mlp.width - rank], config)
            block.install_mlp(factors.rows, factors.down)

    return cut


def _run(block: Block, stream: Stream, arguments: dict[str, Any]) -> Stream:
    device = block.output.weight.device
    return [kept(block.forward(batch.to(device), arguments), batch) for batch in stream]


def _through(architecture: Architecture, first: int, stream: Stream, front: Front, device: torch.device) -> Stream:
    """The stream after the dense blocks from `first` on."""
    for block in architecture.blocks[first:]:
        stream = _run(block.on(device), stream, front.on(block.index, device))
    return stream


def _divergences(tail: nn.Sequential, reference: Stream, outputs: Stream, variants: int) -> list[float]:
    """Mean KL(reference ‖ output) of the next-token distributions in nats per token, for every variant in `outputs`."""
    tokens = processes.total(sum(dense.shape[:2].numel() for dense in reference))
    head = cast(nn.Linear, tail[-1])
    rows, device = max(1, LOGITS_AT_ONCE // head.out_features), head.weight.device
    sums = torch.zeros(variants, dtype=torch.float64)
    for batch, dense in enumerate(reference):
        chunks = [outputs[variant * len(reference) + batch].flatten(0, 1).split(rows) for variant in range(variants)]
        for index, chunk in enumerate(dense.flatten(0, 1).split(rows)):
            expected = raised(tail(chunk.to(device))).log_softmax(-1)
            for variant in range(variants):
                found = raised(tail(chunks[variant][index].to(device))).log_softmax(-1)
                sums[variant] += float(nn.functional.kl_div(found, expected, reduction="sum", log_target=True))
    return (processes.total(sums) / tokens).tolist()
