"""What PEFT shall know of the compressed families: an adapter's default targets are those of the dense family."""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

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


class _AwaitTargets(MetaPathFinder):
    """A finder that finds the one module as everybody would, and waits until its import has succeeded."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != TARGETS or self._asking:
            return None
        self._asking = True
        try:
            spec = find_spec(name)
        finally:
            self._asking = False
        if spec and spec.loader:
            spec.loader = _Entering(spec.loader, self)
        return spec


class _Entering(Loader):
    """A loader that enters our families once the module has run; then nobody waits any longer."""

    def __init__(self, loader: Loader, finder: _AwaitTargets) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _enter(module)
        if self._finder in sys.meta_path:  # no longer there when the module is loaded again
            sys.meta_path.remove(self._finder)
