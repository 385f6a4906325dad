"""The compression methods by name."""

from __future__ import annotations

from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.methods.method import Method
from optimum_modegpt.methods.published import Published
from optimum_modegpt.methods.residual_matched import ResidualMatched

METHODS = {"default": ResidualMatched, "paper": Published}


def method_of(config: ModeGPTConfig) -> Method:
    """Return the method that a configuration names."""
    return METHODS[config.method](config)
