"""Inspect the weights of a saved model from its configuration and the shapes of its tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from optimum_modegpt.errors import EvaluationError
from optimum_modegpt.layouts.records import is_result, is_stock_result, stock_widths
from optimum_modegpt.modeling.modegpt_family import Family, Part
from optimum_modegpt.report import uncut_sentences


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
    """Kept and dense width of each part that a block has."""

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
    uncut: tuple[str, ...] = ()
    """Sentences that name the parts that cannot be cut in this model, with the reason."""

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
    dtype = sizes.most_common(1)[0][0] if sizes else None
    found = Inspection(config.model_type, sizes.total(), dtype)
    if not is_result(config):
        return found
    blocks = block_ranks(config)
    if is_stock_result(config):
        achieved = config.modegpt.get("achieved")
        sparsity = achieved.get("sparsity") if isinstance(achieved, Mapping) else None
        if not isinstance(sparsity, int | float):
            raise EvaluationError("the configuration was edited: its record has no achieved sparsity.")
        return replace(found, blocks=blocks, sparsity=sparsity, record=config.modegpt)
    weights = _weights_of_blocks(config, tensors)
    if not getattr(config, "quantization_config", None):  # packed weights have other shapes
        _check_shapes(config, blocks, weights)
    uncut = uncut_sentences([config.family.dense_parts(config.get_text_config(), block.index) for block in blocks])
    sparsity = _sparsity(config, blocks, weights)
    return replace(found, blocks=blocks, sparsity=sparsity, record=config.modegpt, uncut=uncut)


def block_ranks(config: Any) -> tuple[BlockRanks, ...]:
    """Return kept and dense widths of every block of a compressed model from its configuration.

    Raise `EvaluationError` if the configuration was edited and cannot be read.
    """
    if is_stock_result(config):
        return _stock_ranks(config)
    try:
        widths_of_blocks = config.widths()
    except (ValueError, TypeError, AttributeError) as error:
        raise EvaluationError(f"the configuration cannot be read: {error}") from error
    blocks = []
    for index, widths in enumerate(widths_of_blocks):
        head_dim, mlp = config.dense_head_dim, config.dense_mlp_width(index)
        dense = {"mlp": mlp, "qk": head_dim, "vo": head_dim, "shared": config.dense_shared_width(index)}
        parts = config.family.parts(config.get_text_config(), index)
        ranks = {part: getattr(widths, part) for part in parts}
        blocks.append(BlockRanks(index, ranks, {part: dense[part] for part in parts}))
    return tuple(blocks)


def _stock_ranks(config: Any) -> tuple[BlockRanks, ...]:
    """Return kept and dense widths of every block of a stock model, the dense ones from its record."""
    from optimum_modegpt.architectures.families import family_of  # slow: imports the code of models

    if (classes := family_of(config.model_type)) is None:
        raise EvaluationError(f"the configuration was edited: model_type {config.model_type!r} is no known family.")
    blocks = []
    for index, (kept, dense) in enumerate(stock_widths(config, classes.family)):
        if not all(isinstance(dense[part], int) and dense[part] >= kept[part] for part in kept):
            raise EvaluationError(f"the configuration was edited: block {index} has the widths {kept} of {dense}.")
        blocks.append(BlockRanks(index, {**kept}, {**dense}))
    return tuple(blocks)


def _weights_of_blocks(config: Any, tensors: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """Return the tensors of the blocks by their name below the list of blocks, such as "0.mlp.up_proj.weight"."""
    weights = {}
    for name, tensor in tensors.items():
        _, found, inside = f".{name}".partition(f".{config.family.blocks}.")
        if found:
            weights[inside] = tensor
    return weights


def _check_shapes(config: Any, blocks: Sequence[BlockRanks], weights: Mapping[str, TensorHeader]) -> None:
    problems = []
    for block in blocks:
        problems += _wrong_shapes(config, block, weights)
    if any(name.startswith(f"{len(blocks)}.") for name in weights):
        problems.append(f"the weights have more blocks than {len(blocks)}, the number in the configuration")
    if problems:
        raise EvaluationError(
            "config.json and the weights do not match; the folder was edited or is incomplete. The first of "
            f"{len(problems)} differences in the blocks:\n  " + "\n  ".join(problems[:5])
        )


def _wrong_shapes(config: Any, block: BlockRanks, weights: Mapping[str, TensorHeader]) -> Iterator[str]:
    """Yield a sentence for each narrowed weight of a block that is missing or has another shape."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    units = {"heads": heads, "kv_heads": getattr(text, "num_key_value_heads", None) or heads, "block": 1}
    for projection in config.family.projections_in(text, block.index):
        axis, size = projection.axis, units[projection.unit] * block.ranks[projection.part]
        name = f"{block.index}.{projection.path}.weight"
        if name not in weights:
            yield f"{name} is missing"
        elif len(weights[name].shape) != 2 or weights[name].shape[axis] != size:
            yield f"{name} is {weights[name].shape}, axis {axis} should be {size}"
    for name, size in _packed_sizes(text, config.family, block).items():
        if name not in weights:
            yield f"{name} is missing"
        elif weights[name].size != size:
            yield f"{name} is {weights[name].shape}, which should have {size} elements"


def _packed_sizes(config: Any, family: Family, block: BlockRanks) -> dict[str, int]:
    """Return the number of elements of the packed weights of a block's experts by name; empty without experts."""
    experts = family.mlp.experts
    if experts is None or not experts.in_layer(config, block.index):
        return {}
    start, one = f"{block.index}.{experts.packed}", config.hidden_size * block.ranks["mlp"]
    one *= getattr(config, experts.count)
    return {f"{start}.gate_up_proj": 2 * one, f"{start}.down_proj": one}


def _sparsity(config: Any, blocks: Sequence[BlockRanks], weights: Mapping[str, TensorHeader]) -> float:
    """Compute 1 − Σ now / Σ dense over the blocks' projections and experts, whose width is that of their part."""
    now = before = 0.0
    for block in blocks:
        for name, part in _narrowed_weights(config, block):
            if (weight := weights.get(name)) is not None:
                now += weight.size
                before += weight.size * block.dense_ranks[part] / block.ranks[part]
    return 1 - now / before if before else 0.0


def _narrowed_weights(config: Any, block: BlockRanks) -> Iterator[tuple[str, Part]]:
    """Yield the name of every weight of a block that compression narrows, and the part that it belongs to."""
    text = config.get_text_config()
    for projection in config.family.projections_in(text, block.index):
        yield f"{block.index}.{projection.path}.weight", projection.part
    for name in _packed_sizes(text, config.family, block):
        yield name, "mlp"
