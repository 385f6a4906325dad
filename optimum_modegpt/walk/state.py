"""What one compression carries from stage to stage."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_modegpt import distributed
from optimum_modegpt.allocation.plan import Sizes
from optimum_modegpt.architectures import Architecture
from optimum_modegpt.budget.placement import Arrangement, Free, Needs, Streams, arrange, finished_size
from optimum_modegpt.budget.work import Extent, Shapes, shapes_of
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.calibration.streams import BlockInputs, StreamStorage, check_dense, enter, in_batches
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import naming
from optimum_modegpt.methods import sensitivity
from optimum_modegpt.stages import StageClock
from optimum_modegpt.walk.checkpoint import Checkpoint
from optimum_modegpt.walk.self_check import SelfCheck

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """Where a dense model came from: a name of the Hub, or of a folder the last part of its path; and the commit."""

    model: str | None = None
    revision: str | None = None

    def completed(self, model: PreTrainedModel) -> Base:
        """With what `model` itself remembers in place of what is not known."""
        name = getattr(model.config, "_name_or_path", None) or None
        own = Path(name).name if name and os.path.isdir(name) else name
        return Base(self.model or own, self.revision or getattr(model.config, "_commit_hash", None))


@dataclass
class Walk:
    """What one compression carries from stage to stage."""

    architecture: Architecture
    config: ModeGPTConfig
    calibration: TokenWindows
    sizes: Sizes
    """What can be cut where."""
    device: torch.device
    base: Base
    checkpoint: Checkpoint | None
    progress: bool
    clock: StageClock = field(init=False)
    shapes: Shapes = field(init=False)
    """Of the dense model, taken before it changes."""
    batch_size: int = field(init=False)
    """Windows per forward pass; halved where memory does not suffice."""
    streams: Streams = field(init=False)
    """Where the residual streams are kept, and `place`, the same as a place."""
    place: StreamStorage = field(init=False)
    keep_derivatives: bool = field(init=False)
    """Whether there is room for what the refit of gate and up would compute again in every iteration."""
    front: BlockInputs = field(default_factory=lambda: BlockInputs([], []))
    """What enters the first block; nothing before the calibration tokens were embedded."""
    budget: sensitivity.Budget | None = None
    curves: sensitivity.Curves = field(default_factory=dict)
    influences: list[float] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    self_check: SelfCheck | None = None
    """Of the finished model."""

    def __post_init__(self) -> None:
        self.clock = StageClock(self.device)
        self.shapes = shapes_of(self.architecture)
        arrangement = arranged(self)
        host = torch.device("cpu")
        files = StreamStorage(host, Path(tempfile.gettempdir()) if self.checkpoint is None else self.checkpoint.folder)
        self.batch_size = min(
            distributed.all_gather_object(arrangement.batch_size)
        )  # one for all, for a run that is taken up again
        self.streams, self.keep_derivatives = arrangement.streams, arrangement.keep_derivatives
        self.place = {"device": StreamStorage(self.device), "host": StreamStorage(host), "files": files}[self.streams]

    def enter(self, tokens: Tensor, *, first: int = 0) -> BlockInputs:
        """Returns the input of the first block for these calibration windows; `first` is the number of the first.

        Raises:
            NumericalError: it is not finite.
        """
        front = enter(self.architecture, tokens, self.batch_size, self.place, first=first)
        with naming("embedding"):
            check_dense(front.stream, front.windows)
        return front

    def halve_batches(self) -> None:
        """Half as many windows go at once from here on, also where the run is taken up again; less is kept."""
        self.batch_size //= 2
        self.keep_derivatives = False
        if self.checkpoint is not None:
            self.checkpoint.keep_batch_size(self.batch_size)
        self.front = replace(self.front, stream=in_batches(self.front.stream, self.batch_size))

    def warn(self, message: str) -> None:
        """Logs a warning and keeps it for the report, once."""
        if message not in self.warnings:
            logger.warning(message)
            self.warnings.append(message)

    def measured(self) -> dict[str, Any]:
        """What the plan was made from, safe for JSON."""
        budget = {} if self.budget is None else {**vars(self.budget), "ratios": list(self.budget.ratios)}
        curves = {f"{block}.{part}": [list(point) for point in curve] for (block, part), curve in self.curves.items()}
        return {"sensitivities": curves, "sensitivity_budget": budget, "influences": self.influences}


def arranged(walk: Walk) -> Arrangement:
    """Where streams are kept and how many windows go at once, by what memory is free.

    Finished blocks go where the dense ones are; those of the host take no memory where streams or a checkpoint are in
    files.
    """
    model, config = walk.architecture.model, walk.config
    element, length = model.dtype.itemsize, walk.calibration.tokens.shape[1]
    on_host = walk.architecture.blocks[0].output.weight.device.type == "cpu"
    held = {} if on_host and walk.checkpoint is not None else finished_size(walk.shapes, config, element)
    return arrange(
        walk.shapes,
        config,
        extent=Extent(len(walk.calibration.tokens), length, length, element),
        accelerated=walk.device.type != "cpu",
        free=Free.beside(walk.device),
        besides=Needs(files=held) if on_host else Needs(device=held),
        processes=distributed.world_size(),
    )
