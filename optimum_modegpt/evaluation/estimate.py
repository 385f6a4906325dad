"""What compressing a model would take: a calculation from shapes, before any weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_modegpt.architectures import Architecture, Block, Family, check_model_type
from optimum_modegpt.compress import TOKENS_AT_ONCE, check_reachable, part_sizes
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.methods import sensitivity
from optimum_modegpt.methods.residual_matched import FINAL_ROUNDS, GAIN_TOKENS, LOGITS, REFIT_TOKENS
from optimum_modegpt.report import PARTS

FLOAT64 = 8
FLOAT32 = 4
LIBRARIES = 12 * 2**20
"""Bytes on the host that numerical libraries take for themselves once they compute; measured 11 to 20 MiB."""

Parts = dict[str, int]
"""Bytes by what takes them."""


@dataclass(frozen=True)
class Shapes:
    """Sizes of one block: residual width, joint width of the heads, their number and that of their groups, MLP width,
    matrices at the MLP's input, weights of the projections; and of the model, its vocabulary and blocks."""

    d_model: int
    heads: int
    head_count: int
    groups: int
    mlp: int
    mlp_inputs: int
    weights: int
    vocabulary: int = 0
    blocks: int = 0

    @property
    def moments(self) -> int:
        """Numbers in the second moments and cross moments of a block, with a factorisation of the largest."""
        return 3 * self.mlp**2 + self.mlp * self.d_model + 2 * self.heads**2 + self.heads * self.d_model


@dataclass(frozen=True)
class Extent:
    """How much is calibrated on: windows, their length, tokens of one batch, bytes of an activation."""

    windows: int
    length: int
    batch: int
    element: int

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.windows * self.length


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak, and multiply-adds in units of one forward pass of the blocks over the calibration tokens.

    Attributes:
        parameters: of the model, tied ones once.
        block_parameters: those of the projections that can be cut.
        calibration_tokens: all of them.
        device_memory: what the accelerator holds at its peak.
        cpu_memory: what the host holds beside an accelerator at its peak, above the program itself.
        cpu_only_memory: what the host holds at its peak where it computes as well.
        mapped_weights: memory maps of the model's files: they count as resident size while they are in use, but the
            system takes the pages back where memory is short.
        disk: the unfinished work beside the output, and the result.
        forward_multiply_adds: of one forward pass.
        forward_passes: how many of them the steps are worth.
    """

    parameters: int
    block_parameters: int
    calibration_tokens: int
    device_memory: Parts
    cpu_memory: Parts
    cpu_only_memory: Parts
    mapped_weights: int
    disk: Parts
    forward_multiply_adds: int
    forward_passes: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """All of it and the sums, safe for JSON."""
        sums = {f"{name}_total": sum(getattr(self, name).values()) for name in MEMORIES}
        return {**asdict(self), **sums, "forward_passes_total": sum(self.forward_passes.values())}


MEMORIES = ("device_memory", "cpu_memory", "cpu_only_memory", "disk")


def estimate(
    model: PreTrainedModel, config: ModeGPTConfig, sequence_length: int, *, weights_mapped: bool = True
) -> Estimate:
    """What the command `compress` would need for `model`, which may stand on the meta device.

    Counted are tensors: what the allocator keeps back of freed ones, and the program itself, come on top.

    Args:
        model: the dense model.
        config: what to do.
        sequence_length: tokens of a calibration window.
        weights_mapped: whether the weights stay in their files, as they do when they are loaded as they are stored.

    Raises:
        AlreadyCompressed, UnsupportedModel, InvalidConfig: as `compress` would.
    """
    family = check_model_type(model.config.model_type)
    layout = family.layout
    blocks: Any = model.base_model.get_submodule(layout.blocks)
    head: Any = model.get_output_embeddings()
    _check_reachable(model, family, blocks, config)
    each = [_shapes(block, layout) for block in blocks]
    largest = max(each, key=lambda shape: shape.weights)
    shapes = replace(largest, vocabulary=head.out_features, blocks=len(each))
    element, weights = model.dtype.itemsize, sum(shape.weights for shape in each)
    extent = Extent(config.num_samples, sequence_length, _batch_tokens(config, sequence_length), element)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    forward = extent.tokens * (weights + len(blocks) * shapes.heads * sequence_length)
    loaded = {"libraries": LIBRARIES, **({} if weights_mapped else {"weights": parameters * element})}
    stages = _stages(shapes, config, extent)
    return Estimate(
        parameters=parameters,
        block_parameters=weights,
        calibration_tokens=extent.tokens,
        device_memory=_largest(device for device, _ in stages),
        cpu_memory={**loaded, **_largest(host for _, host in stages)},
        cpu_only_memory={**loaded, **_largest({**device, **host} for device, host in stages)},
        mapped_weights=parameters * element if weights_mapped else 0,
        disk=_disk(parameters * element, weights * element, config, extent.tokens * shapes.d_model * element),
        forward_multiply_adds=forward,
        forward_passes=_forward_passes(
            shapes, config, (config.num_samples, sequence_length, len(blocks)), forward / len(blocks)
        ),
    )


def _largest(needs: Iterable[Parts]) -> Parts:
    return max(needs, key=lambda parts: sum(parts.values()))


def _batch_tokens(config: ModeGPTConfig, length: int) -> int:
    return min(config.num_samples, config.batch_size or max(1, TOKENS_AT_ONCE // length)) * length


def _disk(model: int, blocks: int, config: ModeGPTConfig, stream: int) -> Parts:
    """The checkpoint stays until the result is written; streams are replaced by later ones that are written first."""
    streams = (2 if config.method == "default" else 1) * stream
    result = int(model - config.sparsity * blocks)
    return {
        "finished blocks": int((1 - config.sparsity) * blocks),
        "residual streams": streams,
        "result, or the next streams": max(result, streams),
    }


def _check_reachable(model: PreTrainedModel, family: Family, modules: Any, config: ModeGPTConfig) -> None:
    layout, blocks = family.layout, []
    for index, module in enumerate(modules):
        head_dim = module.get_submodule(layout.attention).head_dim
        heads, kv_heads = (module.get_submodule(path).out_features // head_dim for path in (layout.query, layout.key))
        blocks.append(Block(module, family, index, heads, kv_heads, head_dim, True))
    check_reachable(config, part_sizes(Architecture(model, family, tuple(blocks)), config))


# ------------------------------------------------------------------------------------------------------------- memory


def _stages(shapes: Shapes, config: ModeGPTConfig, extent: Extent) -> list[tuple[Parts, Parts]]:
    """(on the device, on the host) at the moments that can be the peak."""
    if config.method == "default":
        host = _streams_on_host(shapes, config, extent)
        found = [(work, host) for work in _block_work(shapes, config, extent)]
        gain = {"residual streams": 3 * extent.tokens * shapes.d_model * extent.element}
        found.append((_final_gain(shapes, extent), gain))
    else:
        streams = {"residual streams": 3 * extent.tokens * shapes.d_model * extent.element}
        found = [(work, streams) for work in _block_work(shapes, replace(config, refit_iterations=0), extent)]
    if config.resolved_allocation == "sensitivity" and config.sparsity:
        found += _sensitivities(shapes, config, extent)
    return found


def _streams_on_host(shapes: Shapes, config: ModeGPTConfig, extent: Extent) -> Parts:
    """While gate and up are refitted: the streams that enter the model and the block, what the dense block makes of its
    own, the compressed one after the attention; heads' outputs; normalised inputs and targets in float32."""
    entering = 1 if shapes.blocks == 1 else 3
    stream = extent.tokens * extent.element
    sample = 2 * min(extent.tokens, REFIT_TOKENS) * shapes.d_model * FLOAT32 if config.refit_iterations else 0
    return {
        "residual streams": (entering + 3 + 1) * stream * shapes.d_model,
        "outputs of the heads": stream * shapes.heads,
        "sample for the refit of gate and up": sample,
    }


def _block_work(shapes: Shapes, config: ModeGPTConfig, extent: Extent) -> Iterator[Parts]:
    """One block: its moments, the elimination, the refit of gate and up, the curvature of its attention.

    The counts of matrices are those of the code at that moment, a Cholesky solve with two copies of its own.
    """
    d, mlp, inputs, element = shapes.d_model, shapes.mlp, shapes.mlp_inputs, extent.element
    blocks = {"block, dense and compressed": 2 * shapes.weights * element}
    seen = blocks if config.method == "default" else {"block, dense": shapes.weights * element}
    yield {
        **seen,
        "moments of the MLP": mlp**2 * (3 * FLOAT64 + FLOAT32) + 2 * mlp * d * FLOAT64,
        "one batch of tokens": extent.batch * (mlp * (element + FLOAT32) + 3 * d * FLOAT32),
    }
    yield {
        **blocks,
        "moments of the MLP, and their factorisation": 6 * mlp**2 * FLOAT64,
        "weights in float64": (inputs + 5) * mlp * d * FLOAT64,
    }
    groups, size = shapes.groups, shapes.heads // shapes.head_count
    yield {
        **blocks,
        "curvature of the attention": extent.length**2 * size
        + (groups + 2) * extent.length * size**2
        + 3 * extent.batch * extent.length * (shapes.head_count // groups),
        "one batch of tokens": 6 * extent.batch * shapes.heads * FLOAT32,
    }
    if config.refit_iterations and config.sparsity:
        left = _channels_halfway(mlp, config)
        refit = {**blocks, "weights in float64 and float32": left * d * (inputs + 1) * 12 + mlp * d * FLOAT64}
        yield {
            **refit,
            "moments of the MLP, and their inverses": (mlp**2 + (3 * inputs + 5) * left**2) * FLOAT64,
        }
        yield {
            **refit,
            "moments of the MLP": (mlp**2 + (3 + 4 * inputs) * left**2 // 2) * FLOAT64,
            "one window of tokens": 3 * inputs * extent.length * left * FLOAT32,
        }


def _channels_halfway(mlp: int, config: ModeGPTConfig) -> int:
    """Where half of the channels that go are gone; where the plan is not uniform, of a block that is cut little."""
    removed = config.sparsity if config.resolved_allocation == "uniform" else config.sparsity / 2
    return int(mlp * (1 - removed / 2))


def _final_gain(shapes: Shapes, extent: Extent) -> Parts:
    """The final norm: distributions over the vocabulary as targets, twice, and those of the model with products."""
    tokens = max(extent.windows, min(extent.tokens, GAIN_TOKENS, LOGITS // shapes.vocabulary))
    return {
        "normalised streams": 5 * tokens * shapes.d_model * FLOAT32,
        "head": 2 * shapes.vocabulary * shapes.d_model * FLOAT32,
        "next-token distributions": 7 * tokens * shapes.vocabulary * FLOAT32,
    }


def _sensitivities(shapes: Shapes, config: ModeGPTConfig, extent: Extent) -> Iterator[tuple[Parts, Parts]]:
    """Every variant of a block goes through the rest of the model; logits are taken a few rows at a time."""
    used, variant = sensitivity.budget(shapes.blocks, extent.windows), extent.length * shapes.d_model * extent.element
    copies = min(3, shapes.blocks)  # what left the block, and what enters and leaves a later one
    variants = copies * len(PARTS) * len(used.ratios) * used.divergence_windows * variant
    own = (5 * used.moment_windows + 3 * used.divergence_windows + extent.windows) * variant
    batch = min(extent.batch, sensitivity.LOGITS_AT_ONCE // shapes.vocabulary)
    host = {"residual streams": own, "streams of the variants": variants}
    logits = batch * shapes.vocabulary * (4 * FLOAT32 + extent.element)
    tail = {"head": shapes.vocabulary * shapes.d_model * extent.element}
    yield {**tail, "block": shapes.weights * extent.element, "next-token distributions": logits}, host
    measured = {"residual streams": own}
    for work in _block_work(shapes, replace(config, refit_iterations=0), extent):
        yield {**tail, **work, "variant": shapes.weights * extent.element}, measured


# --------------------------------------------------------------------------------------------------------------- work


def _forward_passes(
    shapes: Shapes, config: ModeGPTConfig, extent: tuple[int, int, int], block_forward: float
) -> dict[str, float]:
    """`extent` is (windows, length, blocks), `block_forward` the multiply-adds of one block over all tokens."""
    windows, length, blocks = extent
    tokens = windows * length
    default = config.method == "default"
    work = {
        "residual streams": 2.0 if default else 1.0,
        "moments": tokens * shapes.moments / block_forward,
        "factorisations": 3 * (shapes.mlp**3 + shapes.heads**3) / block_forward,
    }
    if config.resolved_allocation == "sensitivity":
        used = sensitivity.budget(blocks, windows)
        variants = 3 * len(used.ratios) * (blocks + 1) / 2
        work["sensitivities"] = (used.moment_windows + variants * used.divergence_windows) / windows
    if default:
        products = 6 * (1 + FINAL_ROUNDS) * config.refit_iterations * min(tokens, REFIT_TOKENS)
        work["gate and up refit"] = products * shapes.d_model * shapes.mlp / block_forward
    return work


def _shapes(block: nn.Module, layout: Any) -> Shapes:
    def linear(path: str) -> nn.Linear:
        return block.get_submodule(path)  # pyright: ignore[reportReturnType]

    cut = (layout.query, layout.key, layout.value, layout.output, *layout.mlp_inputs, layout.mlp_output)
    down, output = linear(layout.mlp_output), linear(layout.output)
    head_dim: Any = block.get_submodule(layout.attention).head_dim
    return Shapes(
        d_model=down.out_features,
        heads=output.in_features,
        head_count=output.in_features // head_dim,
        groups=linear(layout.key).out_features // head_dim,
        mlp=down.in_features,
        mlp_inputs=len(layout.mlp_inputs),
        weights=sum(linear(path).weight.numel() for path in cut),
    )


def on_meta(model_class: Any, config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a configuration with shapes and no weights; `model_class` is an Auto class, `dtype` replaces its."""
    with torch.device("meta"):
        return model_class.from_config(config, dtype=dtype or config.dtype or torch.get_default_dtype())
