"""The families by transformers' model_type. Each is imported when it is first needed."""

from __future__ import annotations

from importlib import import_module

from optimum_modegpt.architectures.classes import FamilyClasses
from optimum_modegpt.modeling import DENSE_TYPES
from optimum_modegpt.modeling.modegpt_family import PREFIX

FAMILIES: dict[str, FamilyClasses] = {}
"""The families that are imported so far. `family_of` adds the others."""


def family_of(model_type: str) -> FamilyClasses | None:
    """Return the family of a dense model_type, or None if it is not supported.

    Raises:
        ImportError: the installed transformers lacks the family.
    """
    if model_type not in FAMILIES and model_type in DENSE_TYPES:
        module = import_module(f"optimum_modegpt.modeling.{PREFIX}{model_type}")
        FAMILIES[model_type] = FamilyClasses(module.FAMILY, module.MODELS)
    return FAMILIES.get(model_type)
