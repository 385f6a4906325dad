"""Remove whole experts from every block: those whose weighted outputs are smallest on average (REAP).

The others and their router rows stay as they are. Experts are never merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimum_modegpt import distributed
from optimum_modegpt.architectures.experts import PackedExperts, Routing
from optimum_modegpt.decompositions.psd import at_least_float32, to_float64

MASSIVE_SHARE = 0.1
"""Smallest largest activation of a protected expert, as a share of that of all experts."""
MASSIVE_QUANTILE = 0.995
"""Quantile of the largest activations of all experts that a protected expert exceeds too."""


@dataclass(frozen=True)
class ExpertUse:
    """The use of every expert of a block, (experts,) each.

    Attributes:
        saliency: the mean of g · ‖expert(x)‖ over the tokens that the router sends to it; 0 without tokens.
        peak: the largest |expert(x)| of a single channel.
    """

    saliency: Tensor
    peak: Tensor


class ExpertUseSum:
    """Accumulates the use of the experts of a block."""

    def __init__(self, experts: PackedExperts) -> None:
        self.experts = experts
        zero = to_float64(torch.zeros(experts.count, device=experts.module.down_proj.device))
        self.total, self.tokens, self.peak = zero, zero.clone(), zero.clone()

    def add(self, routing: Routing) -> None:
        """Add the tokens of `routing`."""
        for expert in range(self.experts.count):
            tokens, gates = routing.tokens_of(expert)
            if len(tokens) == 0:
                continue
            output = at_least_float32(self.experts.output(expert, self.experts.hidden(expert, routing.inputs[tokens])))
            self.total[expert] += (at_least_float32(gates) * output.norm(dim=1)).sum()
            self.tokens[expert] += len(tokens)
            self.peak[expert] = torch.maximum(self.peak[expert], output.abs().max().to(self.peak))

    def value(self) -> ExpertUse:
        """Return the use so far, over the tokens of all ranks."""
        total, tokens = distributed.all_reduce(self.total), distributed.all_reduce(self.tokens)
        peaks = [peak.to(self.peak) for peak in distributed.all_gather_object(self.peak.cpu())]
        return ExpertUse(total / tokens.clamp_min(1), torch.stack(peaks).amax(0))


def kept_experts(uses: Sequence[ExpertUse], kept: int, groups: int = 1) -> list[Tensor]:
    """Return the experts that every block keeps, (kept,) in increasing order: the protected and the most salient ones.

    Of the `groups` of a router, each keeps the same number.

    An expert is protected if its largest activation is at least `MASSIVE_SHARE` of that of all experts, and above the
    quantile. Massive activations of a few experts serve as attention sinks, although few tokens reach these experts.
    """
    peaks = torch.cat([use.peak for use in uses])
    limit = torch.maximum(MASSIVE_SHARE * peaks.max(), peaks.quantile(MASSIVE_QUANTILE))
    found = []
    for use in uses:
        order = use.saliency.masked_fill(use.peak > limit, torch.inf).unflatten(0, (groups, -1))
        own = order.topk(kept // groups).indices
        first = torch.arange(groups, device=own.device)[:, None] * order.shape[1]
        found.append((first + own).flatten().sort().values)
    return found


def select_experts_of(module: Any, count: int, kept: Tensor) -> None:
    """Leave the experts `kept` in the parameters and buffers of a module, on their first axis of length `count`.

    Routers and experts also have this number as an attribute.
    """
    for owner in module.modules():
        if getattr(owner, "num_experts", None) == count:
            owner.num_experts = len(kept)
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            axis = next((axis for axis, size in enumerate(tensor.shape) if size == count), None)
            if axis is None:
                continue
            selected = tensor.detach().index_select(axis, kept.to(tensor.device))
            if isinstance(tensor, torch.nn.Parameter):
                selected = torch.nn.Parameter(selected, requires_grad=tensor.requires_grad)
            setattr(owner, name, selected)
