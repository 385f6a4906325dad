"""The entry point `sglang.srt.plugins`: SGLang calls `register` in every process that reads a configuration.

The import of this package, which precedes the call, registers the configurations and models of all families with the
Auto classes. SGLang then builds the model by its Transformers backend, so it needs no class of its own.
"""

from __future__ import annotations

from optimum_modegpt.integration.registration import register as register_families


def register() -> None:
    """Register the compressed families with transformers; calling it again changes nothing."""
    register_families()
