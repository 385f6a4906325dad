"""Configurations of tiny models of every family. The first one of a family represents it.

The core families cover the features of all others, and take part in every test. The others take part in
`test_every_family.py`, and in every test if the environment sets MODEGPT_TEST_FAMILIES=all.
"""

from __future__ import annotations

import os
from typing import Any

import transformers
from transformers import (
    ApertusConfig,
    ArceeConfig,
    BioGptConfig,
    BloomConfig,
    CodeGenConfig,
    Cohere2Config,
    CohereConfig,
    Dots1Config,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Exaone4Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    GlmConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    HeliumConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PhimoeConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SeedOssConfig,
    SmolLM3Config,
    SolarOpenConfig,
    StableLmConfig,
    Starcoder2Config,
)

from optimum_modegpt.architectures import check_model_type
from optimum_modegpt.modeling import DENSE_TYPES

VOCABULARY = 260
"""256 bytes, three special tokens and one token that the tokenizer never makes."""

CORE = ("gpt2", "gpt_neox", "llama", "opt", "phi3", "qwen2", "qwen3")
"""The families that take part in every test."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GATED = _COMMON | {"intermediate_size": 48}
_GROUPED = _GATED | {"num_key_value_heads": 2}
_MIXED_WINDOW = {"sliding_window": 6, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
_SCALED_TABLES = {  # one rotary table for each layer type, as in Gemma 3 from 4B and Olmo 3
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
_EXPERTS = _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_SPARSE = {key: value for key, value in _EXPERTS.items() if key != "intermediate_size"}
_ONLY_EXPERTS = _GROUPED | {
    "intermediate_size": 128,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
_GRANITE = _GATED | {
    "embedding_multiplier": 1.5,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
}
_MULTIPLIERS = {key: value for key, value in _GRANITE.items() if key not in _GATED}
_OPT = _COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
_HALF_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_LINEAR_LAYERS = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 8,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": _HALF_ROTARY,
}
_WINDOW_FIRST = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 4,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "llama_4_scaling_beta": 0.3,
}
_GPT2 = _COMMON | {"n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_BIOGPT = _GATED | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_MPT = _COMMON | {"max_seq_len": 64, "use_cache": True}

EVERY_VARIANT: dict[str, tuple[type, dict[str, Any]]] = {
    "llama-gqa-tied": (LlamaConfig, _GATED | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-mqa-biases": (LlamaConfig, _GATED | {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama-mha": (LlamaConfig, _GATED | {"num_key_value_heads": 4}),
    "mistral-window": (MistralConfig, _GATED | {"num_key_value_heads": 2, "sliding_window": 6}),
    "mistral-head-dim": (
        MistralConfig,
        _GATED | {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 12},
    ),
    "qwen2-mixed-window": (
        Qwen2Config,
        _GATED
        | {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "qwen2": (Qwen2Config, _GATED | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "opt": (OPTConfig, _OPT),
    "opt-post-ln": (OPTConfig, _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "opt-bare": (OPTConfig, _OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "qwen3": (Qwen3Config, _GATED | {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}),
    "qwen3-mixed-window-biases": (
        Qwen3Config,
        _GATED
        | {
            "num_key_value_heads": 1,
            "head_dim": 12,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "phi3": (Phi3Config, _GATED | {"num_key_value_heads": 2}),
    "phi3-partial-window-tied": (
        Phi3Config,
        _GATED
        | {
            "num_key_value_heads": 4,
            "sliding_window": 6,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "gpt_neox": (GPTNeoXConfig, _GATED),
    "gpt_neox-sequential-tied": (
        GPTNeoXConfig,
        _GATED | {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True},
    ),
    "gpt_neox-full-rotary": (
        GPTNeoXConfig,
        _GATED | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
    ),
    "granite": (GraniteConfig, _GRANITE | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "granite-mha-biases": (
        GraniteConfig,
        _GRANITE | {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    ),
    "gemma4_text": (
        Gemma4TextConfig,
        _GATED
        | {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "global_head_dim": 12,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "hidden_size_per_layer_input": 0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "qwen3_5_text": (Qwen3_5TextConfig, _GROUPED | _LINEAR_LAYERS | {"tie_word_embeddings": True}),
    "qwen3_5_moe_text": (Qwen3_5MoeTextConfig, _SPARSE | _LINEAR_LAYERS | {"shared_expert_intermediate_size": 40}),
    "qwen3_next": (
        Qwen3NextConfig,
        _SPARSE
        | _LINEAR_LAYERS
        | {
            "intermediate_size": 48,
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [0],
            "attention_bias": True,
        },
    ),
    "gpt2": (GPT2Config, _GPT2),
    "gpt2-scaled-untied": (
        GPT2Config,
        _GPT2 | {"n_inner": None, "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
    ),
    "gemma": (GemmaConfig, _GROUPED | {"head_dim": 12, "attention_bias": True}),
    "smollm3": (
        SmolLM3Config,
        _GROUPED
        | {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 6, "attention_bias": True},
    ),
    "cohere2": (Cohere2Config, _GROUPED | _WINDOW_FIRST | {"logit_scale": 0.25}),
    "cohere2-biases": (
        Cohere2Config,
        _GROUPED | _WINDOW_FIRST | {"logit_scale": 0.5, "attention_bias": True, "tie_word_embeddings": False},
    ),
    "glm": (GlmConfig, _GROUPED | {"head_dim": 8, "rope_parameters": _HALF_ROTARY}),
    "seed_oss": (SeedOssConfig, _GROUPED | {"head_dim": 12, "mlp_bias": True, "attention_out_bias": True}),
    "ernie4_5": (Ernie4_5Config, _GROUPED | {"head_dim": 8, "use_bias": True}),
    "starcoder2": (Starcoder2Config, _GROUPED | {"sliding_window": 6}),
    "nemotron": (
        NemotronConfig,
        _GROUPED | {"attention_bias": True, "mlp_bias": True, "rope_parameters": _HALF_ROTARY},
    ),
    "phi": (PhiConfig, _GROUPED | {"rope_parameters": _HALF_ROTARY}),
    "phi-norms": (PhiConfig, _GROUPED | {"rope_parameters": _HALF_ROTARY, "qk_layernorm": True}),
    "hunyuan_v1_dense": (HunYuanDenseV1Config, _GROUPED | {"head_dim": 8, "tie_word_embeddings": True}),
    "hunyuan_v1_dense-alpha-biases": (
        HunYuanDenseV1Config,
        _GROUPED
        | {
            "head_dim": 8,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 100.0, "factor": 1.0},
        },
    ),
    "ministral3": (Ministral3Config, _GROUPED | {"head_dim": 8, "sliding_window": 6, "rope_parameters": _YARN}),
    "ministral": (MinistralConfig, _GROUPED | _WINDOW_FIRST | {"head_dim": 8}),
    "apertus": (ApertusConfig, _GROUPED | {"attention_bias": True}),
    "cohere": (CohereConfig, _GROUPED | {"logit_scale": 0.25, "attention_bias": True}),
    "cohere-norms": (CohereConfig, _GROUPED | {"logit_scale": 0.25, "use_qk_norm": True}),
    "arcee": (ArceeConfig, _GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "helium": (HeliumConfig, _GROUPED | {"head_dim": 8, "attention_bias": True, "mlp_bias": True}),
    "olmo": (OlmoConfig, _GROUPED | {"attention_bias": True}),
    "olmo-clip": (OlmoConfig, _GROUPED | {"clip_qkv": 0.7}),
    "stablelm": (StableLmConfig, _GROUPED | {"use_qkv_bias": True, "rope_parameters": _HALF_ROTARY}),
    "stablelm-parallel-norms": (
        StableLmConfig,
        _GROUPED | {"use_parallel_residual": True, "qk_layernorm": True, "rope_parameters": _HALF_ROTARY},
    ),
    "gemma2": (
        Gemma2Config,
        _GROUPED
        | _MIXED_WINDOW
        | {"head_dim": 12, "query_pre_attn_scalar": 100, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    ),
    "gemma2-mqa-biases-uncapped": (
        Gemma2Config,
        _GATED
        | {
            "num_key_value_heads": 1,
            "head_dim": 8,
            "attention_bias": True,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3_text": (
        Gemma3TextConfig,
        _GROUPED | _MIXED_WINDOW | {"head_dim": 12, "query_pre_attn_scalar": 100, "rope_parameters": _SCALED_TABLES},
    ),
    "gemma3_text-mqa-capped": (
        Gemma3TextConfig,
        _GATED | {"num_key_value_heads": 1, "head_dim": 8, "attention_bias": True, "final_logit_softcapping": 5.0},
    ),
    "glm4": (Glm4Config, _GROUPED | {"head_dim": 8, "attention_bias": True}),
    "glm4-mha-tied": (
        Glm4Config,
        _GATED
        | {
            "num_key_value_heads": 4,
            "head_dim": 12,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
    ),
    "olmo2": (Olmo2Config, _GROUPED),
    "olmo2-mha-biases-tied": (
        Olmo2Config,
        _GATED | {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "olmo3": (Olmo3Config, _GROUPED | _MIXED_WINDOW | {"rope_parameters": _SCALED_TABLES}),
    "exaone4": (Exaone4Config, _GROUPED | _MIXED_WINDOW),
    "exaone4-without-window": (
        Exaone4Config,
        _GATED
        | {
            "num_key_value_heads": 4,
            "sliding_window": None,
            "layer_types": ["full_attention"] * 3,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": (MixtralConfig, _ONLY_EXPERTS | {"sliding_window": 6}),
    "qwen3_moe": (Qwen3MoeConfig, _EXPERTS | {"head_dim": 12, "norm_topk_prob": True, "tie_word_embeddings": True}),
    "qwen3_moe-dense-layers-biases": (
        Qwen3MoeConfig,
        _EXPERTS | {"head_dim": 8, "mlp_only_layers": [0], "decoder_sparse_step": 1, "attention_bias": True},
    ),
    "olmoe": (OlmoeConfig, _ONLY_EXPERTS | {"num_experts": 4, "norm_topk_prob": True}),
    "qwen2_moe": (Qwen2MoeConfig, _EXPERTS | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}),
    "gpt_oss": (GptOssConfig, _ONLY_EXPERTS | {"head_dim": 8, "sliding_window": 6}),
    "granitemoe": (GraniteMoeConfig, _ONLY_EXPERTS | _MULTIPLIERS | {"tie_word_embeddings": True}),
    "phimoe": (
        PhimoeConfig,
        _ONLY_EXPERTS | {"attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.3},
    ),
    "glm4_moe": (
        Glm4MoeConfig,
        _EXPERTS
        | {
            "n_routed_experts": 4,
            "n_shared_experts": 2,
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 1.5,
            "attention_bias": True,
            "num_mtp_layers": 0,
        },
    ),
    "dots1": (
        Dots1Config,
        _EXPERTS
        | {
            "n_routed_experts": 4,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "sliding_window": 6,
            "max_window_layers": 2,
            "attention_bias": True,
        },
    ),
    "solar_open": (SolarOpenConfig, _SPARSE | {"head_dim": 12, "n_routed_experts": 4, "attention_bias": True}),
    "glm4_moe-norms": (
        Glm4MoeConfig,
        _EXPERTS | {"n_routed_experts": 4, "head_dim": 8, "use_qk_norm": True, "first_k_dense_replace": 2},
    ),
    "ernie4_5_moe": (
        Ernie4_5_MoeConfig,
        _EXPERTS | {"moe_num_experts": 4, "moe_num_shared_experts": 1, "use_bias": True},
    ),
    "ernie4_5_moe-without-shared": (
        Ernie4_5_MoeConfig,
        _EXPERTS | {"moe_num_experts": 4, "moe_num_shared_experts": 0, "moe_layer_interval": 2},
    ),
    "biogpt": (BioGptConfig, _BIOGPT),
    "bloom": (BloomConfig, _COMMON),
    "bloom-odd-heads-untied": (
        BloomConfig,
        _COMMON | {"hidden_size": 48, "num_attention_heads": 6, "tie_word_embeddings": False},
    ),
    "codegen": (CodeGenConfig, _COMMON | {"n_inner": 48, "rotary_dim": 4}),
    "falcon": (FalconConfig, _COMMON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-one-norm-biases": (
        FalconConfig,
        _COMMON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "bias": True},
    ),
    "falcon-multi-query": (FalconConfig, _COMMON | {"ffn_hidden_size": 48, "tie_word_embeddings": False}),
    "falcon-alibi-sequential": (
        FalconConfig,
        _COMMON | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
    "gpt_bigcode": (GPTBigCodeConfig, _GPT2),
    "gpt_bigcode-mha": (
        GPTBigCodeConfig,
        _GPT2 | {"n_head": 4, "multi_query": False, "scale_attn_weights": False, "tie_word_embeddings": False},
    ),
    "gpt_neo": (
        GPTNeoConfig,
        _GATED | {"attention_types": [[["global", "local"], 1], [["local"], 1]], "window_size": 6},
    ),
    "gptj": (GPTJConfig, _COMMON | {"n_inner": 48, "rotary_dim": 4}),
    "gptj-full-rotary-tied": (GPTJConfig, _COMMON | {"rotary_dim": 8, "tie_word_embeddings": True}),
    "mpt": (MptConfig, _MPT),
    "mpt-clipped": (MptConfig, _MPT | {"attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.3}}),
}
if hasattr(transformers, "ExaoneConfig"):  # from transformers 5.24
    EVERY_VARIANT["exaone"] = (transformers.ExaoneConfig, _GROUPED | {"attention_bias": True, "mlp_bias": True})


def _too_new(model_type: str) -> bool:
    """Return whether a family needs a newer transformers than the installed one."""
    try:
        check_model_type(model_type)
    except ImportError:
        return True
    return False


TOO_NEW = tuple(filter(_too_new, DENSE_TYPES))
"""The families that need a newer transformers."""
EVERY_VARIANT = {name: variant for name, variant in EVERY_VARIANT.items() if variant[0].model_type not in TOO_NEW}

TESTED = CORE
if os.environ.get("MODEGPT_TEST_FAMILIES") == "all":
    TESTED = tuple(model_type for model_type in DENSE_TYPES if model_type not in TOO_NEW)

REPRESENTATIVES: dict[str, str] = {}
for _name, (_config, _) in EVERY_VARIANT.items():
    REPRESENTATIVES.setdefault(_config.model_type, _name)
INSTALLED = tuple(model_type for model_type in DENSE_TYPES if model_type in REPRESENTATIVES)
"""The supported families that the installed transformers has."""
TOWERS = ("gemma3", "mistral3", "qwen2_5_vl", "qwen3_vl")
"""The families whose language model is a part of another model. `test_text_towers.py` tests them."""
VARIANTS = {name: variant for name, variant in EVERY_VARIANT.items() if variant[0].model_type in TESTED}
"""The variants of the families that take part in every test."""
OTHERS = tuple(name for name in EVERY_VARIANT if name not in VARIANTS)
"""The other variants, which only `test_every_family.py` tests."""
FAMILIES = tuple(REPRESENTATIVES[model_type] for model_type in TESTED if model_type in INSTALLED)
"""One variant of each of these families, for tests that cost more than a forward pass."""
STACKS = FAMILIES if TESTED != CORE else ("gpt_neox", "llama-gqa-tied", "opt", "qwen3")
"""The families for tests with other libraries: with and without rotary positions, biases, head norms and a tied head.

To these libraries, the other families look like one of them.
"""
