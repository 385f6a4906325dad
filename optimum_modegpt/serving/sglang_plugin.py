"""The entry point `sglang.srt.plugins`: SGLang calls `register` in every process that reads a configuration.

The import of this package, which precedes the call, registers the configurations and models of all families with the
Auto classes. SGLang then builds the model by its Transformers backend, so it needs no class of its own.
"""

from __future__ import annotations


def register() -> None:
    """Do nothing: the import of this package has registered all that SGLang needs."""
