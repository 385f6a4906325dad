"""The record of a compression in the configuration of its result, which may be of a compressed class or a stock one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optimum_modegpt.modeling.modegpt_config import head_dim
from optimum_modegpt.modeling.modegpt_family import Family, is_compressed

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


def is_narrow_stock(config: Any) -> bool:
    """Return whether a configuration is that of a stock result with narrow parts, not only with fewer experts."""
    recipe = config.modegpt.get("recipe") if is_stock_result(config) else None
    return isinstance(recipe, Mapping) and recipe.get("layout") == "stock" and bool(recipe.get("sparsity"))


def stock_record(record: dict[str, Any], config: Any, family: Family, mlp_widths: list[int]) -> dict[str, Any]:
    """Return the record of a result of a stock class.

    Args:
        record: the record of the compression.
        config: the configuration of the dense model.
        family: its family.
        mlp_widths: the width of the MLP of every block of the dense model.
    """
    widths = {family.width_name(config, index): width for index, width in enumerate(mlp_widths)}
    if any("qk" in family.parts(config, index) for index in range(len(mlp_widths))):
        widths["head_dim"] = head_dim(config)
    return record | {DENSE_WIDTHS: widths}
