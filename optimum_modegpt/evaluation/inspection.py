"""What a checkpoint is, from its configuration and the shapes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from optimum_modegpt.report import PARTS


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class BlockRanks:
    """Kept and dense width of each part of a block."""

    index: int
    ranks: dict[str, int]
    dense_ranks: dict[str, int]


@dataclass(frozen=True)
class Inspection:
    """A checkpoint, compressed or dense."""

    model_type: str
    parameters: int
    """As stored: tied ones once, no buffers."""
    blocks: tuple[BlockRanks, ...] = ()
    """Empty for a dense model."""
    sparsity: float = 0.0
    """Fraction of the weights of the blocks' projections that was removed."""
    record: dict[str, Any] | None = None
    """What the compression wrote into the configuration; None for a dense model."""

    def to_dict(self) -> dict[str, Any]:
        """All of it, safe for JSON."""
        return asdict(self)


def inspection(config: Any, tensors: Mapping[str, TensorHeader]) -> Inspection:
    """Ranks, parameters, sparsity and record of the checkpoint of `config`, whose tensors are `tensors`."""
    parameters = sum(tensor.size for tensor in tensors.values() if tensor.dtype.startswith(("F", "BF")))
    if not config.model_type.startswith("modegpt_"):
        return Inspection(config.model_type, parameters)
    dense = dict(zip(("qk", "vo", "mlp"), (*[config.dense_head_dim] * 2, _dense_mlp(config)), strict=True))
    blocks = tuple(
        BlockRanks(index, {part: getattr(widths, part) for part in PARTS}, {part: dense[part] for part in PARTS})
        for index, widths in enumerate(config.widths())
    )
    return Inspection(config.model_type, parameters, blocks, _sparsity(config, blocks, tensors), config.modegpt)


def _dense_mlp(config: Any) -> int:
    return getattr(config, config.layout.mlp_width)


def _sparsity(config: Any, blocks: tuple[BlockRanks, ...], tensors: Mapping[str, TensorHeader]) -> float:
    """1 − Σ now / Σ dense over the blocks' projections; each is as wide as its part is."""
    layout = config.layout
    paths = {
        "mlp": (*layout.mlp_inputs, layout.mlp_output),
        "qk": (layout.query, layout.key),
        "vo": (layout.value, layout.output),
    }
    now = before = 0.0
    for block in blocks:
        for part in PARTS:
            names = tuple(f"{layout.blocks}.{block.index}.{path}.weight" for path in paths[part])
            size = sum(tensor.size for name, tensor in tensors.items() if f".{name}".endswith(_dotted(names)))
            now += size
            before += size * block.dense_ranks[part] / block.ranks[part]
    return 1 - now / before if before else 0.0


def _dotted(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f".{name}" for name in names)
