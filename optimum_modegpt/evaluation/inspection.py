"""Inspect the weights of a saved model from its configuration and the shapes of its tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from optimum_modegpt.errors import EvaluationError
from optimum_modegpt.modeling.modegpt_family import is_compressed
from optimum_modegpt.report import PARTS


@dataclass(frozen=True)
class TensorHeader:
    """Dtype and shape of one tensor in a safetensors header."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class BlockRanks:
    """Kept and dense width of each part of a block."""

    index: int
    ranks: dict[str, int]
    dense_ranks: dict[str, int]


@dataclass(frozen=True)
class Inspection:
    """Summary of a saved model, compressed or dense."""

    model_type: str
    parameters: int
    """Number of stored parameters. Tied ones count once, and buffers do not count."""
    dtype: str | None = None
    """Dtype of most parameters, in safetensors' notation such as F32 or BF16. None if there are no parameters."""
    blocks: tuple[BlockRanks, ...] = ()
    """Empty for a dense model."""
    sparsity: float = 0.0
    """Fraction of the weights of the blocks' projections that was removed."""
    record: dict[str, Any] | None = None
    """Record of the compression in the configuration. None for a dense model."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, safe for JSON."""
        return asdict(self)


def inspection(config: Any, tensors: Mapping[str, TensorHeader]) -> Inspection:
    """Return ranks, parameters, sparsity and record of a saved model with this configuration and these tensors.

    Raises:
        EvaluationError: the configuration was edited: it cannot be read, or its widths differ from the tensors' widths.
    """
    sizes = Counter[str]()
    for tensor in tensors.values():
        if tensor.dtype.startswith(("F", "BF")):
            sizes[tensor.dtype] += tensor.size
    stored = config.model_type, sizes.total(), max(sizes, key=sizes.__getitem__, default=None)
    if not is_compressed(config.model_type):
        return Inspection(*stored)
    blocks = block_ranks(config)
    if not getattr(config, "quantization_config", None):  # packed weights have other shapes
        _check_shapes(config, config.widths(), tensors)
    return Inspection(*stored, blocks, _sparsity(config, blocks, tensors), config.modegpt)


def block_ranks(config: Any) -> tuple[BlockRanks, ...]:
    """Return kept and dense widths of every block of a compressed model from its configuration.

    Raises:
        EvaluationError: the configuration was edited and cannot be read.
    """
    try:
        widths_of_blocks = config.widths()
    except (ValueError, TypeError, AttributeError) as error:
        raise EvaluationError(f"the configuration cannot be read: {error}") from error
    dense = {"mlp": config.dense_mlp_width, "qk": config.dense_head_dim, "vo": config.dense_head_dim}
    return tuple(
        BlockRanks(index, {part: getattr(widths, part) for part in PARTS}, dense)
        for index, widths in enumerate(widths_of_blocks)
    )


def _check_shapes(config: Any, widths_of_blocks: list[Any], tensors: Mapping[str, TensorHeader]) -> None:
    family, heads = config.family, config.num_attention_heads
    units = {"heads": heads, "kv_heads": getattr(config, "num_key_value_heads", None) or heads, "block": 1}
    problems = []
    for index, widths in enumerate(widths_of_blocks):
        for projection in family.projections:
            axis, size = projection.axis, units[projection.unit] * getattr(widths, projection.part)
            name = f"{family.blocks}.{index}.{projection.path}.weight"
            found = next((tensors[key].shape for key in tensors if f".{key}".endswith(f".{name}")), None)
            if found is None or len(found) != 2 or found[axis] != size:
                problems.append(f"{name} is {'missing' if found is None else found}, axis {axis} should be {size}")
    if any(f".{family.blocks}.{len(widths_of_blocks)}." in f".{key}" for key in tensors):
        problems.append(f"the weights have more blocks than {len(widths_of_blocks)}, the number in the configuration")
    if problems:
        more = f"\n  … and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise EvaluationError(
            "config.json and the weights do not match; the folder was edited or is incomplete:\n  "
            + "\n  ".join(problems[:5])
            + more
        )


def _sparsity(config: Any, blocks: tuple[BlockRanks, ...], tensors: Mapping[str, TensorHeader]) -> float:
    """Compute 1 − Σ now / Σ dense over the blocks' projections, whose width is that of their part."""
    family = config.family
    now = before = 0.0
    for block in blocks:
        for part in PARTS:
            names = tuple(
                f"{family.blocks}.{block.index}.{projection.path}.weight"
                for projection in family.projections
                if projection.part == part
            )
            size = sum(tensor.size for name, tensor in tensors.items() if f".{name}".endswith(_dotted(names)))
            now += size
            before += size * block.dense_ranks[part] / block.ranks[part]
    return 1 - now / before if before else 0.0


def _dotted(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f".{name}" for name in names)
