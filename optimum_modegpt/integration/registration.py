"""The registrations of `import optimum_modegpt`; each runs as soon as the module that it changes is imported.

torch and transformers take seconds to import, so this module imports neither. The registrations run while transformers
is being imported, so they import only modules that are complete by then.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from optimum_modegpt.integration.post_import import when_imported
from optimum_modegpt.modeling import DENSE_TYPES
from optimum_modegpt.modeling.modegpt_family import PREFIX

NO_PATCH = "OPTIMUM_MODEGPT_NO_PATCH"
"""The environment variable that, set to 1 before the import, leaves `PreTrainedModel.from_pretrained` unpatched."""
TARGETS = "peft.utils.constants"
"""The module with PEFT's tables of default target modules, by model type; PEFT has no function to extend them."""


def register() -> None:
    """Register with transformers and PEFT; calling it again changes nothing."""
    when_imported("transformers.models.auto.configuration_auto", _register_families)
    when_imported("transformers.quantizers.auto", _register_quantizer)
    if os.environ.get(NO_PATCH, "0") in ("", "0"):
        when_imported("transformers.modeling_utils", _install_keyword)
    when_imported(TARGETS, _register_targets)
    when_imported("optimum_modegpt.modeling.modegpt_common", _install_companion)


def _register_families(auto: ModuleType) -> None:
    """Register every compressed family with `AutoConfig`; the family's module registers its classes on import."""
    for model_type in (PREFIX + dense for dense in DENSE_TYPES):
        if model_type not in auto.CONFIG_MAPPING:
            auto.AutoConfig.register(model_type, _deferred_configuration(model_type, auto.CONFIG_MAPPING))


def _deferred_configuration(compressed: str, mapping: Mapping[str, Any]) -> type:
    """Return a configuration class that imports the family's module, with its model classes, when it is first used.

    It creates only objects of the family's own class, which then has replaced it in `AutoConfig`.
    """
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
    if method not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(method)(ModeGPTConfig)
    if method not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(method)(ModeGPTHfQuantizer)


def _install_keyword(modeling: ModuleType) -> None:
    """Add the keyword `compression_config` to `from_pretrained`."""
    from optimum_modegpt.integration.keyword import install_keyword

    install_keyword(modeling.PreTrainedModel)


def _register_targets(constants: ModuleType) -> None:
    """Give the compressed families the default target modules of the dense ones, in every method of PEFT."""
    for table in [value for value in vars(constants).values() if isinstance(value, dict)]:
        for dense in DENSE_TYPES:
            if dense in table:
                table.setdefault(PREFIX + dense, table[dense])


def _install_companion(common: ModuleType) -> None:
    """Let compressed models save a report and a model card; without the package, their remote code cannot."""
    from optimum_modegpt.hub.upload import Companion

    common.ModeGPTModelMixin.companion = Companion
