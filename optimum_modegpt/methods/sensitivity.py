"""Measure how much each part of each block matters, by cutting it alone (ours).

A part is cut to a few widths. The divergence of the model's predictions follows to second order from the change of the
part's output and the gradients there, so the later blocks are not needed. In a few blocks, the cut copies also pass the
later blocks, which gives the divergence itself. Its ratio to the second order is similar in most blocks. At all other
widths, the divergence follows from the loss of the part's own output.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from optimum_modegpt import distributed
from optimum_modegpt.allocation.plan import PartSize, Sizes
from optimum_modegpt.architectures import Architecture, Block
from optimum_modegpt.architectures.head import LogitHead
from optimum_modegpt.architectures.shapes import Shapes
from optimum_modegpt.calibration.gradients import LOGITS_AT_ONCE, OutputGradients
from optimum_modegpt.calibration.moments import LinearMomentSum
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
from optimum_modegpt.decompositions.psd import at_least_float32, to_float64
from optimum_modegpt.errors import NumericalError, naming
from optimum_modegpt.methods import residual_matched
from optimum_modegpt.methods.experts import mlp_moments, shared_moments
from optimum_modegpt.methods.part_cuts import PartCut, mlp_cut, query_key_cut, shared_cut, value_output_cut
from optimum_modegpt.methods.residual_matched import OutputMetrics
from optimum_modegpt.modeling.modegpt_family import HEAD_PARTS
from optimum_modegpt.progress import bar

RATIOS = (0.3, 0.6, 1.0)
"""Sparsities at which a part is cut. 1 means the cap: a softmax is far from linear there."""
LOSS_POINTS = 24
"""Largest number of widths of a part at which the loss of its output is used."""
MOMENT_WINDOWS = 32
MEASURED_BLOCKS = 4
"""Number of blocks whose cut copies pass the later blocks."""
FEWEST_WINDOWS, MOST_WINDOWS, LENGTH = 2, 16, 512
"""Windows for the divergence, and the largest number of tokens of each. Query and key seem unimportant in short
windows."""
GRADIENT_WINDOWS = 4
"""Fewest windows for the gradients."""
SMALLEST = 5e-3
"""Smallest second order, in nats per token, that a divergence is compared with. The rounding of streams to bfloat16
causes a divergence of up to 2e-3."""
PASS_SHARE = 0.5
"""The cost of the divergences, as a share of a stream's pass."""
SHALLOW_BUDGET = 24_000
"""Divided by the number of blocks, this is the number of block-forwards of a window that are always allowed. They cost
little in models with few blocks."""
SWEEPS = 4
"""A single sweep would hold the streams of all cut blocks in memory, and each moves all later blocks to the device."""

Curve = list[tuple[float, float]]
"""Points (sparsity, divergence or loss) of a part."""


@dataclass(frozen=True)
class Variant:
    """A copy of a block with one part cut, and the second order of its divergence."""

    block: int
    part: str
    sparsity: float
    second_order: float


@dataclass(frozen=True)
class Half:
    """The attention or the MLP of a dense block on one batch: its input, its output, and the gradient at the output."""

    inputs: Tensor
    output: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Budget:
    """The part of the calibration that the gradients and the sensitivities use.

    Attributes:
        moment_windows: windows for the moments.
        gradient_windows: windows for the gradients.
        divergence_windows: the first of these, on which divergences are measured.
        length: tokens that are used of each window for gradients and divergences.
        blocks: the blocks whose cut copies pass the later blocks.
    """

    moment_windows: int
    gradient_windows: int
    divergence_windows: int
    length: int
    blocks: tuple[int, ...]


def budget(shapes: Shapes, windows: int, length: int) -> Budget:
    """Choose windows and blocks by their cost, which grows linearly with the number of blocks."""
    passed = shapes.blocks * windows * length
    length = min(length, LENGTH)
    moment_windows = max(1, min(MOMENT_WINDOWS, windows // 4))
    available = max(1, min(MOST_WINDOWS, windows - moment_windows))
    measured = min(shapes.blocks, MEASURED_BLOCKS)
    allowed = max(SHALLOW_BUDGET / shapes.blocks, PASS_SHARE * passed / length)
    divergence_windows = min(available, max(FEWEST_WINDOWS, int(allowed / later_work(shapes, length))))
    gradient_windows = min(available, max(GRADIENT_WINDOWS, divergence_windows))
    return Budget(moment_windows, gradient_windows, divergence_windows, length, _spaced(shapes.blocks, measured))


def later_work(shapes: Shapes, length: int) -> float:
    """Return the cost of passing all cut copies through later blocks and head, in forward passes of one block.

    The copies pass on one window of `length` tokens.
    """
    head = shapes.vocabulary * shapes.d_model / (shapes.passed_weights + length * shapes.heads)
    copies = min(shapes.blocks, MEASURED_BLOCKS) * shapes.parts * len(RATIOS)
    return copies * ((shapes.blocks + 1) / 2 + head)


def split(windows: int, budget: Budget) -> tuple[slice, slice]:
    """Divide the windows into those for moments and those for gradients. A single window is used for both."""
    own = max(1, min(budget.moment_windows, windows - 1))
    first = own if windows > 1 else 0
    return slice(0, own), slice(first, first + budget.gradient_windows)


def sweep_length(blocks: int) -> int:
    """Return the number of blocks that are measured in one sweep through the blocks after them."""
    return -(-blocks // SWEEPS)


def _spaced(blocks: int, count: int) -> tuple[int, ...]:
    """Return `count` block indices at equal distances, with the first and the last block."""
    return tuple(round(step * (blocks - 1) / max(1, count - 1)) for step in range(count))


@dataclass(frozen=True)
class PartMeasurement:
    """Measurements of one part of one block, by sparsity.

    Attributes:
        losses: the energy of the part's output that is lost, at many widths, up to a factor.
        second_order: the second order of the divergence, in nats per token, at a few widths.
        ratios: mean KL(dense ‖ cut) relative to the second order on the same tokens, at these widths. Empty in most
            blocks.
    """

    losses: Curve
    second_order: Curve
    ratios: Curve = field(default_factory=list)


Measured = dict[tuple[int, str], PartMeasurement]
"""Measurements by block and part."""


@dataclass
class Sweeps:
    """Measures every part of every block, cut at some ratios.

    Each part is cut alone, with dense statistics and its own dense output as the target, without token weights, norm
    gains and the refit of gate and up. The rest of the model remains dense. The blocks are measured in a few sweeps:
    the outputs of the cut blocks of a sweep pass the later blocks together, so that each is moved to the device once.

    Attributes:
        architecture: the dense model.
        sizes: the sizes of the parts of every block.
        config: the configuration of the compression.
        budget: the blocks and windows to use.
        moments: the inputs of the next block to measure, for the windows for moments.
        divergence: the same for the windows of the gradients.
        gradients: the gradients at every block.
        device: the compute device.
    """

    architecture: Architecture
    sizes: Sizes
    config: ModeGPTConfig
    budget: Budget
    moments: BlockInputs
    divergence: BlockInputs
    gradients: list[OutputGradients]
    device: torch.device

    def measured(self, known: Measured, *, progress: bool) -> Iterator[Measured]:
        """Yield the measurements of each sweep. Blocks in `known` are not measured again."""
        blocks = len(self.architecture.blocks)
        length = sweep_length(blocks)
        sweeps = [range(blocks)[first : first + length] for first in range(0, blocks, length)]
        done = {index for index, _ in known}
        total = sum(self._passed_blocks(sweep) for sweep in sweeps)
        with bar(total=total, desc="sensitivities", unit="block", shown=progress) as shown:
            for sweep in sweeps:
                if done.isdisjoint(sweep):
                    yield self._measure(sweep, shown.update)
                else:
                    self._leave_out(sweep)
                    shown.update(self._passed_blocks(sweep))

    def _passed_blocks(self, sweep: range) -> int:
        """Return the number of blocks that are passed in a sweep: only those of the sweep, or also all later ones."""
        exact = not set(sweep).isdisjoint(self.budget.blocks)
        return len(self.architecture.blocks) - sweep.start if exact else len(sweep)

    def _leave_out(self, sweep: range) -> None:
        """Pass the dense streams through these blocks without measuring them."""
        for block in self.architecture.blocks[sweep.start : sweep.stop]:
            dense = block.on(self.device)
            self.moments = self._passed(dense, self.moments)
            self._halves(dense)

    def _measure(self, sweep: range, passed: Callable[[], Any]) -> Measured:
        """Return the measurements of these blocks. `passed` is called after every block that the streams passed."""
        found: Measured = {}
        variants: list[Variant] = []
        outputs: Stream = []
        for block in self.architecture.blocks[sweep.start : sweep.stop]:
            dense = block.on(self.device)
            _advance(outputs, dense, self.divergence.on(block.index, self.device))
            with naming(f"block {block.index}"):
                found |= self._measure_block(dense, variants, outputs)
            del dense  # it would stay on the device while the later blocks pass
            passed()
        if variants:
            divergences = self._divergences(sweep, outputs, len(variants), passed)
            for variant, divergence in zip(variants, divergences, strict=True):
                with naming(f"block {variant.block}"):
                    _require_finite(divergence, variant.part, variant.sparsity)
                if variant.second_order >= SMALLEST:
                    ratio = divergence / variant.second_order
                    found[variant.block, variant.part].ratios.append((variant.sparsity, ratio))
        return found

    def _measure_block(self, dense: Block, variants: list[Variant], outputs: Stream) -> Measured:
        """Measure losses and second orders of a block's parts, and pass the streams through the block.

        If the divergence of the block's cut copies is measured, append them to `variants`, and their outputs to
        `outputs`.
        """
        cuts = self._observe(dense)
        first = self.divergence.first(self.budget.divergence_windows)
        halves = self._halves(dense)
        measured: Measured = {}
        for part, size in self.sizes[dense.index].items():
            second_orders: Curve = []
            for width in self._measured_widths(size):
                copied, sparsity = dense.compressible_copy(self.device), 1 - width / size.dense
                with naming(part):
                    cuts[part].install(copied, width)
                effects = self._effects(copied, part, halves)
                second_order = _mean(effects, self.budget.length)
                _require_finite(second_order, part, sparsity)
                second_orders.append((sparsity, second_order))
                if dense.index in self.budget.blocks:
                    second_order = _mean(effects[: len(first.windows)], self.budget.length)
                    variants.append(Variant(dense.index, part, sparsity, second_order))
                    outputs += _run(copied, first.stream, first.on(dense.index, self.device))
            measured[dense.index, part] = PartMeasurement(self._losses(size, cuts[part]), second_orders)
        return measured

    def _halves(self, dense: Block) -> dict[str, list[Half]]:
        """Pass the stream of the gradients through the block, and return its halves, batch by batch."""
        arguments, residual = self.divergence.on(dense.index, self.device), dense.residual
        gradients = self.gradients[dense.index]
        attention, mlp, after = [], [], []
        at_attention = prefetch(gradients.attention, self.device)
        batches = (self.divergence.stream, gradients.mlp)
        for hidden, at_mlp in zip(*(prefetch(each, self.device) for each in batches), strict=True):
            inputs = residual.attention_input(hidden)
            output = dense.attend(inputs, arguments)
            if dense.attends:
                attention.append(Half(inputs, output, next(at_attention)))
            middle = residual.after_attention(residual.add_attention(hidden, output))
            inputs = residual.mlp_input(residual.mlp_stream(hidden, middle))
            output = dense.mlp(inputs)
            mlp.append(Half(inputs, output, at_mlp))
            after.append(residual.after_mlp(residual.add_mlp(middle, output)))
        self.divergence = replace(self.divergence, stream=list(store_like(after, self.divergence.stream)))
        _check(dense, self.divergence.stream, self.divergence)
        return {"qk": attention, "vo": attention, "mlp": mlp, "shared": mlp}

    def _effects(self, copied: Block, part: str, halves: Mapping[str, list[Half]]) -> Tensor:
        """Return ½ Σ (gᵀ Δ)² over the tokens of every window of this rank, (windows,). Δ is the output's change."""
        arguments = self.divergence.on(copied.index, self.device)
        effects = [to_float64(torch.zeros(0, device=self.device))]
        for half in halves[part]:
            attends = part in HEAD_PARTS
            output = copied.attend(half.inputs, arguments) if attends else copied.mlp(half.inputs)
            change = at_least_float32(output) - at_least_float32(half.output)
            effect = (at_least_float32(half.gradient) * change).sum(-1)
            effects.append(to_float64(effect.square().sum(-1)) / 2)
        return torch.cat(effects)

    def _divergences(self, sweep: range, outputs: Stream, variants: int, passed: Callable[[], Any]) -> list[float]:
        """Pass the streams of cut copies, and the dense one, through the blocks after the sweep, and compare them."""
        inputs = self.divergence.first(self.budget.divergence_windows)
        reference = list(inputs.stream)
        for block in self.architecture.blocks[sweep.stop :]:
            dense, arguments = block.on(self.device), inputs.on(block.index, self.device)
            _advance(outputs, dense, arguments)
            _advance(reference, dense, arguments)
            _check(dense, reference, inputs)
            passed()
        tail = self.architecture.tail(self.device)
        divergences = _divergences(tail, reference, outputs, variants)
        if not all(map(math.isfinite, divergences)):
            _check_logits(tail, reference, inputs.windows)
        return divergences

    def _observe(self, dense: Block) -> dict[str, PartCut]:
        """Pass the windows for moments through the block, and return how its parts are cut by their moments."""
        arguments = self.moments.on(dense.index, self.device)
        student = dense.compressible_copy(self.device)
        metrics = OutputMetrics.of(self.gradients[dense.index], dense, self.device)
        entering = self.moments.stream
        heads = LinearMomentSum(ones=dense.output.bias is not None) if dense.attends else None
        with mlp_moments(dense) as mlp, shared_moments(dense) as shared, ExitStack() as stack:
            calls = [] if heads is None else stack.enter_context(calls_of(dense.output))

            def observed(hidden: Tensor) -> Tensor:
                after = dense.forward(hidden, arguments)
                if heads is not None:
                    heads.add(*calls.pop())
                return after

            self.moments = replace(self.moments, stream=list(map_stream(observed, self.device, entering)))
        _check(dense, self.moments.stream, self.moments)
        sizes, config = self.sizes[dense.index], self.config
        cuts = {"mlp": mlp_cut(student, mlp.value(), metrics.mlp, sizes["mlp"], config)}
        if shared is not None:
            cuts["shared"] = shared_cut(student, shared.value(), metrics.mlp, sizes["shared"], config)
        if heads is not None and metrics.query is not None and metrics.attention is not None:
            query_key = residual_matched.observe_query_key(student, entering, metrics.query, arguments)
            cuts["qk"] = query_key_cut(student, query_key, sizes["qk"], config)
            cuts["vo"] = value_output_cut(student, heads.value(), metrics.attention, sizes["vo"], config)
        return cuts

    def _passed(self, dense: Block, inputs: BlockInputs) -> BlockInputs:
        """Pass a dense stream through the block."""
        passed = replace(inputs, stream=list(_run(dense, inputs.stream, inputs.on(dense.index, self.device))))
        _check(dense, passed.stream, passed)
        return passed

    def _losses(self, size: PartSize, cut: PartCut) -> Curve:
        """Return the loss of a part's output at some of its widths, and at those that are measured."""
        narrower = size.widths()[1:]
        some = narrower[:: -(-len(narrower) // LOSS_POINTS)] if narrower else []
        widths = sorted({*some, *self._measured_widths(size)}, reverse=True)
        return [(1 - width / size.dense, cut.loss(size.dense - width)) for width in widths]

    def _measured_widths(self, size: PartSize) -> list[int]:
        """Return the allowed widths nearest to the ratios, without the dense one."""
        widths = {size.nearest(max(size.floor, size.dense * (1 - ratio))) for ratio in RATIOS}
        return sorted(widths - {size.dense})


def _mean(effects: Tensor, length: int) -> float:
    """Return the mean over the tokens of all ranks, from the sums over windows of `length` tokens."""
    windows = distributed.all_reduce(len(effects))
    return float(distributed.all_reduce(float(effects.sum())) / (windows * length))


def _require_finite(divergence: float, part: str, sparsity: float) -> None:
    if not math.isfinite(divergence):
        raise NumericalError(
            f"{part}: with {sparsity:.0%} of it removed the model's output is not finite, although "
            "the dense model's is. Load the model in bfloat16 or float32."
        )


def _check(dense: Block, stream: Stream, inputs: BlockInputs) -> None:
    with naming(f"block {dense.index}"):
        check_dense(stream, inputs.windows)


def _run(block: Block, stream: Stream, arguments: dict[str, Any]) -> Iterator[Tensor]:
    return map_stream(partial(block.forward, arguments=arguments), block.device, stream)


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
