"""The state of a running compression: where its streams are stored, its measurements, warnings and times."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from optimum_modegpt import distributed
from optimum_modegpt.allocation.sensitivity import Curve, curve_from_losses, divergences_of, with_losses
from optimum_modegpt.budget.compute_dtype import SLOW, compute_dtype, float32_weights, slowdown
from optimum_modegpt.budget.placement import Free, Needs, Placement, Storage, choose_placement, finished_size
from optimum_modegpt.calibration.gradients import OutputGradients
from optimum_modegpt.calibration.streams import BlockInputs, StreamStorage, check_dense, enter, in_batches
from optimum_modegpt.errors import naming
from optimum_modegpt.methods.cost import Extent
from optimum_modegpt.methods.sensitivity import Budget, Measured, PartMeasurement
from optimum_modegpt.stages import StageClock
from optimum_modegpt.walk.precision import Precision
from optimum_modegpt.walk.request import Request

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemovedExperts:
    """The experts that every block with experts kept, and the number of parameters that the others had."""

    kept: tuple[tuple[int, ...], ...]
    parameters: int


@dataclass
class Measurements:
    """The measurements from which a plan is made. They are empty if the allocation needs none.

    `shared_pairs` is the order in which all heads lose the same rotary pairs, and `pair_losses` the energy that each
    block has then lost, as in `SharedPairs`. They are empty if each head keeps its own pairs. `pair_step` is the
    sparsity that the loss of one pair adds.
    """

    parts: Measured = field(default_factory=dict)
    budget: Budget | None = None
    influences: list[float] = field(default_factory=list)
    shared_pairs: list[int] = field(default_factory=list)
    pair_losses: dict[int, list[float]] = field(default_factory=dict)
    pair_step: float = 0.0

    def curves(self) -> dict[tuple[int, str], Curve]:
        """Return the divergence of every part of every block by sparsity."""
        second_orders = {key: part.second_order for key, part in self.parts.items()}
        ratios = {key: part.ratios for key, part in self.parts.items() if part.ratios}
        divergences = divergences_of(second_orders, ratios)
        curves: dict[tuple[int, str], Curve] = {
            key: curve_from_losses(part.losses, divergences[key]) for key, part in self.parts.items()
        }
        for index, lost in self.pair_losses.items():
            if (part := self.parts.get((index, "qk"))) is not None:
                curves[index, "qk"] = with_losses(curves[index, "qk"], part.losses, lost, self.pair_step)
        return curves

    def for_report(self) -> dict[str, Any]:
        """Return the fields of a report, safe for JSON."""
        budget = {} if self.budget is None else {**vars(self.budget), "blocks": list(self.budget.blocks)}
        curves = {f"{block}.{part}": list(map(list, curve)) for (block, part), curve in self.curves().items()}
        return {"sensitivities": curves, "sensitivity_budget": budget, "influences": self.influences}

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements, safe for JSON."""
        parts = {f"{block}.{part}": vars(measured) for (block, part), measured in self.parts.items()}
        budget = None if self.budget is None else vars(self.budget)
        return {"parts": parts, "budget": budget, "influences": self.influences} | {
            "shared_pairs": self.shared_pairs,
            "pair_losses": self.pair_losses,
            "pair_step": self.pair_step,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Measurements:
        """Create the measurements from the result of `to_dict`, also after it was JSON."""
        parts: Measured = {}
        for name, measured in fields["parts"].items():
            block, _, part = name.partition(".")
            parts[int(block), part] = PartMeasurement(
                **{kind: [(sparsity, value) for sparsity, value in curve] for kind, curve in measured.items()}
            )
        budget = fields["budget"]
        if budget is not None:
            budget = Budget(**{**budget, "blocks": tuple(budget["blocks"])})
        found = cls(parts, budget, fields["influences"])
        if "pair_step" in fields:  # older checkpoints have none, so their pairs are measured again
            found.shared_pairs, found.pair_step = fields["shared_pairs"], fields["pair_step"]
            found.pair_losses = {int(index): lost for index, lost in fields["pair_losses"].items()}
        return found


@dataclass
class State:
    """The state of a running compression.

    Attributes:
        clock: the stages so far, with time and memory.
        precision: the dtype of all computations.
        batch_size: number of windows per forward pass. It is halved if memory runs out.
        streams: the kind of storage of the residual streams.
        storage: that storage.
        keep_derivatives: whether there is memory to keep the derivatives of the hidden channels in the MLP's refit.
        inputs: the inputs of the first block. They are empty until the calibration tokens are embedded.
        gradients: the gradients at every block. They are empty until they are measured.
        measurements: the measurements from which the plan is made.
        warnings: the warnings so far, for the report.
    """

    clock: StageClock
    precision: Precision
    batch_size: int
    streams: Storage
    storage: StreamStorage
    keep_derivatives: bool
    inputs: BlockInputs = field(default_factory=lambda: BlockInputs([], []))
    gradients: list[OutputGradients] = field(default_factory=list)
    measurements: Measurements = field(default_factory=Measurements)
    warnings: list[str] = field(default_factory=list)
    removed: RemovedExperts | None = None

    @classmethod
    def start(cls, request: Request) -> State:
        """Choose dtype, batch size and storage by the memory that is free now. All ranks use the same dtype and batch
        size.
        """
        precision = choose_precision(request)
        placement = place(request, precision)
        host = torch.device("cpu")
        if placement.streams == "device":
            storage = StreamStorage(request.device)
        elif placement.streams == "host":
            storage = StreamStorage(host)
        else:
            folder = tempfile.gettempdir() if request.checkpoint is None else request.checkpoint.folder
            storage = StreamStorage(host, Path(folder))
        batch_size = min(distributed.all_gather_object(placement.batch_size))
        clock = StageClock(request.device)
        state = cls(clock, precision, batch_size, placement.streams, storage, placement.keep_derivatives)
        if (factor := slowdown(request.device, precision.compute)) > SLOW:
            state.warn(
                f"products in {precision.compute} take {factor:.0f} times as long as in float32 on {request.device}. "
                "To compute in float32, its weights must fit in half of the free memory of every process when the run "
                "starts. Free some memory and start again, or use another device."
            )
        return state

    def warn(self, message: str) -> None:
        """Log a warning, and keep it for the report. A repeated warning is ignored."""
        if message not in self.warnings:
            logger.warning(message)
            self.warnings.append(message)

    def embed(self, request: Request, windows: slice = slice(None), length: int | None = None) -> BlockInputs:
        """Return the inputs of the first block for these calibration windows, or for their first `length` tokens.

        Raises:
            NumericalError: they are not finite.
        """
        tokens = request.calibration.tokens[windows, :length]
        inputs = enter(request.architecture, tokens, self.batch_size, self.storage, first=windows.start or 0)
        with naming("embedding"):
            check_dense(inputs.stream, inputs.windows)
        return inputs

    def halve_batch_size(self, request: Request) -> None:
        """Halve the number of windows per forward pass from now on, also for a run that resumes this one."""
        self.batch_size //= 2
        self.keep_derivatives = False
        if request.checkpoint is not None:
            request.checkpoint.keep_batch_size(self.batch_size)
        self.inputs = replace(self.inputs, stream=in_batches(self.inputs.stream, self.batch_size))
        self.gradients = []


def choose_precision(request: Request) -> Precision:
    """Choose the dtype of all computations: that of the run that this one resumes, or the fastest. All ranks agree."""
    model, checkpoint = request.architecture.model, request.checkpoint
    known = None if checkpoint is None else checkpoint.read()
    if known is not None and known.compute_dtype is not None:
        own = getattr(torch, known.compute_dtype)
    else:
        home = request.architecture.blocks[0].device
        own = compute_dtype(model, request.device, home, distributed.world_size())
    chosen = distributed.all_gather_object(own)
    return Precision.of(model, own if len(set(chosen)) == 1 else model.dtype)


def place(request: Request, precision: Precision) -> Placement:
    """Choose the storage of the streams and the batch size by the free memory.

    Finished blocks are stored on the device of the dense ones. On the host, they use no memory if there is a
    checkpoint.
    """
    model, config = request.architecture.model, request.config
    element, length = precision.compute.itemsize, request.calibration.tokens.shape[1]
    on_host = request.architecture.blocks[0].device.type == "cpu"
    weights = {} if precision.compute == precision.stored else float32_weights(model)
    finished = {}
    if not on_host or request.checkpoint is None:
        finished = finished_size(request.shapes, config, precision.stored.itemsize)
    return choose_placement(
        request.shapes,
        config,
        extent=Extent(len(request.calibration.tokens), length, length, element),
        accelerated=request.device.type != "cpu",
        free=Free.now(request.device),
        held=Needs(host=weights, files=finished) if on_host else Needs(device=weights | finished),
        processes=distributed.world_size(),
    )
