"""The families by transformers' model_type."""

from __future__ import annotations

from importlib import import_module

from optimum_modegpt.architectures.classes import FamilyClasses
from optimum_modegpt.modeling import DENSE_TYPES
from optimum_modegpt.modeling.modegpt_family import PREFIX

FAMILIES: dict[str, FamilyClasses] = {}

for _model_type in DENSE_TYPES:
    _module = import_module(f"optimum_modegpt.modeling.{PREFIX}{_model_type}")
    FAMILIES[_module.FAMILY.model_type] = FamilyClasses(_module.FAMILY, _module.MODELS)
