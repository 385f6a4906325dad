"""Cut the experts of a block: every expert loses the same number of hidden channels, chosen by its own tokens (ours).

The router is not changed. A token adds g · expert(x) for each of its experts, with the weight g of the router. An error
of an expert's output therefore counts with g², which weights the moments of the expert.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from optimum_modegpt.architectures import Block
from optimum_modegpt.architectures.experts import PackedExperts, Routing
from optimum_modegpt.calibration.moments import LinearMomentSum, with_ones
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.gauss_newton import TokenSample
from optimum_modegpt.decompositions.least_squares import LinearMoments, centred_refit
from optimum_modegpt.decompositions.nystrom import Elimination, nystrom_refit, select_by_leverage
from optimum_modegpt.decompositions.psd import at_least_float32
from optimum_modegpt.errors import IllConditionedWarning
from optimum_modegpt.methods.channels import eliminate_channels, without_channels
from optimum_modegpt.methods.factors import ExpertsFactors
from optimum_modegpt.methods.input_refit import refit_rows, refits_inputs


@dataclass(frozen=True)
class RoutedTokens:
    """Tokens with their experts.

    Attributes:
        routing: the inputs and the experts of the tokens.
        missing: the difference of the wanted from the present output of the MLP, (tokens, d_model), or None for 0.
        weight: the weights of the tokens, (tokens,), or None for 1.
    """

    routing: Routing
    missing: Tensor | None = None
    weight: Tensor | None = None

    def sample(self, experts: PackedExperts, expert: int, *, bias: bool = True) -> tuple[TokenSample, Tensor]:
        """Return the tokens of one expert, and its hidden channels for them, on the device of the experts.

        The target is the expert's output with its share of `missing`. The changes of the outputs of a token's experts
        with the least Σ ‖Δ_e‖² and with Σ g_e Δ_e = missing are Δ_e = g_e · missing / Σ g².
        """
        tokens, gates = self.routing.tokens_of(expert)
        device = experts.module.down_proj.device
        inputs, gates = self.routing.inputs[tokens].to(device), at_least_float32(gates).to(device)
        hidden = experts.hidden(expert, inputs)
        target = at_least_float32(experts.output(expert, hidden, bias=bias))
        if self.missing is not None:
            squares = at_least_float32(self.routing.weights[tokens]).to(device).square().sum(1).clamp_min(1e-12)
            target = target + self.missing[tokens].to(device) * (gates / squares)[:, None]
        weight = gates.square()
        if self.weight is not None:
            weight = weight * self.weight[tokens].to(device)
        return TokenSample(inputs, target, weight), hidden

    def windows(self, length: int) -> Iterator[RoutedTokens]:
        """Yield the windows of `length` tokens. Both `missing` and `weight` must be set."""
        assert self.missing is not None
        assert self.weight is not None
        routing = (self.routing.inputs, self.routing.chosen, self.routing.weights)
        for inputs, chosen, weights, missing, weight in zip(
            *(each.split(length) for each in (*routing, self.missing, self.weight)), strict=True
        ):
            yield RoutedTokens(Routing(inputs, chosen, weights), missing, weight)


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

    def add(self, routed: RoutedTokens) -> None:
        """Add the tokens of a batch to the moments of their experts."""
        for expert, moments in enumerate(self.sums):
            own, hidden = routed.sample(self.experts, expert, bias=self.bias)
            moments.add(hidden, own.target, own.weight)

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
            total.add(RoutedTokens(Routing(*arguments)))

    handle = module.register_forward_hook(record)
    try:
        yield total
    finally:
        handle.remove()


@contextmanager
def shared_moments(block: Block, *, bias: bool = True) -> Iterator[LinearMomentSum | None]:
    """Add up the moments of the shared expert over all its calls within the context. None if the block has none.

    The target is the output of its down projection; without `bias`, without its bias. A token adds g · shared(x) with
    the weight g of its gate, so its moments count with g².
    """
    shared = block.shared
    if shared is None:
        yield None
        return
    total = LinearMomentSum(ones=bias and shared.has_bias)
    removed = shared.module.down_proj.bias if shared.has_bias and not bias else 0.0

    def record(_: nn.Module, arguments: Any, output: Any) -> None:
        (inputs,) = arguments
        total.add(shared.hidden(inputs), output - removed, at_least_float32(shared.gates(inputs)).square())

    handle = shared.module.register_forward_hook(record)
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
    block: Block,
    moments: Sequence[LinearMoments],
    orders: Sequence[Tensor],
    config: ModeGPTConfig,
    windows: Sequence[RoutedTokens] | None = None,
    *,
    keep_derivatives: bool = False,
) -> ExpertsFactors:
    """Remove the channels of `orders` from every expert, and refit its down for the others.

    If the `windows` of the moments are given, gate and up of each expert with enough tokens are refitted as well. In a
    run of several ranks, either every rank gives its windows or none does.
    """
    experts = block.experts
    assert experts is not None
    activation = experts.activation
    rows, downs, left = [], [], []
    for expert, (own, order) in enumerate(zip(moments, orders, strict=True)):
        kept, dense, own = without_channels(experts.down(expert), own, order, config)
        gate_and_up = tuple(row[kept] for row in experts.rows(expert))
        enough = refits_inputs(own.tokens, own.width, len(gate_and_up), config)
        if windows is not None and activation is not None and enough:
            samples = [_refit_sample(window, experts, expert) for window in windows]
            samples = [sample for sample in samples if len(sample.inputs)]
            gate_and_up, own = refit_rows(
                gate_and_up, dense, own, samples, activation, config, keep_derivatives=keep_derivatives
            )
        rows.append(gate_and_up)
        downs.append(centred_refit(own, dense, own.refit_ridge(config.output_ridge)))
        left.append(own)
    return ExpertsFactors(rows, downs, _relative_error(left, downs))


def refits_experts(block: Block, moments: Sequence[LinearMoments], rank: int, config: ModeGPTConfig) -> bool:
    """Return whether gate and up of any expert are refitted when `rank` channels are kept.

    Experts whose hidden channels are not φ(gate) · up are never refitted.
    """
    experts = block.experts
    assert experts is not None
    if rank == experts.width or experts.activation is None:
        return False
    return any(refits_inputs(own.tokens, rank, 2, config) for own in moments)


def _refit_sample(window: RoutedTokens, experts: PackedExperts, expert: int) -> TokenSample:
    """Return the tokens of an expert for `refit_rows`."""
    sample, _ = window.sample(experts, expert)
    inputs = at_least_float32(sample.inputs)
    return replace(sample, inputs=with_ones(inputs) if experts.has_bias else inputs)


def cut_experts(
    block: Block,
    moments: Sequence[LinearMoments],
    metric: Tensor,
    rank: int,
    config: ModeGPTConfig,
    windows: Sequence[RoutedTokens] | None = None,
    *,
    keep_derivatives: bool = False,
) -> ExpertsFactors:
    """Choose the channels that every expert keeps by backward elimination, and refit it as `remove_channels` does."""
    report_rare(moments, rank)
    orders = [found.order for found in eliminate_experts(block, moments, metric, rank, config)]
    return remove_channels(block, moments, orders, config, windows, keep_derivatives=keep_derivatives)


def select_experts(block: Block, moments: Sequence[LinearMoments], rank: int, config: ModeGPTConfig) -> ExpertsFactors:
    """Select the channels of largest ridge leverage of every expert, and refit its down (Nyström, Algorithm 1).

    The moments of an expert with fewer tokens than channels are singular. Its refit is damped to the dense weights.
    """
    experts = block.experts
    assert experts is not None
    report_rare(moments, rank)
    rows, downs, left = [], [], []
    for expert, own in enumerate(moments):
        weight, bias = experts.down(expert).split((own.width, int(experts.has_bias)))
        channels = select_by_leverage(own.gram, rank, ridge=config.leverage_ridge)
        remaining = own.kept(channels)
        if own.tokens < own.width:
            own_output = replace(remaining, cross=own.gram[channels] @ weight)
            refitted = centred_refit(own_output, weight[channels], own.refit_ridge(config.output_ridge))
        else:
            refitted = nystrom_refit(own.gram, channels, weight)
        gate, up = experts.rows(expert)
        rows.append((gate[channels], up[channels]))
        downs.append(torch.cat((refitted, bias)))
        left.append(remaining)
    return ExpertsFactors(rows, downs, _relative_error(left, [down[:rank] for down in downs]))


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
