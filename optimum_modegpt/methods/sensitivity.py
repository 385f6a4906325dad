"""Measure how much each part of each block matters, by cutting it alone (ours)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from optimum_modegpt import distributed
from optimum_modegpt.allocation.plan import PartSize, Sizes
from optimum_modegpt.allocation.sensitivity import curve_from_losses
from optimum_modegpt.architectures import Architecture, Block
from optimum_modegpt.architectures.head import LogitHead
from optimum_modegpt.architectures.shapes import Shapes
from optimum_modegpt.calibration.moments import LinearMomentSum, QueryKeyMoments
from optimum_modegpt.calibration.streams import (
    DENSE_ADVICE,
    BlockInputs,
    Stream,
    calls_of,
    check_dense,
    map_stream,
    not_finite,
    store_like,
)
from optimum_modegpt.calibration.transfers import prefetch
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.least_squares import LinearMoments
from optimum_modegpt.decompositions.psd import at_least_float32, to_float64
from optimum_modegpt.decompositions.whitened_svd import two_sided_energies, value_energies
from optimum_modegpt.errors import NumericalError, naming
from optimum_modegpt.methods import residual_matched
from optimum_modegpt.progress import bar
from optimum_modegpt.report import PARTS

RATIOS, FEWER_RATIOS = (0.3, 0.6, 1.0), (0.4, 1.0)
"""Sparsities at which a part is cut to measure its divergence. 1 means the cap: a softmax is far from linear there."""
PASS_SHARE = 0.7
"""The cost of the divergences, as a share of a stream's pass."""
LOSS_POINTS = 24
"""Largest number of widths of a part at which the loss of its output is used."""
MOMENT_WINDOWS, DIVERGENCE_WINDOWS = 32, 16
FEWEST_WINDOWS, SHORTEST_WINDOW = 2, 256
"""Windows for the divergence, and tokens of each, that are always used if the text has them. Query and key seem
unimportant in shorter windows."""
SHALLOW_BUDGET = 24_000
"""Divided by the number of blocks, this is the number of block-forwards of a window that are always allowed. They cost
little in models with few blocks."""
LOGITS_AT_ONCE = 2**26
SWEEPS = 4
"""A single sweep would hold the streams of all cut blocks in memory, and each moves all later blocks to the device."""

Curves = dict[tuple[int, str], list[tuple[float, float]]]
"""Points (sparsity, divergence or loss) by block and part."""
Variant = tuple[int, str, float]
"""A copy of a block with one part cut: the block's index, the part, and its sparsity."""


@dataclass(frozen=True)
class Budget:
    """The part of the calibration that the measurement uses.

    Attributes:
        moment_windows: windows for the moments.
        divergence_windows: windows for the divergence.
        divergence_length: tokens that are used of each window for the divergence.
        ratios: sparsities at which the divergence is measured.
    """

    moment_windows: int
    divergence_windows: int
    divergence_length: int
    ratios: tuple[float, ...]


def budget(shapes: Shapes, windows: int, length: int) -> Budget:
    """Choose windows and ratios by their cost: `PASS_SHARE` of a stream's pass, or more in a model with few blocks.

    Every cut block passes half of the blocks on average, and the head. If fewer than `FEWEST_WINDOWS` are affordable,
    only the first tokens of these are used, at fewer ratios. The cost does not grow with the square of the depth until
    `SHORTEST_WINDOW` is reached.
    """
    moment_windows = max(1, min(MOMENT_WINDOWS, windows // 4))
    available = max(1, min(DIVERGENCE_WINDOWS, windows - moment_windows))
    allowed = max(SHALLOW_BUDGET / shapes.blocks, PASS_SHARE * shapes.blocks * windows)  # block-forwards of a window
    head = shapes.vocabulary * shapes.d_model / (shapes.weights + length * shapes.heads)
    affordable = allowed / (len(PARTS) * shapes.blocks * ((shapes.blocks + 1) / 2 + head))  # windows at one ratio
    few = min(available, FEWEST_WINDOWS)
    if affordable >= few * len(RATIOS):
        return Budget(moment_windows, min(available, int(affordable / len(RATIOS))), length, RATIOS)
    affordable_length = int(affordable * length / len(FEWER_RATIOS) / few)
    return Budget(moment_windows, few, min(length, max(SHORTEST_WINDOW, affordable_length)), FEWER_RATIOS)


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
    The divergence at other sparsities follows from the loss of the part's own output there.

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
            self.moments = self._passed(dense, self.moments)
            self.divergence = self._passed(dense, self.divergence)

    def _measure(self, sweep: range, passed: Callable[[], Any]) -> Curves:
        """Return the curves of these blocks. `passed` is called after every block that the streams have passed."""
        variants: list[Variant] = []
        losses: Curves = {}
        outputs: Stream = []
        reference: Stream = []
        for block in self.architecture.blocks[sweep.start :]:
            dense, arguments = block.on(self.device), self.divergence.on(block.index, self.device)
            _advance(outputs, dense, arguments)
            if block.index in sweep:
                with naming(f"block {block.index}"):
                    cuts = self._observe(dense)
                    losses |= self._losses(block.index, cuts)
                    entering = list(prefetch(self.divergence.stream, self.device))
                    outputs += store_like(self._cut(dense, cuts, entering, variants), self.divergence.stream)
                self.divergence = self._passed(dense, self.divergence)
                reference = list(self.divergence.stream)
            else:
                _advance(reference, dense, arguments)
                _check(dense, reference, self.divergence)
            passed()
        tail = self.architecture.tail(self.device)
        divergences = _divergences(tail, reference, outputs, len(variants))
        if not all(map(math.isfinite, divergences)):
            _check_logits(tail, reference, self.divergence.windows)
        return _curves(losses, variants, divergences)

    def _observe(self, dense: Block) -> dict[str, PartCut]:
        """Pass the windows for moments through the block, and return how its parts are cut by their moments."""
        arguments = self.moments.on(dense.index, self.device)
        student = dense.compressible_copy(self.device)
        query_key = residual_matched.observe_query_key(student, self.moments.stream, arguments)
        output = LinearMomentSum(ones=student.output.bias is not None)
        mlp = LinearMomentSum(ones=student.down.bias is not None)
        with calls_of(dense.output) as attention_calls, calls_of(dense.down) as mlp_calls:

            def observed(entering: Tensor) -> Tensor:
                after = dense.forward(entering, arguments)
                output.add(*attention_calls.pop())
                mlp.add(*mlp_calls.pop())
                return after

            after = list(map_stream(observed, self.device, self.moments.stream))
        self.moments = replace(self.moments, stream=after)
        _check(dense, after, self.moments)
        sizes, config = self.sizes[dense.index], self.config
        return {
            "qk": query_key_cut(student, query_key, sizes["qk"], config),
            "vo": value_output_cut(student, output.value(), config),
            "mlp": mlp_cut(student, mlp.value(), sizes["mlp"], config),
        }

    def _passed(self, dense: Block, inputs: BlockInputs) -> BlockInputs:
        """Pass a dense stream through the block."""
        passed = replace(inputs, stream=list(_run(dense, inputs.stream, inputs.on(dense.index, self.device))))
        _check(dense, passed.stream, passed)
        return passed

    def _losses(self, index: int, cuts: Mapping[str, PartCut]) -> Curves:
        """Return the loss of output of every part at some of its widths, and at those that are measured."""
        losses: Curves = {}
        for part, size in self.sizes[index].items():
            narrower = size.widths()[1:]
            some = narrower[:: -(-len(narrower) // LOSS_POINTS)] if narrower else []
            widths = sorted({*some, *self._measured_widths(size)}, reverse=True)
            losses[index, part] = [(1 - width / size.dense, cuts[part].loss(size.dense - width)) for width in widths]
        return losses

    def _measured_widths(self, size: PartSize) -> list[int]:
        """Return the allowed widths nearest to the ratios, without the dense one."""
        widths = {size.nearest(max(size.floor, size.dense * (1 - ratio))) for ratio in self.ratios}
        return sorted(widths - {size.dense})

    def _cut(
        self, dense: Block, cuts: Mapping[str, PartCut], entering: Stream, variants: list[Variant]
    ) -> Iterator[Tensor]:
        """Yield the outputs on `entering` of copies of the block with one part cut, and append these to `variants`."""
        arguments = self.divergence.on(dense.index, self.device)
        for part, size in self.sizes[dense.index].items():
            for width in self._measured_widths(size):
                copied = dense.compressible_copy(self.device)
                with naming(part):
                    cuts[part].install(copied, width)
                variants.append((dense.index, part, 1 - width / size.dense))
                for batch in entering:
                    yield copied.forward(batch, arguments)


@dataclass(frozen=True)
class PartCut:
    """How one part of a block is cut to any width.

    Attributes:
        install: cuts the part of a copy of the block to a width.
        losses: the energy of the part's output that is lost after each removed unit, up to a constant factor.
        unit: the width that is removed at once: 2 for rotary pairs, else 1.
    """

    install: Callable[[Block, int], None]
    losses: list[float]
    unit: int = 1

    def loss(self, removed: int) -> float:
        """Return the energy that is lost with `removed` of the part's width."""
        return self.losses[removed // self.unit - 1] if removed else 0.0


def query_key_cut(student: Block, moments: QueryKeyMoments | None, size: PartSize, config: ModeGPTConfig) -> PartCut:
    """Return the cut of query and key by pairs (rotary) or directions of all groups."""
    pairs = residual_matched.eliminate_query_key(student, moments, size.floor)

    def install(block: Block, rank: int) -> None:
        factors = residual_matched.cut_query_key(block, moments, pairs, rank, config)
        block.install_query_key(factors.query, factors.key, factors.pairs)

    if moments is None:
        return PartCut(install, [])
    if pairs is not None:
        return PartCut(install, _cumulated(pairs.costs.sum(0)), unit=2)
    return PartCut(install, _cumulated(two_sided_energies(moments.query, moments.key).sum(0).flip(0)))


def value_output_cut(student: Block, moments: LinearMoments, config: ModeGPTConfig) -> PartCut:
    """Return the cut of value and output by directions of all groups."""

    def install(block: Block, rank: int) -> None:
        factors = residual_matched.cut_value_output(block, moments, rank, config)
        block.install_value_output(factors.value, factors.output)

    groups = residual_matched.value_groups(student, moments, config)
    energies = torch.stack([value_energies(gram, rows) for gram, rows in groups])
    return PartCut(install, _cumulated(energies.sum(0).flip(0)))


def mlp_cut(student: Block, moments: LinearMoments, size: PartSize, config: ModeGPTConfig) -> PartCut:
    """Return the cut of the MLP by hidden channels."""
    elimination = residual_matched.eliminate_mlp(student, moments, size.floor, config)

    def install(block: Block, rank: int) -> None:
        factors = residual_matched.cut_mlp(block, moments, elimination.order[: moments.width - rank], config)
        block.install_mlp(factors.rows, factors.down)

    return PartCut(install, _cumulated(elimination.costs))


def _cumulated(energies: Tensor) -> list[float]:
    """Return the sums of the first energies. All ranks of a distributed run get the same ones."""
    return distributed.broadcast(energies.clamp_min(0).cumsum(0)).cpu().tolist()


def _curves(losses: Curves, variants: list[Variant], divergences: list[float]) -> Curves:
    """Return the curves through the measured divergences."""
    measured: Curves = {}
    for (index, part, sparsity), divergence in zip(variants, divergences, strict=True):
        if not math.isfinite(divergence):
            raise NumericalError(
                f"block {index}, {part}: with {sparsity:.0%} of it removed the model's output is not finite, although "
                "the dense model's is. Load the model in bfloat16 or float32."
            )
        measured.setdefault((index, part), []).append((sparsity, divergence))
    return {key: curve_from_losses(losses[key], points) for key, points in measured.items()}


def _check(dense: Block, stream: Stream, inputs: BlockInputs) -> None:
    with naming(f"block {dense.index}"):
        check_dense(stream, inputs.windows)


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
