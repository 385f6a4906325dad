"""Models that compute the same as a compressed one: a dense one at full width, and one that is padded with zeros."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import classes, dense
from transformers import PreTrainedModel

from optimum_modegpt.architectures import resolve
from optimum_modegpt.export.dense import padded_model, padded_tensors
from optimum_modegpt.modeling.adoption import become, built
from optimum_modegpt.modeling.modegpt_blocks import install_head_gains

CPU = torch.device("cpu")


def adopt(model: PreTrainedModel, name: str) -> None:
    """Give a dense model the compressed class at full width, with copies of its blocks, as compression does."""
    architecture = resolve(model)
    model_class = classes(name)["AutoModelForCausalLM"]
    widths = [block.dense_widths for block in architecture.blocks]
    modules = (block.compressible_copy(CPU).module for block in architecture.blocks)
    copies = dict(zip(architecture.block_paths, modules, strict=True))
    config = model_class.config_class.from_dense(model.config, widths, {"format_version": 1})
    become(model, built(model, model_class, config, copies))


def blocks_of(model: PreTrainedModel, name: str) -> Any:
    return model.base_model.get_submodule(classes(name)["AutoModel"].config_class.family.blocks)


def dense_twin(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Return a model that computes the same, with zeros for everything that was cut.

    It is the stock model; or the compressed class at full width, if a norm has a gain for each head of narrow blocks.
    """
    twin = dense(name)
    blocks = resolve(twin).blocks
    if not any(block.normalised and not block.norms_joint for block in blocks):
        return padded_model(model)
    adopt(twin, name)
    family, prefix = model.config.family, f"{model.base_model_prefix}.{model.config.family.blocks}"
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(f"{prefix}.")}
    state |= {key: value for key, value in twin.state_dict().items() if key.endswith("rope_index")}
    for block, narrow, full in zip(blocks, blocks_of(model, name), blocks_of(twin, name), strict=True):
        tensors = padded_tensors(narrow, block)
        if block.normalised:
            gains = {role: tensors[f"{getattr(block.head_norms, role)}.weight"] for role in ("query", "key")}
            install_head_gains(full.get_submodule(family.attention.module), gains)
        state |= {f"{prefix}.{block.index}.{key}": value for key, value in tensors.items()}
    twin.load_state_dict(state, strict=True)
    return twin
