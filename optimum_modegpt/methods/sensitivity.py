"""Measure how much each part of each block matters, by cutting it alone (ours)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from optimum_modegpt import distributed
from optimum_modegpt.allocation.plan import Sizes
from optimum_modegpt.architectures import Architecture, Block
from optimum_modegpt.architectures.head import LogitHead
from optimum_modegpt.calibration.moments import QueryKeyMoments
from optimum_modegpt.calibration.streams import (
    DENSE_ADVICE,
    BlockInputs,
    Stream,
    check_dense,
    map_stream,
    not_finite,
    store_like,
)
from optimum_modegpt.calibration.transfers import prefetch
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.least_squares import LinearMoments
from optimum_modegpt.decompositions.psd import at_least_float32, to_float64
from optimum_modegpt.errors import NumericalError, naming
from optimum_modegpt.methods import residual_matched
from optimum_modegpt.progress import bar
from optimum_modegpt.report import PARTS

RATIOS = (0.15, 0.3, 0.45, 0.6, 0.75, 1.0)
"""Sparsities at which a part is cut. 1 means the cap."""
FEWER_RATIOS = (0.3, 0.6, 1.0)
MOMENT_WINDOWS, DIVERGENCE_WINDOWS = 32, 16
LEAST_BUDGET = 8192
"""Block-forwards of a window that are always allowed, because they cost little in models with few blocks."""
LOGITS_AT_ONCE = 2**26
SWEEPS = 4
"""A single sweep would hold the streams of all cut blocks in memory, and each moves all later blocks to the device."""

Curves = dict[tuple[int, str], list[tuple[float, float]]]
"""Points (sparsity, divergence) by block and part."""


@dataclass(frozen=True)
class Budget:
    """The part of the calibration that the measurement uses: windows for moments and for the divergence, and ratios."""

    moment_windows: int
    divergence_windows: int
    ratios: tuple[float, ...]


def budget(blocks: int, windows: int) -> Budget:
    """Choose windows and ratios that cost no more than the two streams, or `LEAST_BUDGET` block-forwards of a window.

    First the windows are reduced, then the ratios. The minimum, one window at three ratios, costs more than that in
    models of more than about 55 blocks.
    """
    moment_windows = max(1, min(MOMENT_WINDOWS, windows * 2 // 3))
    available = max(1, min(DIVERGENCE_WINDOWS, windows - moment_windows))
    allowed = max(LEAST_BUDGET, 2 * blocks * windows)
    for ratios in (RATIOS, FEWER_RATIOS):
        each = len(PARTS) * len(ratios) * blocks * (blocks + 1) // 2
        if (affordable := min(available, allowed // each)) >= min(2, available):
            return Budget(moment_windows, affordable, ratios)
    return Budget(moment_windows, 1, FEWER_RATIOS)


def split(windows: int, budget: Budget) -> tuple[slice, slice]:
    """Divide the windows into those for moments and those for the divergence. A single window is used for both."""
    own = max(1, min(budget.moment_windows, windows - 1))
    first = own if windows > 1 else 0
    return slice(0, own), slice(first, first + budget.divergence_windows)


def sweep_length(blocks: int) -> int:
    """Return the number of blocks that are measured in one sweep through the blocks after them."""
    return -(-blocks // SWEEPS)


@dataclass
class Sweeps:
    """Measures mean KL(dense ‖ cut) in nats per token for every part of every block, cut at some ratios.

    Each part is cut alone, with dense statistics and its own dense output as the target, without token weights, norm
    gains and the refit of gate and up. The rest of the model remains dense. The blocks are measured in a few sweeps:
    the outputs of all cut blocks of a sweep pass the later blocks together, so that each is moved to the device once.

    Attributes:
        architecture: the dense model.
        sizes: the sizes of the parts of every block.
        config: the configuration of the compression.
        ratios: sparsities to cut at.
        moments: the inputs of the next block to measure, for the windows for moments.
        divergence: the same for the windows for the divergence.
        device: the compute device.
    """

    architecture: Architecture
    sizes: Sizes
    config: ModeGPTConfig
    ratios: tuple[float, ...]
    moments: BlockInputs
    divergence: BlockInputs
    device: torch.device

    def measured(self, known: Curves, *, progress: bool) -> Iterator[Curves]:
        """Yield the curves of each sweep. Blocks in `known` are not measured again."""
        blocks = len(self.architecture.blocks)
        length = sweep_length(blocks)
        sweeps = [range(blocks)[first : first + length] for first in range(0, blocks, length)]
        done = {index for index, _ in known}
        total = sum(blocks - sweep.start for sweep in sweeps)
        with bar(total=total, desc="sensitivities", unit="block", shown=progress) as shown:
            for sweep in sweeps:
                if done.isdisjoint(sweep):
                    yield self._measure(sweep, shown.update)
                else:
                    self._leave_out(sweep)
                    shown.update(blocks - sweep.start)

    def _leave_out(self, sweep: range) -> None:
        """Pass the dense streams through these blocks without measuring them."""
        for block in self.architecture.blocks[sweep.start : sweep.stop]:
            dense = block.on(self.device)
            self._pass(dense, self._targets(dense))

    def _measure(self, sweep: range, passed: Callable[[], Any]) -> Curves:
        """Return the curves of these blocks. `passed` is called after every block that the streams have passed."""
        cuts: list[tuple[int, str, float]] = []
        outputs: Stream = []
        reference: Stream = []
        for block in self.architecture.blocks[sweep.start :]:
            dense, arguments = block.on(self.device), self.divergence.on(block.index, self.device)
            _advance(outputs, dense, arguments)
            if block.index in sweep:
                targets, entering = self._targets(dense), list(prefetch(self.divergence.stream, self.device))
                with naming(f"block {block.index}"):
                    outputs += store_like(self._cut(dense, targets, entering, cuts), self.divergence.stream)
                self._pass(dense, targets)
                reference = list(self.divergence.stream)
            else:
                _advance(reference, dense, arguments)
                self._check(dense, reference, self.divergence)
            passed()
        tail = self.architecture.tail(self.device)
        divergences = _divergences(tail, reference, outputs, len(cuts))
        if not all(map(math.isfinite, divergences)):
            _check_logits(tail, reference, self.divergence.windows)
        return _curves(cuts, divergences)

    def _targets(self, dense: Block) -> residual_matched.DenseTargets:
        arguments = self.moments.on(dense.index, self.device)
        targets = residual_matched.run_dense(dense, self.moments.stream, arguments, weighted=False)
        self._check(dense, targets.after, self.moments)
        return targets

    def _pass(self, dense: Block, targets: residual_matched.DenseTargets) -> None:
        """Pass the dense streams through the block."""
        arguments = self.divergence.on(dense.index, self.device)
        self.moments = replace(self.moments, stream=targets.after)
        self.divergence = replace(self.divergence, stream=list(_run(dense, self.divergence.stream, arguments)))
        self._check(dense, self.divergence.stream, self.divergence)

    @staticmethod
    def _check(dense: Block, stream: Stream, front: BlockInputs) -> None:
        with naming(f"block {dense.index}"):
            check_dense(stream, front.windows)

    def _cut(
        self, dense: Block, targets: residual_matched.DenseTargets, entering: Stream, cuts: list[tuple[int, str, float]]
    ) -> Iterator[Tensor]:
        """Yield the outputs on `entering` of every variant with one part cut, and append the variant to `cuts`."""
        arguments = self.divergence.on(dense.index, self.device)
        for part, sparsity, student in self._students(dense, targets):
            cuts.append((dense.index, part, sparsity))
            for batch in entering:
                yield student.forward(batch, arguments)

    def _students(self, dense: Block, targets: residual_matched.DenseTargets) -> Iterator[tuple[str, float, Block]]:
        """Yield copies of the block with one part cut, at every ratio: (part, sparsity, block)."""
        stream, arguments = self.moments.stream, self.moments.on(dense.index, self.device)
        student = dense.compressible_copy(self.device)
        query_key = residual_matched.observe_query_key(student, stream, arguments)
        heads = residual_matched.head_outputs(student, stream, arguments)
        output = residual_matched.observe_output(student, stream, heads, targets.attention, None)
        middle = residual_matched.stream_after(student, targets.attention, student.residual.after_attention)
        streams = residual_matched.MLPStreams(student.residual.mlp_stream(stream, middle), middle)
        mlp = residual_matched.observe_mlp(student, streams, targets.mlp, None)
        for part, size in self.sizes[dense.index].items():
            ranks = {size.nearest(max(size.floor, size.dense * (1 - ratio))) for ratio in self.ratios} - {size.dense}
            if not ranks:
                continue
            with naming(part):
                cut = _cutter(part, student, (query_key, output, mlp), min(ranks), self.config)
                for rank in sorted(ranks):
                    variant = dense.compressible_copy(self.device)
                    cut(variant, rank)
                    yield part, 1 - rank / size.dense, variant


def _curves(cuts: list[tuple[int, str, float]], divergences: list[float]) -> Curves:
    curves: Curves = {}
    for (index, part, sparsity), divergence in zip(cuts, divergences, strict=True):
        if not math.isfinite(divergence):
            raise NumericalError(
                f"block {index}, {part}: with {sparsity:.0%} of it removed the model's output is not finite, although "
                "the dense model's is. Load the model in bfloat16 or float32."
            )
        curves.setdefault((index, part), []).append((sparsity, divergence))
    return curves


def _cutter(
    part: str,
    student: Block,
    moments: tuple[QueryKeyMoments | None, LinearMoments, LinearMoments],
    least: int,
    config: ModeGPTConfig,
) -> Callable[[Block, int], None]:
    """Return a function that cuts a part of a block to a rank of at least `least`, with one order of removal."""
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


def _run(block: Block, stream: Stream, arguments: dict[str, Any]) -> Iterator[Tensor]:
    return map_stream(partial(block.forward, arguments=arguments), block.output.weight.device, stream)


def _advance(stream: Stream, block: Block, arguments: dict[str, Any]) -> None:
    """Pass the stream through the block in place, so that it is never in memory twice."""
    for index, output in enumerate(_run(block, stream, arguments)):
        stream[index] = output


def _check_logits(tail: LogitHead, reference: Stream, windows: Tensor) -> None:
    """Raise in all processes if one of them finds logits of the dense model that are not finite."""
    own = None
    for window, number in zip(itertools.chain.from_iterable(reference), windows, strict=True):
        own = own or not_finite([tail(window[None].to(tail.output.weight.device))], number[None])
    for found in distributed.all_gather_object(own):
        if found is not None:
            raise NumericalError(f"the dense model's logits are not finite on {found}. {DENSE_ADVICE}")


def _divergences(tail: LogitHead, reference: Stream, outputs: Stream, variants: int) -> list[float]:
    """Return the mean KL(reference ‖ output) of the next-token distributions, in nats per token, for every variant."""
    tokens = distributed.all_reduce(sum(dense.shape[:2].numel() for dense in reference))
    head = tail.output
    rows, device = max(1, LOGITS_AT_ONCE // head.out_features), head.weight.device
    sums = [to_float64(torch.zeros((), device=device))] * variants
    for batch, dense in enumerate(reference):
        chunks = [outputs[variant * len(reference) + batch].flatten(0, 1).split(rows) for variant in range(variants)]
        for index, chunk in enumerate(dense.flatten(0, 1).split(rows)):
            expected = at_least_float32(tail(chunk.to(device))).log_softmax(-1)
            for variant in range(variants):
                found = at_least_float32(tail(chunks[variant][index].to(device))).log_softmax(-1)
                divergence = nn.functional.kl_div(found, expected, reduction="sum", log_target=True)
                sums[variant] = sums[variant] + to_float64(divergence)
    return (distributed.all_reduce(torch.stack(sums)) / tokens).cpu().tolist()
