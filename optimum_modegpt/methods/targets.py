"""The streams of one block that the residual-matched refits compare."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_modegpt.calibration.streams import Stream
from optimum_modegpt.calibration.transfers import prefetch


@dataclass(frozen=True)
class DenseTargets:
    """The dense block's results on the dense stream, one tensor for each batch.

    Attributes:
        attention, mlp: the sums of stream and output of each half, before a norm of the sum.
        attention_weights, mlp_weights: the weights of their tokens.
        after: the stream after the block.
    """

    attention: Stream
    mlp: Stream
    attention_weights: list[Tensor]
    mlp_weights: list[Tensor]
    after: Stream


@dataclass(frozen=True)
class MLPStreams:
    """The compressed streams at the MLP: the one that its norm reads, and the one that its output is added to.

    They are the same object unless the halves are parallel.
    """

    read: Stream
    middle: Stream

    def batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of both on `device`."""
        if self.read is self.middle:
            for batch in prefetch(self.middle, device):
                yield batch, batch
        else:
            yield from zip(prefetch(self.read, device), prefetch(self.middle, device), strict=True)
