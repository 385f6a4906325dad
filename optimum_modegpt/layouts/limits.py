"""The parts that a layout keeps at full width, and the reasons."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from optimum_modegpt.architectures import Architecture, Block
from optimum_modegpt.architectures.positions import canonical_order
from optimum_modegpt.errors import UnsupportedModel
from optimum_modegpt.layouts.rotary_table import narrow_rope_parameters, refusal_of_tables
from optimum_modegpt.modeling.modegpt_config import head_dim, with_text_values
from optimum_modegpt.modeling.modegpt_family import HEAD_PARTS, Part

WideParts = Sequence[Mapping[Part, str]]
"""The parts of every block that stay at full width, each with the reason."""


def wide_parts(architecture: Architecture, layout: str) -> WideParts:
    """Return the parts of every block that stay at full width in a layout, each with the reason.

    For the layout "stock", it builds the model of the stock class on the meta device, so ask once.

    Raises:
        UnsupportedModel: the layout is "stock", and no stock class holds narrow MLPs of this model.
    """
    reasons: dict[Part, str] = {}
    if layout == "mlp":
        reasons = dict.fromkeys(HEAD_PARTS, "the layout mlp cuts MLPs only")
    elif layout == "stock":
        check_stock(architecture)
        reason = refusal_of_narrow_heads(architecture)
        if reason is not None:
            reasons = dict.fromkeys(HEAD_PARTS, f"{reason}, so layout stock keeps its heads")
        reasons["shared"] = "the layout stock keeps shared experts"
    return [
        _present(reasons, block) | own for block, own in zip(architecture.blocks, architecture.dense_parts, strict=True)
    ]


def _present(reasons: Mapping[Part, str], block: Block) -> dict[Part, str]:
    return {part: reason for part, reason in reasons.items() if part in block.parts}


def check_stock(architecture: Architecture) -> None:
    """Check that the stock class of a model can have MLPs of a smaller width.

    Raises:
        UnsupportedModel: the width of its MLPs is not in the configuration, or is also that of other modules.
    """
    name, advice = type(architecture.model).__name__, "use layout='per_layer' or layout='mlp'."
    family, config = architecture.family, architecture.model.config.get_text_config()
    widths = {family.width_name(config, block.index): block.mlp_width // 2 for block in architecture.blocks}
    narrow = _empty(architecture, widths)
    for block, path in zip(architecture.blocks, architecture.block_paths, strict=True):
        narrowed = narrow.get_submodule(path).state_dict()
        changed = [key for key, tensor in block.module.state_dict().items() if tensor.shape != narrowed[key].shape]
        if not changed:
            raise UnsupportedModel(
                f"layout='stock' is not supported for {name}, which derives the width of its MLPs from other sizes; "
                f"{advice}"
            )
        if others := [key for key in changed if not key.startswith(_mlp_paths(block))]:
            raise UnsupportedModel(
                f"layout='stock' is not supported for {name}, in which {others[0]} has the width of the experts, and "
                f"is not cut; {advice}"
            )


def _mlp_paths(block: Block) -> tuple[str, ...]:
    """Return the paths of the modules of a dense block that are narrowed with its MLP."""
    experts = block.family.mlp.experts
    if block.experts is not None and experts is not None:
        return (f"{experts.packed}.",)
    return tuple(f"{each.dense_path}." for each in block.family.projections if each.part == "mlp")


def refusal_of_narrow_heads(architecture: Architecture) -> str | None:
    """Return the reason why the stock class cannot have heads of a smaller width, or None if it can."""
    family, blocks = architecture.family, architecture.blocks
    config: Any = architecture.model.config.get_text_config()
    name = type(architecture.model).__name__
    if any(not block.attends or block.uncut for block in blocks) or family.layer_sizes:
        return f"{name} has blocks whose heads cannot be cut alike"
    if not any(block.rotary for block in blocks):
        return f"{name} derives the width of a head from other sizes"
    if family.stock is not None and getattr(config, "sliding_window", None) is not None:
        return f"{name} has a sliding window, which a {family.stock.model_type} model has not"
    if family.attention.positions.query_factor:
        return f"{name} computes a factor of the queries from its rotary parameters"
    if any(canonical_order(block.attention, family) is not None for block in blocks if block.rotary):
        return f"{name} rotates adjacent coordinates, or a part of a head"
    if (reason := refusal_of_tables(architecture.text_model(architecture.model), config)) is not None:
        return reason
    return None if _takes_head_dim(architecture) else f"{name} derives the width of a head from other sizes"


def _takes_head_dim(architecture: Architecture) -> bool:
    """Return whether the heads of the stock class have the width `head_dim` of the configuration."""
    if architecture.family.stock is not None:
        return True
    block, config = architecture.blocks[0], architecture.model.config.get_text_config()
    if isinstance(getattr(type(config), "head_dim", None), property):
        return False
    width = head_dim(config) // 2
    rope = {"rope_parameters": narrow_rope_parameters(config, [1.0] * (width // 2))}
    try:
        with _without_warnings():
            narrow = _empty(architecture, {"head_dim": width} | rope)
    except (StrictDataclassError, RuntimeError):  # the class derives the number of rotary factors from other sizes
        return False
    module: Any = narrow.get_submodule(architecture.block_paths[0])
    attention = module.get_submodule(block.family.attention.module)
    share = width / head_dim(config)
    norms = zip(block.dense_head_norms, _head_norms(module, block), strict=True)
    # Some classes give a norm over all heads the width of the residual stream.
    if any(_size(own) != share * _size(dense) for dense, own in norms):
        return False
    return getattr(attention, block.family.attention.head_dim) == width


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence the warnings of transformers about rotary parameters, which are only tried here."""
    source = logging.getLogger("transformers.modeling_rope_utils")
    before, source.disabled = source.disabled, True
    try:
        yield
    finally:
        source.disabled = before


def _head_norms(module: nn.Module, block: Block) -> list[nn.Module]:
    norms = block.head_norms
    return [] if norms is None else [module.get_submodule(path) for path in (norms.query, norms.key)]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _empty(architecture: Architecture, values: Mapping[str, Any]) -> PreTrainedModel:
    """Return a model of the stock class on the meta device, with some values of its configuration replaced."""
    config = with_text_values(architecture.model.config, values)
    with torch.device("meta"):
        return architecture.classes.stock_causal_lm(config)
