"""The keyword `compression_config` of every `from_pretrained`."""

from __future__ import annotations

import functools
from typing import Any

KEYWORDS = {"compression_config", "quantization_config"}


def install_keyword(model_class: Any) -> None:
    """Add the keyword to `from_pretrained` of `PreTrainedModel`; calling it again changes nothing.

    transformers has no other way to add a keyword. The Auto classes and `pipeline` pass it on to this method.
    """
    inner = model_class.from_pretrained.__func__
    if hasattr(inner, "accepts_compression_config"):
        return

    @functools.wraps(inner)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if not KEYWORDS & kwargs.keys():
            return inner(cls, pretrained_model_name_or_path, *args, **kwargs)
        # Imported here because transformers imports this module during its own import.
        from optimum_modegpt.integration.auto import with_quantization_config
        from optimum_modegpt.loading.source import Source, loading

        arguments = with_quantization_config(kwargs)
        with loading(Source.of_arguments(pretrained_model_name_or_path, kwargs)):
            return inner(cls, pretrained_model_name_or_path, *args, **arguments)

    from_pretrained.accepts_compression_config = True  # pyright: ignore[reportAttributeAccessIssue]
    model_class.from_pretrained = classmethod(from_pretrained)
