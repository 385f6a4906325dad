"""The interface of a compression method: how it cuts a block, and how it fits the final norm after the last one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from optimum_modegpt.architectures import Architecture, Block
from optimum_modegpt.architectures.shapes import Shapes
from optimum_modegpt.calibration.gradients import OutputGradients
from optimum_modegpt.calibration.moments import QueryKeyMoments
from optimum_modegpt.calibration.streams import Stream
from optimum_modegpt.methods.cost import Extent, Peak, Work
from optimum_modegpt.modeling.modegpt_family import Widths


@dataclass(frozen=True)
class StreamPair:
    """The residual stream at one position, through the dense blocks and through the compressed ones.

    Both are the same object as long as nothing was cut, and for a method that has no compressed stream.
    """

    dense: Stream
    compressed: Stream

    @property
    def equal(self) -> bool:
        """Return whether both are the same stream."""
        return self.compressed is self.dense


@dataclass(frozen=True)
class CalibrationInputs:
    """The calibration data at the input of one block.

    Attributes:
        streams: the residual streams.
        arguments: the other arguments of the block's forward pass, on the compute device.
        windows: the numbers of the calibration windows of `streams`, for error messages.
        gradients: the gradients at the block, or None for a method that uses none.
        pairs: the rotary pairs (count,) that all heads of all blocks keep, increasing; None if each keeps its own.
    """

    streams: StreamPair
    arguments: dict[str, Any]
    windows: Tensor
    gradients: OutputGradients | None
    pairs: Tensor | None = None


@dataclass(frozen=True)
class CutBlock:
    """A compressed block, the relative error of each part, and the streams after the block."""

    block: Block
    errors: dict[str, float]
    after: StreamPair


@dataclass(frozen=True)
class SharedPairs:
    """The order in which all heads lose the same rotary pairs.

    Attributes:
        order: the pairs (steps,), the first to lose first.
        losses: the energy that each block has lost after each step, (blocks, steps), in the unit of `PartCut.losses`;
            None if the method does not measure it.
    """

    order: Tensor
    losses: Tensor | None = None


class Method(Protocol):
    """A compression method, created from a configuration: its steps and its costs.

    Attributes:
        streams: number of residual streams between two blocks.
        uses_gradients: whether it uses the gradients of the dense model's predictions.
    """

    streams: ClassVar[int]
    uses_gradients: ClassVar[bool]

    def cut_block(self, block: Block, widths: Widths, inputs: CalibrationInputs, keep_derivatives: bool) -> CutBlock:
        """Return a compressed copy of `block`. The block itself does not change.

        Args:
            block: the dense block, on the compute device.
            widths: the widths to keep.
            inputs: the calibration data at the block's input.
            keep_derivatives: whether there is memory to keep the derivatives of the hidden channels.

        Raises:
            NumericalError: the dense output is not finite.
        """
        ...

    def query_key_moments(self, block: Block, inputs: CalibrationInputs) -> QueryKeyMoments | None:
        """Return the moments from which the pairs of the dense `block` are chosen. None if its heads stay wide."""
        ...

    def shared_pairs(self, blocks: Sequence[Block], moments: Sequence[QueryKeyMoments], count: int) -> SharedPairs:
        """Choose the order in which all heads of these blocks lose pairs, down to `count`, from the moments of each."""
        ...

    def fit_final_norm(self, architecture: Architecture, streams: StreamPair, device: torch.device) -> nn.Module | None:
        """Return the compressed model's final norm, or None if the model has none. The model does not change."""
        ...

    def work(self, shapes: Shapes, extent: Extent, widths: Sequence[int]) -> dict[str, Work]:
        """Return the multiply-adds of all blocks together, by step. `widths` are the kept widths of the MLPs."""
        ...

    def peaks(self, shapes: Shapes, extent: Extent, keep_derivatives: bool) -> list[Peak]:
        """Return the moments that can be the peak of memory."""
        ...
