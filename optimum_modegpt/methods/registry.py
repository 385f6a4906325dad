"""The compression methods by name, each with its steps and its costs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from optimum_modegpt.architectures import Architecture, Block
from optimum_modegpt.architectures.shapes import Shapes
from optimum_modegpt.calibration.moments import QueryKeyMoments
from optimum_modegpt.calibration.streams import check_dense
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.psd import gram_work
from optimum_modegpt.decompositions.rotary import eliminate_pairs, eliminate_pairs_alone, shared_order
from optimum_modegpt.methods import published, residual_matched, residual_matched_cost, sensitivity_cost
from optimum_modegpt.methods.cost import Extent, Peak, Work, block_forward, block_memory
from optimum_modegpt.methods.method import CalibrationInputs, CutBlock, Method, SharedPairs, StreamPair
from optimum_modegpt.modeling.modegpt_family import Widths


@dataclass(frozen=True)
class ResidualMatched:
    """The residual-matched method, as `compress` runs it."""

    config: ModeGPTConfig
    streams: ClassVar[int] = 2
    uses_gradients: ClassVar[bool] = True

    def cut_block(self, block: Block, widths: Widths, inputs: CalibrationInputs, keep_derivatives: bool) -> CutBlock:
        """Cut and refit a copy of the block. At its dense widths it stays as it is until an earlier one was cut."""
        copied = block.compressible_copy(block.device)
        streams = inputs.streams
        targets = residual_matched.run_dense(block, streams.dense, inputs.arguments)
        check_dense(targets.after, inputs.windows)
        if widths == block.dense_widths and streams.equal:
            return CutBlock(copied, dict.fromkeys(block.parts, 0.0), StreamPair(targets.after, targets.after))
        assert inputs.gradients is not None
        errors, after = residual_matched.compress_block(
            copied,
            inputs,
            targets,
            widths,
            metrics=residual_matched.OutputMetrics.of(inputs.gradients, block, block.device),
            config=self.config,
            keep_derivatives=keep_derivatives,
        )
        return CutBlock(copied, errors, StreamPair(targets.after, after))

    def query_key_moments(self, block: Block, inputs: CalibrationInputs) -> QueryKeyMoments | None:
        """Return the moments of the queries and of the gradients there."""
        assert inputs.gradients is not None
        metric = residual_matched.OutputMetrics.of(inputs.gradients, block, block.device).query
        assert metric is not None
        copied = block.compressible_copy(block.device)
        return residual_matched.observe_query_key(copied, inputs.streams.dense, metric, inputs.arguments)

    def shared_pairs(self, blocks: Sequence[Block], moments: Sequence[QueryKeyMoments], count: int) -> SharedPairs:
        """Remove the pairs of least total cost, one at a time."""
        metric = torch.cat([each.metric for each in moments])
        query = torch.cat([each.query for each in moments])
        eliminate = eliminate_pairs_alone if blocks[0].norms_rotated else eliminate_pairs
        found = eliminate(metric, query, count, shared=True)
        by_block = found.costs.split([block.kv_heads for block in blocks])
        return SharedPairs(found.order[0], torch.stack([costs.sum(0) for costs in by_block]).clamp_min(0).cumsum(1))

    def fit_final_norm(self, architecture: Architecture, streams: StreamPair, device: torch.device) -> nn.Module | None:
        """Fit a copy of the final norm to the dense model's predictions, if anything was cut."""
        if architecture.final_norm is None or streams.equal:
            return copy.deepcopy(architecture.final_norm)
        dense_norm = copy.deepcopy(architecture.final_norm).to(device)
        norm = copy.deepcopy(architecture.final_norm).to(device)
        residual_matched.match_output(
            norm,
            architecture.head(device),
            streams.dense,
            streams.compressed,
            dense_norm,
            kind=architecture.family.norm,
            capped=architecture.own_tail.cap is not None,
        )
        return norm.to(architecture.blocks[-1].device)

    def work(self, shapes: Shapes, extent: Extent, widths: Sequence[int]) -> dict[str, Work]:
        """Return the multiply-adds of all blocks together, by step."""
        return residual_matched_cost.work(shapes, self.config, extent, widths)

    def peaks(self, shapes: Shapes, extent: Extent, keep_derivatives: bool) -> list[Peak]:
        """Return the moments that can be the peak of memory."""
        return residual_matched_cost.peaks(shapes, self.config, extent, keep_derivatives)


@dataclass(frozen=True)
class Published:
    """The published method, as `compress` runs it."""

    config: ModeGPTConfig
    streams: ClassVar[int] = 1
    uses_gradients: ClassVar[bool] = False

    def cut_block(self, block: Block, widths: Widths, inputs: CalibrationInputs, keep_derivatives: bool) -> CutBlock:
        """Cut a copy of the block by the moments of the dense stream. A block at its dense widths stays as it is."""
        moments, after = published.observe(block, inputs.streams.dense, inputs.arguments)
        check_dense(after, inputs.windows)
        copied = block.compressible_copy(block.device)
        if widths == block.dense_widths:
            return CutBlock(copied, dict.fromkeys(block.parts, 0.0), StreamPair(after, after))
        errors = published.compress_block(copied, moments, widths, self.config, inputs.pairs)
        return CutBlock(copied, errors, StreamPair(after, after))

    def query_key_moments(self, block: Block, inputs: CalibrationInputs) -> QueryKeyMoments | None:
        """Return the moments of queries and keys."""
        moments, _ = published.observe(block, inputs.streams.dense, inputs.arguments)
        return None if moments.attention is None else moments.attention.query_key

    def shared_pairs(self, blocks: Sequence[Block], moments: Sequence[QueryKeyMoments], count: int) -> SharedPairs:
        """Remove the pairs of the smallest scores, relative to those of their group."""
        metric = torch.cat([each.metric for each in moments])
        query = torch.cat([each.query for each in moments])
        return SharedPairs(shared_order(query, metric)[: blocks[0].head_dim // 2 - count])

    def fit_final_norm(self, architecture: Architecture, streams: StreamPair, device: torch.device) -> nn.Module | None:
        """Return a copy of the final norm."""
        return copy.deepcopy(architecture.final_norm)

    def work(self, shapes: Shapes, extent: Extent, widths: Sequence[int]) -> dict[str, Work]:
        """Return the multiply-adds of all blocks together, by step."""
        moments = shapes.d_model**2 + shapes.chosen * gram_work(shapes.mlp) + shapes.heads**2 // shapes.head_count
        return {
            "residual streams": {"own": shapes.blocks * block_forward(shapes, extent.windows, extent.length)},
            "moments": {"moments": shapes.blocks * extent.tokens * moments},
            "factorisations": {"exact": shapes.blocks * (shapes.experts * shapes.mlp**3 + 10 * shapes.d_model**3)},
        }

    def peaks(self, shapes: Shapes, extent: Extent, keep_derivatives: bool) -> list[Peak]:
        """Return the moments that can be the peak of memory."""
        streams = {"residual streams": 3 * extent.tokens * shapes.d_model * extent.element}
        return [(needed, streams) for needed in block_memory(shapes, extent)]


METHODS = {"default": ResidualMatched, "paper": Published}


def method_of(config: ModeGPTConfig) -> Method:
    """Return the method that a configuration names."""
    return METHODS[config.method](config)


def uses_gradients(config: ModeGPTConfig) -> bool:
    """Return whether a compression uses the gradients of the dense model's predictions."""
    return config.sparsity > 0 and (method_of(config).uses_gradients or config.resolved_allocation == "sensitivity")


def work_of(
    shapes: Shapes,
    config: ModeGPTConfig,
    extent: Extent,
    widths: Sequence[int] | None = None,
) -> dict[str, dict[str, Work]]:
    """Return the multiply-adds of all blocks together, by stage ("gradients", "allocate", "decompose") and step.

    `widths` are the kept widths of the MLPs. None estimates them. Work that the code repeats is counted once.
    """
    gradients, allocate = {}, {}
    if uses_gradients(config):
        gradients["gradients"] = sensitivity_cost.gradients_work(shapes, extent)
    if config.sparsity and config.resolved_allocation == "sensitivity":
        allocate["sensitivities"] = sensitivity_cost.work(shapes, extent)
    elif config.sparsity and config.resolved_allocation == "influence":
        allocate["influences"] = {"own": shapes.blocks * block_forward(shapes, extent.windows, extent.length)}
    if widths is None:
        widths = [int(shapes.mlp * (1 - config.sparsity))] * shapes.blocks
    decompose = method_of(config).work(shapes, extent, widths)
    return {"gradients": gradients, "allocate": allocate, "decompose": decompose}


def peaks_of(shapes: Shapes, config: ModeGPTConfig, extent: Extent, keep_derivatives: bool) -> list[Peak]:
    """Return the moments that can be the peak of memory. `keep_derivatives` is that of `Placement`."""
    found = method_of(config).peaks(shapes, extent, keep_derivatives)
    if config.sparsity and config.resolved_allocation == "sensitivity":
        found += sensitivity_cost.peaks(shapes, extent)
    if not uses_gradients(config):
        return found
    gradients = {"gradients": sensitivity_cost.gradients_memory(shapes, extent)}
    found += sensitivity_cost.gradients_peaks(shapes, extent)
    return [(needed, streams | gradients) for needed, streams in found]
