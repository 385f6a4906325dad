"""Compute a 16-bit model in float32 on a device that is slow in 16 bits, and store the result in its own dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Precision:
    """The dtype in which a compression computes, and the dtype in which the model is stored."""

    compute: torch.dtype
    stored: torch.dtype
    others: frozenset[str]
    """Names of the parameters that the dense model stores in another dtype, such as those of some routers."""

    @classmethod
    def of(cls, model: PreTrainedModel, compute: torch.dtype) -> Precision:
        """Create the precision of a compression of `model` that computes in `compute`."""
        others = (name for name, parameter in model.named_parameters() if parameter.dtype != model.dtype)
        return cls(compute, model.dtype, frozenset(others))

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Hold the parameters of `model` in the compute dtype within the context. Restore the same tensors on exit."""
        if self.compute == self.stored:
            yield
            return
        originals = {each: each.data for each in model.parameters() if each.dtype == self.stored}
        try:
            for parameter, original in originals.items():
                parameter.data = original.to(self.compute)
            yield
        finally:
            for parameter, original in originals.items():
                parameter.data = original

    def to_stored(self, module: nn.Module, path: str) -> nn.Module:
        """Convert the parameters of `module`, the new module at `path` of the model, to their stored dtype."""
        if self.compute != self.stored:
            for name, parameter in module.named_parameters():
                if f"{path}.{name}" not in self.others and parameter.dtype == self.compute:
                    parameter.data = parameter.data.to(self.stored)
        return module
