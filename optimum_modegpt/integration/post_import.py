"""Post-import hooks: call a function as soon as a module has been imported (the idea of PEP 369 and of `wrapt`)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]


def when_imported(name: str, action: Action) -> None:
    """Call `action` with the module `name`: now if the module is imported already, else right after its import.

    A module that is never imported costs nothing. If an import fails, the action runs after the next one. The action
    runs inside the import. It must not need modules that import `name`: they may be only partly initialised.
    """
    if module := sys.modules.get(name):
        action(module)
        return
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    _FINDER.actions[name] = action


class _Finder(MetaPathFinder):
    """A finder that finds the modules with an action through the other finders, and wraps their loaders."""

    def __init__(self) -> None:
        self.actions: dict[str, Action] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in self.actions:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """A loader that loads a module with its original loader, then calls its action."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if action := _FINDER.actions.pop(module.__name__, None):
            action(module)


_FINDER = _Finder()
