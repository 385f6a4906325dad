"""The record of a compression in the configuration of its result, which may be of a compressed class or a stock one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optimum_modegpt.modeling.modegpt_config import head_dim, mlp_width
from optimum_modegpt.modeling.modegpt_family import Family, Part, is_compressed

DENSE_WIDTHS = "dense_widths"
"""Key of the record of a stock result: the widths of the dense model, by their names in the configuration."""


def is_result(config: Any) -> bool:
    """Return whether a configuration, or its values, is that of a result of this package."""
    values = config if isinstance(config, Mapping) else vars(config)
    return is_compressed(values.get("model_type", getattr(config, "model_type", None))) or is_stock_result(config)


def is_stock_result(config: Any) -> bool:
    """Return whether a configuration, or its values, is that of a result which is a model of a stock class."""
    values = config if isinstance(config, Mapping) else vars(config)
    record = values.get("modegpt")
    return isinstance(record, Mapping) and isinstance(record.get(DENSE_WIDTHS), Mapping)


def stock_widths(config: Any, family: Family) -> Iterator[tuple[dict[Part, int], dict[Part, Any]]]:
    """Yield the widths of the parts of every block of a stock result, and those in its record of the dense model."""
    text, dense = config.get_text_config(), config.modegpt[DENSE_WIDTHS]
    for index in range(text.num_hidden_layers):
        heads = head_dim(text.per_layer_config[index])
        full = heads if family.layer_sizes else dense.get("head_dim")
        shared = family.shared_width(text, index)  # no stock result has a narrow one
        kept: dict[Part, int] = {"mlp": mlp_width(text, family, index), "qk": heads, "vo": heads, "shared": shared}
        before = {"mlp": dense.get(family.width_name(text, index)), "qk": full, "vo": full, "shared": shared}
        parts = family.parts(text, index)
        yield {part: kept[part] for part in parts}, {part: before[part] for part in parts}


def stock_record(record: dict[str, Any], config: Any, family: Family, mlp_widths: list[int]) -> dict[str, Any]:
    """Return the record of a result of a stock class.

    Args:
        record: the record of the compression.
        config: the configuration of the dense model.
        family: its family.
        mlp_widths: the width of the MLP of every block of the dense model.
    """
    widths = {family.width_name(config, index): width for index, width in enumerate(mlp_widths)}
    if not family.layer_sizes:  # such heads are not cut
        widths["head_dim"] = head_dim(config)
    return record | {DENSE_WIDTHS: widths}
