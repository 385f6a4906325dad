"""Tiny random models and a tokenizer, built in memory: no downloads.

`dense(name)` is a model of transformers' own class, `compressed(name)` one of ours with unequal widths. The names are
those of `VARIANTS`. Biases and norm weights are random too, so that a forgotten one shows.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from optimum_modegpt.modeling import DENSE_TYPES, SHARED_FILES
from optimum_modegpt.modeling.modegpt_config import head_dim, mlp_width
from optimum_modegpt.modeling.modegpt_family import Widths

VOCABULARY = 260
"""256 bytes, three special tokens and one token that the tokenizer never makes."""

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
_GRANITE = _GATED | {
    "embedding_multiplier": 1.5,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.4,
    "logits_scaling": 2.0,
}
_OPT = _COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
_GPT2 = _COMMON | {"n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

VARIANTS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama-gqa-tied": (LlamaConfig, _GATED | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-mqa-biases": (LlamaConfig, _GATED | {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama-mha": (LlamaConfig, _GATED | {"num_key_value_heads": 4}),
    "mistral-window": (MistralConfig, _GATED | {"num_key_value_heads": 2, "sliding_window": 6}),
    "mistral-head-dim": (
        MistralConfig,
        _GATED | {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 12},
    ),
    "qwen2": (Qwen2Config, _GATED | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
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
    "gpt2": (GPT2Config, _GPT2),
    "gpt2-scaled-untied": (
        GPT2Config,
        _GPT2 | {"n_inner": None, "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
    ),
}
SHARED_CODE = {f"{name}.py" for name in SHARED_FILES}
"""The code files of every compressed model; its family adds one."""

_REPRESENTATIVES = {"llama": "llama-gqa-tied", "mistral": "mistral-window", "qwen2": "qwen2-mixed-window"}
FAMILIES = tuple(_REPRESENTATIVES.get(model_type, model_type) for model_type in DENSE_TYPES)
"""One variant of each family, for tests that cost more than a forward pass."""

_AUTO = {"causal": AutoModelForCausalLM, "classification": AutoModelForSequenceClassification}


def dense(name: str, *, task: str = "causal", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Create a dense random model in evaluation mode, float32. `changes` override values of its configuration."""
    config_class, values = VARIANTS[name]
    model = _AUTO[task].from_config(config_class(**(values | changes)))
    return fill(model, seed).eval()


def fill(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Set random weights in place, at a scale that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.ndim == 1:
                is_gain = name.endswith("weight") and ("norm" in name or "ln_" in name)
                parameter.copy_(0.3 * noise + (1.0 if is_gain else 0.0))
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
    return model


def classes(name: str) -> dict[str, type[PreTrainedModel]]:
    """Return our classes of the variant's family by the name of their Auto class."""
    family = VARIANTS[name][0].model_type
    return importlib.import_module(f"optimum_modegpt.modeling.modegpt_{family}").MODELS


def compressed(
    name: str,
    *,
    auto: str = "AutoModelForCausalLM",
    seed: int = 0,
    widths: list[Widths] | None = None,
    **changes: Any,
) -> PreTrainedModel:
    """Create a random model of our class. Default blocks: query and key narrower than value, wider, and dense."""
    model_class = classes(name)[auto]
    config_class, values = VARIANTS[name]
    dense_config = config_class(**(values | changes))
    family = model_class.attention_class.family
    head, mlp = head_dim(dense_config), mlp_width(dense_config, family)
    odd = 0 if family.attention.positions.pairs != "none" else 1
    qk = [head] * 3 if "qk" in family.full_width_parts else [4 + odd, 6 + odd, head]
    widths = widths or [Widths(qk[0], 7, 31), Widths(qk[1], 3, 40), Widths(qk[2], head, mlp)]
    record = {"format_version": 1, "base_model": name}
    model = fill(model_class(model_class.config_class.from_dense(dense_config, widths, record)), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for key, buffer in model.named_buffers():
        if key.endswith("rope_index"):
            pairs = [torch.randperm(head // 2, generator=generator) for _ in buffer]
            buffer.copy_(torch.stack([row[: buffer.shape[1]].sort().values for row in pairs]))
    return model.eval()


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """Return random token ids without special ones, (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (batch, length), generator=generator)


def tokenizer() -> PreTrainedTokenizerFast:
    """Create a fast tokenizer of bytes: `<pad>` 0, `<s>` 1, `</s>` 2, then one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


def fine_tune(model: Any, steps: int = 4, learning_rate: float = 1e-2) -> list[float]:
    """Train a few steps on one batch, and return the losses. The model is in evaluation mode afterwards."""
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=learning_rate)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses
