"""How much each part of each block matters: measured, by cutting it alone (ours)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from optimum_modegpt.allocation.plan import PartSize, Sizes
from optimum_modegpt.architectures import Architecture, Block
from optimum_modegpt.calibration.streams import Front, Stream, enter
from optimum_modegpt.config import ModeGPTConfig
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
    device: torch.device,
    batch_size: int,
    progress: bool,
) -> dict[tuple[int, str], list[tuple[float, float]]]:
    """Curves of (sparsity, mean KL(dense ‖ cut) in nats per token) by block index and part.

    Every part is cut alone, with dense statistics and its own dense output as the target, without token weights, norm
    gains and the refit of gate and up; the rest of the model stays dense.
    """
    split = min(plan.moment_windows, len(tokens) - 1) if len(tokens) > 1 else 0
    moment_front = enter(architecture, tokens[: max(1, split)], batch_size)
    front = enter(architecture, tokens[split : split + plan.divergence_windows], batch_size)
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
        for index, (part, sparsity, _) in enumerate(changed):
            outputs = joined[index * len(reference) : (index + 1) * len(reference)]
            divergence = _divergence(tail, reference, outputs)
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
    output = residual_matched.observe_output(student, stream, targets.attention, None, arguments)
    middle = [student.after_attention(batch.to(device)).to(batch.device) for batch in targets.attention]
    mlp = residual_matched.observe_mlp(student, middle, targets.mlp, None)
    for part, size in sizes.items():
        for rank in sorted(
            {size.nearest(max(size.floor, size.dense * (1 - ratio))) for ratio in ratios} - {size.dense}
        ):
            student = dense.student(device)
            with naming(part):
                if part == "qk":
                    cut = residual_matched.cut_query_key(student, query_key, rank, config)
                    student.install_query_key(cut.query, cut.key, cut.pairs)
                elif part == "vo":
                    cut = residual_matched.cut_value_output(student, output, rank, config)
                    student.install_value_output(cut.value, cut.output)
                else:
                    cut = residual_matched.cut_mlp(student, mlp, rank, config)
                    student.install_mlp(cut.rows, cut.down)
            yield part, 1 - rank / size.dense, student


def _run(block: Block, stream: Stream, arguments: dict[str, Any]) -> Stream:
    device = block.output.weight.device
    return [block.forward(batch.to(device), arguments).to(batch.device) for batch in stream]


def _through(architecture: Architecture, first: int, stream: Stream, front: Front, device: torch.device) -> Stream:
    """The stream after the dense blocks from `first` on."""
    for block in architecture.blocks[first:]:
        stream = _run(block.on(device), stream, front.on(block.index, device))
    return stream


def _divergence(tail: nn.Module, reference: Stream, outputs: Stream) -> float:
    """Mean KL(reference ‖ output) of the next-token distributions, in nats per token."""
    total, tokens = 0.0, 0
    head = next(tail.parameters())
    for dense, changed in zip(reference, outputs, strict=True):
        rows = max(1, LOGITS_AT_ONCE // tail[-1].out_features)  # pyright: ignore[reportIndexIssue]
        for p, q in zip(dense.flatten(0, 1).split(rows), changed.flatten(0, 1).split(rows), strict=True):
            log_p, log_q = (tail(x.to(head.device)).float().log_softmax(-1) for x in (p, q))
            total += float(nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
            tokens += len(p)
    return total / tokens
