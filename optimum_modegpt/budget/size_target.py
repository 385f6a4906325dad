"""Find the sparsity at which the compressed model has the requested size, from tensor shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_modegpt.allocation.plan import Plan, largest_sparsity
from optimum_modegpt.architectures import Architecture, check_dense, read_blocks
from optimum_modegpt.budget.experts import with_kept_experts
from optimum_modegpt.budget.sizes import part_sizes
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import InvalidConfig
from optimum_modegpt.layouts.limits import WideParts
from optimum_modegpt.modeling.modegpt_experts import experts_of
from optimum_modegpt.quantities import read_bytes, read_count, written_bytes, written_count

TOLERANCE = 0.01
"""A result whose size differs by more than this fraction of its target is a warning."""
SCALE_BYTES = 4
GROUP = 64
"""Weights that share a scale in int4."""


@dataclass(frozen=True)
class Size:
    """The size of a model: its parameters, the bytes of its weights, and the bytes after quantization."""

    parameters: int = 0
    bytes: int = 0
    quantized_bytes: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(
            self.parameters + other.parameters,
            self.bytes + other.bytes,
            self.quantized_bytes + other.quantized_bytes,
        )


@dataclass(frozen=True)
class Target:
    """A requested size of the result.

    Attributes:
        field: the field of the configuration.
        requested: its value.
        wanted: the number of bytes or of parameters.
        quantization: the later quantization that the size counts, or None.
    """

    field: str
    requested: int | str
    wanted: int
    quantization: str | None

    @classmethod
    def of(cls, config: ModeGPTConfig) -> Target | None:
        """Return the target of a configuration, or None if it has a sparsity."""
        if (requested := config.target_size) is not None:
            wanted = read_bytes("target_size", requested)
            return cls("target_size", requested, wanted, config.target_quantization)
        if (requested := config.target_parameters) is not None:
            return cls("target_parameters", requested, read_count("target_parameters", requested), None)
        return None

    def of_size(self, size: Size) -> int:
        """Return the bytes or the parameters of `size`, as this target counts them."""
        return size.parameters if self.field == "target_parameters" else size.quantized_bytes

    def written(self, size: Size) -> str:
        """Return the bytes or the parameters of `size` as text."""
        number = self.of_size(size)
        return written_count(number) if self.field == "target_parameters" else written_bytes(number)

    def is_missed(self, size: Size) -> bool:
        """Return whether `size` differs from this target by more than the tolerance."""
        return abs(self.of_size(size) - self.wanted) > TOLERANCE * self.wanted

    def record(self, size: Size) -> dict[str, Any]:
        """Return the target and the reached `size`, safe for JSON."""
        own = {"requested": self.requested, "wanted": self.wanted, "quantization": self.quantization}
        return {"field": self.field, **own, "reached": self.of_size(size)}

    def __str__(self) -> str:
        after = f" after quantization to {self.quantization}" if self.quantization else ""
        return f"{self.field}={self.requested}{after}"


def plan_size(architecture: Architecture, plan: Plan, quantization: str | None = None) -> Size:
    """Return the size of the model that keeps the widths of `plan`."""
    in_blocks = {id(tensor) for block in architecture.blocks for tensor in _stored(block.module)}
    total = Size()
    for tensor in _stored(architecture.model):
        if id(tensor) not in in_blocks:
            total += _size(tensor)
    for block, widths in zip(architecture.blocks, plan.widths, strict=True):
        module = block.narrow(widths)
        matrices = {id(each.weight) for each in module.modules() if isinstance(each, nn.Linear)}
        if (experts := experts_of(module, architecture.family)) is not None:
            matrices |= {id(experts.gate_up_proj), id(experts.down_proj)}
        for tensor in _stored(module):
            total += _size(tensor, quantization if id(tensor) in matrices else None)
    return total


def resolve_target(architecture: Architecture, config: ModeGPTConfig, wide: WideParts | None = None) -> ModeGPTConfig:
    """Return the configuration with the sparsity that reaches its target; itself if it has none.

    The blocks of `architecture` may be on the meta device. They have only the experts that are kept. `wide` is as in
    `part_sizes`.

    Raises:
        InvalidConfig: no allowed widths reach the target. The message names the sizes that they reach.
    """
    if (target := Target.of(config)) is None:
        return config
    sizes = part_sizes(architecture, config, wide)
    dense = plan_size(architecture, Plan.dense(sizes), target.quantization)
    floors = Plan.from_list({part: size.floor for part, size in block.items()} for block in sizes)
    smallest = plan_size(architecture, floors, target.quantization)
    low, high = target.of_size(smallest), target.of_size(dense)
    if not (1 - TOLERANCE) * low <= target.wanted <= (1 + TOLERANCE) * high:
        after = f" after quantization to {target.quantization}" if target.quantization else ""
        raise InvalidConfig(
            f"{target} cannot be reached: with max_sparsity={config.max_sparsity} and round_to={config.round_to!r} the "
            f"weights of the result take {_both(smallest)} to {_both(dense)}{after}."
        )
    share = 0.0 if high == low else min(max((high - target.wanted) / (high - low), 0.0), 1.0)
    return config.with_sparsity(min(share * largest_sparsity(sizes), config.max_sparsity))


def check_sizes(model: PreTrainedModel, config: ModeGPTConfig) -> None:
    """Check a target, and the experts to remove, for a model of a known family that may be on the meta device.

    Raises:
        InvalidConfig: they are impossible.
    """
    if config.expert_sparsity or Target.of(config) is not None:
        architecture = read_blocks(model, check_dense(model.config))
        resolve_target(with_kept_experts(architecture, config), config)


def _both(size: Size) -> str:
    return f"{written_bytes(size.quantized_bytes)} ({written_count(size.parameters)} parameters)"


def _stored(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that a checkpoint of this module contains, tied ones once."""
    yield from module.parameters()
    for each in module.modules():
        for name, buffer in each.named_buffers(recurse=False):
            if name not in each._non_persistent_buffers_set:
                yield buffer


def _size(tensor: Tensor, quantization: str | None = None) -> Size:
    count = tensor.numel()
    stored = quantized = count * tensor.element_size()
    if quantization == "int8":
        quantized = count + SCALE_BYTES * (count // tensor.shape[-1])
    elif quantization == "int4":
        quantized = -(-count // 2) + SCALE_BYTES * -(-count // GROUP)
    return Size(count if isinstance(tensor, nn.Parameter) else 0, stored, quantized)
