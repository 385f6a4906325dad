"""The keyword `compression_config` of every `from_pretrained`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from optimum_modegpt.integration.job import running_job
from optimum_modegpt.recipe import Recipe


def install_keyword(model_class: Any) -> None:
    """Add the keyword to `from_pretrained` of `PreTrainedModel`; calling it again changes nothing.

    transformers has no other way to add a keyword. The Auto classes and `pipeline` pass it on to this method.
    """
    inner = model_class.from_pretrained.__func__
    if hasattr(inner, "accepts_compression_config"):
        return

    @functools.wraps(inner)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, *args: Any, compression_config: Any = None, **kwargs: Any
    ) -> Any:
        is_running = running_job() is not None and compression_config is None
        if is_running or (compression_config is None and not _is_ours(kwargs.get("quantization_config"))):
            return inner(cls, pretrained_model_name_or_path, *args, **kwargs)
        # Imported here because transformers imports this module during its own import.
        from optimum_modegpt.integration.auto import requested_job

        job = requested_job(pretrained_model_name_or_path, compression_config, kwargs)
        kwargs["quantization_config"] = job.config
        with job.running():
            return inner(cls, pretrained_model_name_or_path, *args, **kwargs)

    from_pretrained.accepts_compression_config = True  # pyright: ignore[reportAttributeAccessIssue]
    model_class.from_pretrained = classmethod(from_pretrained)


def _is_ours(quantization_config: Any) -> bool:
    if isinstance(quantization_config, Mapping):
        return quantization_config.get("quant_method") == Recipe.quant_method
    return isinstance(quantization_config, Recipe)
