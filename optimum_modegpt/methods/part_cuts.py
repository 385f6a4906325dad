"""Cut a part of a block alone to any width, with dense statistics, and measure the loss of its output (ours)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_modegpt import distributed
from optimum_modegpt.allocation.plan import PartSize
from optimum_modegpt.architectures import Block
from optimum_modegpt.calibration.moments import QueryKeyMoments
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.least_squares import LinearMoments
from optimum_modegpt.decompositions.whitened_svd import two_sided_energies, value_energies
from optimum_modegpt.methods import experts, residual_matched
from optimum_modegpt.methods.channels import eliminate_channels
from optimum_modegpt.methods.mlp_refit import cut_channels


@dataclass(frozen=True)
class PartCut:
    """Cuts one part of a block to any width.

    Attributes:
        install: cuts the part of a copy of the block to a width.
        losses: the energy of the part's output that is lost after each removed unit, up to a constant factor.
        unit: the width that is removed at once: 2 for rotary pairs, else 1.
    """

    install: Callable[[Block, int], None]
    losses: list[float]
    unit: int = 1

    def loss(self, removed: int) -> float:
        """Return the energy that is lost with `removed` of the part's width."""
        return self.losses[removed // self.unit - 1] if removed else 0.0


def query_key_cut(student: Block, moments: QueryKeyMoments | None, size: PartSize, config: ModeGPTConfig) -> PartCut:
    """Return a cut that removes query-key pairs if query and key are rotated, else directions of their common space."""
    pairs = residual_matched.eliminate_query_key(student, moments, size.floor)

    def install(block: Block, rank: int) -> None:
        factors = residual_matched.cut_query_key(block, moments, pairs, rank, config)
        block.install_query_key(factors.query, factors.key, factors.pairs, factors.gains)

    if moments is None:
        return PartCut(install, [])
    if pairs is not None:
        return PartCut(install, _cumulated(pairs.costs.sum(0)), unit=2)
    return PartCut(install, _cumulated(two_sided_energies(moments.query, moments.metric).sum(0).flip(0)))


def value_output_cut(
    student: Block, moments: LinearMoments, metric: Tensor, size: PartSize, config: ModeGPTConfig
) -> PartCut:
    """Return a cut that removes directions of the value space of every key-value group, or single coordinates."""

    def install(block: Block, rank: int) -> None:
        factors = residual_matched.cut_value_output(block, moments, metric, rank, config)
        block.install_value_output(factors.value, factors.output, factors.gate)

    if student.keeps_coordinates:
        elimination = residual_matched.eliminate_values(student, moments, metric, size.floor, config)
        return PartCut(install, _cumulated(elimination.costs.sum(0)))
    groups = residual_matched.value_groups(student, moments, metric, config)
    energies = torch.stack([value_energies(gram, rows) for gram, rows in groups])
    return PartCut(install, _cumulated(energies.sum(0).flip(0)))


def mlp_cut(
    student: Block,
    moments: LinearMoments | list[LinearMoments],
    metric: Tensor,
    size: PartSize,
    config: ModeGPTConfig,
) -> PartCut:
    """Return a cut that removes hidden channels of the MLP, or of every expert, for which `moments` are a list."""
    if isinstance(moments, list):
        return _experts_cut(student, moments, metric, size, config)
    elimination = eliminate_channels(student.mlp_channels().down, moments, metric, size.floor, config)

    def install(block: Block, rank: int) -> None:
        order = elimination.order[: moments.width - rank]
        cut_channels(block.mlp_channels(), moments, order, config).install(block)

    return PartCut(install, _cumulated(elimination.costs))


def shared_cut(
    student: Block, moments: LinearMoments, metric: Tensor, size: PartSize, config: ModeGPTConfig
) -> PartCut:
    """Return a cut that removes hidden channels of the shared expert."""
    elimination = eliminate_channels(student.shared_channels().down, moments, metric, size.floor, config)

    def install(block: Block, rank: int) -> None:
        order = elimination.order[: moments.width - rank]
        block.install_shared(cut_channels(block.shared_channels(), moments, order, config).channels)

    return PartCut(install, _cumulated(elimination.costs))


def _experts_cut(
    student: Block, moments: list[LinearMoments], metric: Tensor, size: PartSize, config: ModeGPTConfig
) -> PartCut:
    found = experts.eliminate_experts(student, moments, metric, size.floor, config)

    def install(block: Block, rank: int) -> None:
        orders = [elimination.order[: size.dense - rank] for elimination in found]
        experts.remove_channels(block, moments, orders, config).install(block)

    return PartCut(install, _cumulated(torch.stack([elimination.costs for elimination in found]).sum(0)))


def _cumulated(energies: Tensor) -> list[float]:
    """Return the sums of the first energies. All ranks of a distributed run get the same ones."""
    return distributed.broadcast(energies.clamp_min(0).cumsum(0)).cpu().tolist()
