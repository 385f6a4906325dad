"""The families by transformers' model_type."""

from __future__ import annotations

from types import ModuleType

from optimum_modegpt.architectures.spec import Family
from optimum_modegpt.modeling import modegpt_llama, modegpt_mistral, modegpt_opt, modegpt_qwen2


def _llama_like(module: ModuleType, config: type) -> Family:
    return Family(
        config=config,
        models=module.MODELS,
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        activation="mlp.act_fn",
        final_norm="norm",
    )


FAMILIES: dict[str, Family] = {
    "llama": _llama_like(modegpt_llama, modegpt_llama.ModeGPTLlamaConfig),
    "mistral": _llama_like(modegpt_mistral, modegpt_mistral.ModeGPTMistralConfig),
    "qwen2": _llama_like(modegpt_qwen2, modegpt_qwen2.ModeGPTQwen2Config),
    "opt": Family(
        config=modegpt_opt.ModeGPTOPTConfig,
        models=modegpt_opt.MODELS,
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        activation="activation_fn",
        final_norm="decoder.final_layer_norm",
        projection="decoder.project_out",
        norm_first_flag="do_layer_norm_before",
    ),
}
