"""Tiny random models and a tokenizer, built in memory: no downloads.

`dense(name)` is a model of transformers' own class, `compressed(name)` one of ours with unequal widths. The names are
those of `tiny_configs.EVERY_VARIANT`. Biases and norm weights are random too, so that a forgotten one shows.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import torch
from tiny_configs import EVERY_VARIANT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from optimum_modegpt.allocation.plan import EXPERT_STEP
from optimum_modegpt.modeling import OTHER_FILES, SHARED_FILES
from optimum_modegpt.modeling.modegpt_config import head_dim, mlp_width
from optimum_modegpt.modeling.modegpt_family import Family, Widths

SHARED_CODE = {f"{name}.py" for name in SHARED_FILES}
"""The code files of every compressed model; its family adds one."""
OTHER_CODE = {f"{name}.py" for name in OTHER_FILES}
"""The code files that only some families need."""

_AUTO = {"causal": AutoModelForCausalLM, "classification": AutoModelForSequenceClassification}


def dense(name: str, *, task: str = "causal", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Create a dense random model in evaluation mode, float32. `changes` override values of its configuration."""
    config_class, values = EVERY_VARIANT[name]
    model = _AUTO[task].from_config(config_class(**(values | changes)))
    return fill(model, seed, gain=_gain(name)).eval()


def fill(model: PreTrainedModel, seed: int = 0, gain: float = 1.0) -> PreTrainedModel:
    """Set random weights in place, at a scale that keeps activations near one. Weights of norms are near `gain`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            is_gain = name.endswith("weight") and ("norm" in name or "ln_" in name)
            if parameter.ndim == 1 or is_gain:
                parameter.copy_(0.3 * noise + (gain if is_gain else 0.0))
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("scalar"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def _gain(name: str) -> float:
    """Return the weight at which a norm of the variant's family changes nothing."""
    return 1.0 - classes(name)["AutoModel"].config_class.family.norm.offset


def classes(name: str) -> dict[str, type[PreTrainedModel]]:
    """Return our classes of the variant's family by the name of their Auto class."""
    family = EVERY_VARIANT[name][0].model_type
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
    config_class, values = EVERY_VARIANT[name]
    dense_config = config_class(**(values | changes))
    family = model_class.config_class.family
    head, mlp = head_dim(dense_config.per_layer_config[0]), mlp_widths(dense_config, family)
    odd = 0 if family.attention.positions.pairs != "none" else 1
    uncut = family.uncut(dense_config)
    qk = [head] * 3 if "qk" in uncut else [4 + odd, 6 + odd, head]
    vo = [head] * 3 if "vo" in uncut else [7, 3, head]
    if widths is None:
        widths = list(map(Widths, qk, vo, mlp))
        for index, each in enumerate(widths):
            shared = family.shared_width(dense_config, index)
            shared = shared and max(1, shared - 7 * (index + 1))
            widths[index] = replace(each, shared=shared, **dict.fromkeys(family.absent(dense_config, index), 0))
    record = {"format_version": 1, "base_model": name}
    model = model_class(model_class.config_class.from_dense(dense_config, widths, record))
    fill(model, seed, gain=_gain(name))
    generator = torch.Generator().manual_seed(seed + 1)
    for key, buffer in model.named_buffers():
        if key.endswith("rope_index"):
            pairs = [torch.randperm(head // 2, generator=generator) for _ in buffer]
            buffer.copy_(torch.stack([row[: buffer.shape[1]].sort().values for row in pairs]))
    return model.eval()


def mlp_widths(config: Any, family: Family) -> list[int]:
    """Return the MLP widths of three blocks: two narrow ones, those of experts multiples of their step, and dense."""
    widths = []
    for index, kept in enumerate((31, 40, 48)):
        step = EXPERT_STEP if family.has_experts(config, index) else 1
        widths.append(mlp_width(config, family, index) * kept // 48 // step * step)
    return widths


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
