"""The entry point `vllm.general_plugins`: vLLM calls `register` in every process.

The import of this package, which precedes the call, registers the configurations and models of all families with the
Auto classes. This module is imported by every vLLM process, so it does not import the model class.
"""

from __future__ import annotations

MODEL_CLASS = "optimum_modegpt.serving.vllm_model:ModeGPTForCausalLM"
"""The class that serves every architecture, as vLLM's registry spells it."""

ARCHITECTURES = (
    "ModeGPTGemma3ForCausalLM",
    "ModeGPTGraniteForCausalLM",
    "ModeGPTLlamaForCausalLM",
    "ModeGPTMistralForCausalLM",
    "ModeGPTPhi3ForCausalLM",
    "ModeGPTQwen2ForCausalLM",
    "ModeGPTQwen3ForCausalLM",
)
"""The architectures that generated the same tokens in vLLM as in transformers."""


def register() -> None:
    """Register the architectures with vLLM; calling it again changes nothing."""
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]

    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, MODEL_CLASS)
