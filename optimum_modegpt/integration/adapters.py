"""What PEFT shall know of the compressed families: an adapter's default targets are those of the dense family."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

from optimum_modegpt.architectures import FAMILIES

TARGETS = "peft.utils.constants"
"""Where PEFT keeps the default target modules of each of its methods, by model type."""


def register_targets() -> None:
    """Enters the compressed families in PEFT's tables: now, or when PEFT is imported; nothing where it never is.

    PEFT has no door for this, may not be installed, and takes seconds to import: too long for those who need it not.
    """
    if loaded := sys.modules.get(TARGETS):
        _enter(loaded)
    elif not any(isinstance(finder, _AwaitTargets) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AwaitTargets())


def _enter(module: ModuleType) -> None:
    """Every table that has a dense family (LoRA, IA3, VeRA, …) gets the compressed one beside it."""
    tables = [value for value in vars(module).values() if isinstance(value, dict)]
    for dense, family in FAMILIES.items():
        for table in tables:
            if dense in table:
                table.setdefault(family.config.model_type, table[dense])


class _AwaitTargets:
    """A finder that finds the one module as everybody would, and enters our families once it has run."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != TARGETS:
            return None
        sys.meta_path.remove(self)  # pyright: ignore[reportArgumentType]
        spec = find_spec(name)
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def execute_and_enter(module: ModuleType) -> None:
                execute(module)
                _enter(module)

            spec.loader.exec_module = execute_and_enter
        return spec
