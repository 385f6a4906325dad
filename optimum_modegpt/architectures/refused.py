"""The model types that cannot be compressed, with the reason."""

from __future__ import annotations

_REASONS = {
    "has latent attention (MLA), whose queries and keys are not pairs of matrices": (
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "deepseek_v4",
        "glm4_moe_lite",
        "kimi_linear",
        "longcat_flash",
        "minicpm3",
        "mistral4",
        "youtu",
    ),
    "has layers with a recurrent state instead of attention": (
        "bamba",
        "falcon_h1",
        "falcon_mamba",
        "granitemoehybrid",
        "jamba",
        "mamba",
        "mamba2",
        "minimax",
        "nemotron_h",
        "recurrent_gemma",
        "rwkv",
        "xlstm",
        "zamba",
        "zamba2",
    ),
    "has several residual streams, and MLPs that keep the largest channels of each token": ("gemma3n", "gemma3n_text"),
    "normalises queries and keys after the rotation, without weights, and chunks its attention": (
        "llama4",
        "llama4_text",
    ),
    "normalises the channels that would be removed": ("bitnet",),
    "computes its attention as a difference of two": ("diffllama",),
    "mixes experts in its attention": ("jetmoe",),
    "has an attention mask that it computes from the values": ("doge",),
}
REFUSED = {model_type: reason for reason, model_types in _REASONS.items() for model_type in model_types}
"""Why each type is refused. The text follows "model_type 'x' "."""
