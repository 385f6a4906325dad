"""The families, one literal each, keyed by transformers' model_type."""

from __future__ import annotations

from optimum_modegpt.architectures.spec import Family
from optimum_modegpt.modeling import modegpt_llama, modegpt_mistral, modegpt_opt, modegpt_qwen2

FAMILIES: dict[str, Family] = {
    "llama": Family(
        config=modegpt_llama.ModeGPTLlamaConfig,
        models=modegpt_llama.MODELS,
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        activation="mlp.act_fn",
        final_norm="norm",
    ),
    "mistral": Family(
        config=modegpt_mistral.ModeGPTMistralConfig,
        models=modegpt_mistral.MODELS,
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        activation="mlp.act_fn",
        final_norm="norm",
    ),
    "qwen2": Family(
        config=modegpt_qwen2.ModeGPTQwen2Config,
        models=modegpt_qwen2.MODELS,
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        activation="mlp.act_fn",
        final_norm="norm",
    ),
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
