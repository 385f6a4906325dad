"""Cut the experts of a block: every expert loses the same number of hidden channels, chosen by its own tokens (ours).

The router is not changed. A token adds g · expert(x) for each of its experts, with the weight g of the router. An error
of an expert's output therefore counts with g², which weights the moments of the expert.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from optimum_modegpt.architectures import Block
from optimum_modegpt.architectures.experts import PackedExperts, Routing
from optimum_modegpt.calibration.moments import LinearMomentSum
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.least_squares import LinearMoments, centred_refit
from optimum_modegpt.decompositions.nystrom import Elimination, nystrom_refit, select_by_leverage
from optimum_modegpt.decompositions.psd import at_least_float32
from optimum_modegpt.errors import IllConditionedWarning
from optimum_modegpt.methods.channels import eliminate_channels, without_channels
from optimum_modegpt.methods.factors import ExpertsFactors


class ExpertMoments:
    """Accumulates `LinearMoments` of every expert over the tokens that the router sends to it.

    The inputs are the expert's hidden channels. The target is its output; without `bias`, both without that of the
    output.
    """

    def __init__(self, experts: PackedExperts, *, bias: bool = True) -> None:
        module = experts.module
        device, d_model = module.down_proj.device, module.gate_up_proj.shape[1 if module.is_transposed else 2]
        ones = bias and experts.has_bias
        self.experts, self.bias = experts, bias
        self.sums = [LinearMomentSum.zero(experts.width, d_model, device, ones=ones) for _ in range(experts.count)]

    def add(self, routing: Routing, *, missing: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Add the tokens of `routing`, each with a `weight` (tokens,).

        The experts of a token share the part that its MLP's output is `missing` (tokens, d_model). The changes of their
        outputs with the least Σ ‖Δ_e‖² and with Σ g_e Δ_e = missing are Δ_e = g_e · missing / Σ g².
        """
        squares = at_least_float32(routing.weights).square().sum(1).clamp_min(1e-12)
        for expert, moments in enumerate(self.sums):
            tokens, gates = routing.tokens_of(expert)
            hidden = self.experts.hidden(expert, routing.inputs[tokens])
            target = at_least_float32(self.experts.output(expert, hidden, bias=self.bias))
            gates = at_least_float32(gates)
            if missing is not None:
                target = target + missing[tokens] * (gates / squares[tokens])[:, None]
            gates = gates.square()
            moments.add(hidden, target, gates if weight is None else gates * weight[tokens])

    def value(self) -> list[LinearMoments]:
        """Return the moments of every expert so far, over the tokens of all ranks."""
        return [moments.value() for moments in self.sums]


@contextmanager
def mlp_moments(block: Block, *, bias: bool = True) -> Iterator[LinearMomentSum | ExpertMoments]:
    """Add up the moments of an MLP, with or without experts, over all its calls within the context.

    The target is the output of down; without `bias`, both without its bias.
    """
    if (experts := block.experts) is None:
        own = block.down.bias if bias else None
        total, module = LinearMomentSum(ones=own is not None), block.down
        removed = 0.0 if bias or block.down.bias is None else block.down.bias

        def record(_: nn.Module, arguments: Any, output: Any) -> None:
            total.add(arguments[0], output - removed)
    else:
        total, module = ExpertMoments(experts, bias=bias), experts.module

        def record(_: nn.Module, arguments: Any, output: Any) -> None:
            total.add(Routing(*arguments))

    handle = module.register_forward_hook(record)
    try:
        yield total
    finally:
        handle.remove()


def eliminate_experts(
    block: Block, moments: Sequence[LinearMoments], metric: Tensor, rank: int, config: ModeGPTConfig
) -> list[Elimination]:
    """Remove channels of every expert by backward elimination, down to `rank`. The costs are measured in `metric`."""
    downs = _downs(block)
    return [eliminate_channels(down, own, metric, rank, config) for down, own in zip(downs, moments, strict=True)]


def remove_channels(
    block: Block, moments: Sequence[LinearMoments], orders: Sequence[Tensor], config: ModeGPTConfig
) -> ExpertsFactors:
    """Remove the channels of `orders` from every expert, and refit its down for the others."""
    kept, downs, left = [], [], []
    for down, own, order in zip(_downs(block), moments, orders, strict=True):
        channels, dense, own = without_channels(down, own, order, config)
        kept.append(channels)
        downs.append(centred_refit(own, dense, own.refit_ridge(config.output_ridge)))
        left.append(own)
    return ExpertsFactors(kept, downs, _relative_error(left, downs))


def cut_experts(
    block: Block, moments: Sequence[LinearMoments], metric: Tensor, rank: int, config: ModeGPTConfig
) -> ExpertsFactors:
    """Choose the channels that every expert keeps by backward elimination, and refit its down."""
    report_rare(moments, rank)
    orders = [found.order for found in eliminate_experts(block, moments, metric, rank, config)]
    return remove_channels(block, moments, orders, config)


def select_experts(block: Block, moments: Sequence[LinearMoments], rank: int, config: ModeGPTConfig) -> ExpertsFactors:
    """Select the channels of largest ridge leverage of every expert, and refit its down (Nyström, Algorithm 1).

    The moments of an expert with fewer tokens than channels are singular. Its refit is damped to the dense weights.
    """
    report_rare(moments, rank)
    kept, downs, left = [], [], []
    for down, own in zip(_downs(block), moments, strict=True):
        weight, bias = down[: own.width], down[own.width :]
        channels = select_by_leverage(own.gram, rank, ridge=config.leverage_ridge)
        remaining = own.kept(channels)
        if own.tokens < own.width:
            own_output = replace(remaining, cross=own.gram[channels] @ weight)
            refitted = centred_refit(own_output, weight[channels], own.refit_ridge(config.output_ridge))
        else:
            refitted = nystrom_refit(own.gram, channels, weight)
        kept.append(channels)
        downs.append(torch.cat((refitted, bias)))
        left.append(remaining)
    return ExpertsFactors(kept, downs, _relative_error(left, [down[:rank] for down in downs]))


def report_rare(moments: Sequence[LinearMoments], rank: int) -> None:
    """Warn if the router sent fewer calibration tokens to some experts than they keep channels."""
    rare = sum(own.tokens < rank for own in moments)
    if rare:
        fewest = min(own.tokens for own in moments)
        warnings.warn(
            f"{rare} of {len(moments)} experts of a block got fewer calibration tokens than the {rank} channels that "
            f"they keep, the rarest {fewest}. Their weights stay near the dense ones. Calibrate on more tokens.",
            IllConditionedWarning,
            stacklevel=2,
        )


def _downs(block: Block) -> Iterator[Tensor]:
    """Yield the output projection of every expert, (width [+ 1], d_model)."""
    experts = block.experts
    assert experts is not None
    return map(experts.down, range(experts.count))


def _relative_error(moments: Sequence[LinearMoments], downs: Sequence[Tensor]) -> float:
    """Compute ‖t − fit‖ / ‖t‖ over the tokens of all experts."""
    lost = [own.relative_error(down) ** 2 * float(own.energy) for own, down in zip(moments, downs, strict=True)]
    total = sum(float(own.energy) for own in moments)
    return (sum(lost) / total) ** 0.5 if total else 0.0
