"""What compressing a model would take: a rough calculation from shapes, before any weight is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_modegpt.architectures import Architecture, Block, Family, check_model_type
from optimum_modegpt.compress import TOKENS_AT_ONCE, check_reachable, part_sizes
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.methods import sensitivity
from optimum_modegpt.methods.residual_matched import FINAL_ROUNDS, REFIT_TOKENS

FLOAT64 = 8
FLOAT32 = 4


@dataclass(frozen=True)
class Shapes:
    """Sizes of one block: residual width, joint width of the heads, MLP width, weights of the projections."""

    d_model: int
    heads: int
    mlp: int
    weights: int

    @property
    def moments(self) -> int:
        """Numbers in the second moments and cross moments of a block, with a factorisation of the largest."""
        return 3 * self.mlp**2 + self.mlp * self.d_model + 2 * self.heads**2 + self.heads * self.d_model


@dataclass(frozen=True)
class Estimate:
    """Bytes, and multiply-adds in units of one forward pass of the blocks over the calibration tokens."""

    parameters: int
    block_parameters: int
    calibration_tokens: int
    device_memory: dict[str, int]
    cpu_memory: dict[str, int]
    disk: int
    forward_multiply_adds: int
    forward_passes: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """All of it and the sums, safe for JSON."""
        sums = {"device_memory_total": sum(self.device_memory.values()), "cpu_memory_total": self.cpu_memory_total}
        return {**asdict(self), **sums, "forward_passes_total": sum(self.forward_passes.values())}

    @property
    def cpu_memory_total(self) -> int:
        """Bytes of host memory."""
        return sum(self.cpu_memory.values())


def estimate(model: PreTrainedModel, config: ModeGPTConfig, sequence_length: int) -> Estimate:
    """What `compress` would need for `model`, which may stand on the meta device.

    Raises:
        AlreadyCompressed, UnsupportedModel, InvalidConfig: as `compress` would.
    """
    family = check_model_type(model.config.model_type)
    layout = family.layout
    blocks: Any = model.base_model.get_submodule(layout.blocks)
    _check_reachable(model, family, blocks, config)
    shapes = max((_shapes(block, layout) for block in blocks), key=lambda shape: shape.weights)
    element = model.dtype.itemsize
    tokens = config.num_samples * sequence_length
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = sum(_shapes(block, layout).weights for block in blocks)
    forward = tokens * (weights + len(blocks) * shapes.heads * sequence_length)
    # Both streams and, of the block in work, the dense sums, the stream between its parts and the one after it.
    streams = (2 + 5) * tokens * shapes.d_model * element if config.method == "default" else 0
    sample = 2 * min(tokens, REFIT_TOKENS) * shapes.d_model * FLOAT32 if config.refit_iterations else 0
    return Estimate(
        parameters=parameters,
        block_parameters=weights,
        calibration_tokens=tokens,
        device_memory=_device_memory(shapes, config, sequence_length, element),
        cpu_memory={
            "weights, dense and compressed": 2 * parameters * element,
            "residual streams": streams or 2 * tokens * shapes.d_model * element,
            "sample for the refit of gate and up": sample if config.method == "default" else 0,
        },
        disk=int((parameters - config.sparsity * weights) * element),
        forward_multiply_adds=forward,
        forward_passes=_forward_passes(
            shapes, config, (config.num_samples, sequence_length, len(blocks)), forward / len(blocks)
        ),
    )


def _check_reachable(model: PreTrainedModel, family: Family, modules: Any, config: ModeGPTConfig) -> None:
    layout, blocks = family.layout, []
    for index, module in enumerate(modules):
        head_dim = module.get_submodule(layout.attention).head_dim
        heads, kv_heads = (module.get_submodule(path).out_features // head_dim for path in (layout.query, layout.key))
        blocks.append(Block(module, family, index, heads, kv_heads, head_dim, True))
    check_reachable(config, part_sizes(Architecture(model, family, tuple(blocks)), config))


def _device_memory(shapes: Shapes, config: ModeGPTConfig, sequence_length: int, element: int) -> dict[str, int]:
    tokens = config.num_samples * sequence_length
    windows = config.batch_size or max(1, TOKENS_AT_ONCE // sequence_length)
    chunk = min(tokens, windows * sequence_length)
    return {
        "largest block, dense and compressed": 2 * shapes.weights * element,
        "moments in float64": shapes.moments * FLOAT64,
        "one chunk of tokens": chunk * (4 * shapes.d_model + 2 * shapes.heads + 3 * shapes.mlp) * max(element, FLOAT32),
    }


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
    return Shapes(
        d_model=down.out_features,
        heads=output.in_features,
        mlp=down.in_features,
        weights=sum(linear(path).weight.numel() for path in cut),
    )


def on_meta(model_class: Any, config: Any) -> PreTrainedModel:
    """The model of a configuration with shapes and no weights; `model_class` is an Auto class."""
    with torch.device("meta"):
        return model_class.from_config(config, dtype=config.dtype or torch.get_default_dtype())
