"""The registrations of `import optimum_modegpt`; each runs as soon as the module that it changes is imported.

torch and transformers take seconds to import, so this module imports neither. The registrations run while transformers
is being imported, so they import only modules that are complete by then.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from optimum_modegpt.modeling import DENSE_TYPES
from optimum_modegpt.modeling.modegpt_family import PREFIX

NO_PATCH = "OPTIMUM_MODEGPT_NO_PATCH"
"""The environment variable that, set to 1 before the import, leaves `PreTrainedModel.from_pretrained` unpatched."""

Action = Callable[[ModuleType], None]


def register() -> None:
    """Register with transformers; calling it again changes nothing."""
    when_imported("transformers.models.auto.configuration_auto", _register_families)
    when_imported("transformers.quantizers.auto", _register_quantizer)
    if os.environ.get(NO_PATCH, "0") in ("", "0"):
        when_imported("transformers.modeling_utils", _install_keyword)
    when_imported("optimum_modegpt.modeling.modegpt_common", _install_companion)


def when_imported(name: str, action: Action) -> None:
    """Call `action` with the module `name`: now if the module is imported already, else right after its import.

    If an import fails, the action runs after the next one. The action runs inside the import. It must not need modules
    that import `name`: they may be only partly initialised.
    """
    if module := sys.modules.get(name):
        action(module)
        return
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    _FINDER.actions[name] = action


class _Finder(MetaPathFinder):
    """A finder for the modules with an action; it asks the other finders, and adds the action to the found loader."""

    def __init__(self) -> None:
        self.actions: dict[str, Action] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in self.actions:
            return None
        action = self.actions.pop(name)  # the next line asks this finder too
        spec = importlib.util.find_spec(name)
        self.actions[name] = action
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self.actions.pop(name, None) is not None:
                action(module)

        spec.loader.exec_module = exec_module
        return spec


_FINDER = _Finder()


def _register_families(auto: ModuleType) -> None:
    """Register every compressed family with `AutoConfig`; the family's module registers its classes on import."""
    for dense in DENSE_TYPES:
        model_type = PREFIX + dense
        if model_type not in auto.CONFIG_MAPPING:
            auto.AutoConfig.register(model_type, _deferred_configuration(model_type, auto.CONFIG_MAPPING))


def _deferred_configuration(compressed: str, mapping: Mapping[str, Any]) -> type:
    """Return a configuration class that imports the family's own class, with its models, when it is first used."""
    from transformers import PreTrainedConfig

    def own_class() -> Any:
        import_module(f"optimum_modegpt.modeling.{compressed}")
        return mapping[compressed]

    class DeferredConfig(PreTrainedConfig):
        model_type = compressed

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return own_class()(*args, **kwargs)

        @classmethod
        def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
            return own_class().from_dict(*args, **kwargs)

    return DeferredConfig


def _register_quantizer(auto: ModuleType) -> None:
    """Register the quantizer "modegpt", which `from_pretrained` uses for a `ModeGPTConfig`."""
    from optimum_modegpt.config import ModeGPTConfig
    from optimum_modegpt.integration.hf_quantizer import ModeGPTHfQuantizer

    method = ModeGPTConfig.quant_method
    if method not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(method)(ModeGPTConfig)
        auto.register_quantizer(method)(ModeGPTHfQuantizer)


def _install_keyword(modeling: ModuleType) -> None:
    """Add the keyword `compression_config` to `from_pretrained`."""
    from optimum_modegpt.integration.keyword import install_keyword

    install_keyword(modeling.PreTrainedModel)


def _install_companion(common: ModuleType) -> None:
    """Let compressed models save a report and a model card; without the package, their remote code cannot."""
    from optimum_modegpt.hub.upload import Companion

    common.ModeGPTModelMixin.companion = Companion
