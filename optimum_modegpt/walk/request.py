"""The request of one compression: everything that is known before any work, and does not change."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from optimum_modegpt.allocation.plan import Plan, Sizes
from optimum_modegpt.architectures import Architecture
from optimum_modegpt.architectures.shapes import Shapes
from optimum_modegpt.budget.size_target import Target
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.layouts.limits import WideParts
from optimum_modegpt.walk.checkpoint import Checkpoint


@dataclass(frozen=True)
class Base:
    """The origin of a dense model.

    Attributes:
        model: its name on the Hub, or the last part of its folder's path.
        revision: its commit on the Hub.
    """

    model: str | None = None
    revision: str | None = None

    def completed(self, model: PreTrainedModel) -> Base:
        """Return the origin, with missing fields filled from the configuration of `model`."""
        name = getattr(model.config, "_name_or_path", None) or None
        if name and os.path.isdir(name):
            name = Path(name).name
        return Base(self.model or name, self.revision or getattr(model.config, "_commit_hash", None))


@dataclass(frozen=True)
class Request:
    """The request of one compression.

    Attributes:
        architecture: the dense model and its blocks.
        config: the settings. Their sparsity is that of `plan`, if there is a plan, or reaches the `target`.
        target: the requested size of the result, or None if a sparsity or a plan was requested.
        calibration: the calibration windows of all ranks.
        sizes: dense width and allowed widths of every part.
        wide: the parts that stay at full width, and why.
        shapes: the sizes of the dense model, taken before it changes.
        device: the compute device.
        base: the origin of the model, for the record.
        plan: the caller's plan, or None to make one.
        checkpoint: the working folder, or None to keep finished work in memory.
        show_progress: whether to show progress bars.
    """

    architecture: Architecture
    config: ModeGPTConfig
    target: Target | None
    calibration: TokenWindows
    sizes: Sizes
    wide: WideParts
    shapes: Shapes
    device: torch.device
    base: Base
    plan: Plan | None
    checkpoint: Checkpoint | None
    show_progress: bool
