"""Models that compute the same as a compressed one: a dense one at full width, and one that is padded with zeros."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import classes, dense
from torch import Tensor
from transformers import PreTrainedModel

from optimum_modegpt.architectures import resolve
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

    It is the stock model, or the compressed class at full width if the stock model stores the projections otherwise, or
    has norms of heads, which have a gain for each head in narrow blocks.
    """
    family = model.config.family
    twin = dense(name)
    first = resolve(twin).blocks[0]
    if not first.is_separate or first.normalised:
        adopt(twin, name)
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("rope_index")}
    state |= {key: value for key, value in twin.state_dict().items() if key.endswith("rope_index")}
    prefix = f"{model.base_model_prefix}.{family.blocks}"
    for index, block in enumerate(blocks_of(model, name)):
        attention = block.get_submodule(family.attention.module)
        reference = blocks_of(twin, name)[index]
        head_dim, qk, vo = attention.dense_head_dim, attention.qk_head_dim, attention.v_head_dim
        heads, kv_heads = attention.q_proj.out_features // qk, attention.k_proj.out_features // qk
        if attention.rotates:
            pairs = attention.rope_index.long()
            kept = torch.cat((pairs, pairs + head_dim // 2), dim=1)  # (kv_heads, qk)
        else:
            kept = torch.arange(qk).expand(kv_heads, -1)
        rows = {
            family.attention.query: _rows(kept.repeat_interleave(heads // kv_heads, 0), head_dim),
            family.attention.key: _rows(kept, head_dim),
            family.attention.value: _rows(torch.arange(vo).expand(kv_heads, -1), head_dim),
        } | {path: torch.arange(block.get_submodule(path).out_features) for path in family.mlp.inputs}
        for path, places in rows.items():
            for leaf, full in reference.get_submodule(path).named_parameters():
                key = f"{prefix}.{index}.{path}.{leaf}"
                state[key] = torch.zeros_like(full).index_copy(0, places, state[key])
        if family.attention.head_norms is not None and qk < head_dim:
            _pad_head_norms(state, f"{prefix}.{index}", reference, attention, kept)
        columns = {
            family.attention.output: _rows(torch.arange(vo).expand(heads, -1), head_dim),
            family.mlp.output: torch.arange(block.get_submodule(family.mlp.output).in_features),
        }
        for path, places in columns.items():
            key = f"{prefix}.{index}.{path}.weight"
            full = reference.get_submodule(path).weight
            state[key] = torch.zeros_like(full).index_copy(1, places, state[key])
    twin.load_state_dict(state, strict=True)
    return twin


def _pad_head_norms(state: dict[str, Tensor], prefix: str, reference: Any, attention: Any, kept: Tensor) -> None:
    """Pad the gains of a narrow block's norms with zeros, and give its padded rows the same mean square as before."""
    family, ratio, gains = attention.family, (attention.dense_head_dim / attention.qk_head_dim) ** 0.5, {}
    for role in ("query", "key"):
        path = getattr(family.attention, role)
        for leaf, _ in reference.get_submodule(path).named_parameters():
            state[f"{prefix}.{path}.{leaf}"] *= ratio
        key = f"{prefix}.{getattr(family.attention.head_norms, role)}.weight"
        own = (state[key].view(-1, attention.qk_head_dim) + family.norm.offset) / ratio
        rows = kept.repeat_interleave(len(own) // len(kept), 0)
        gains[role] = torch.zeros(len(own), attention.dense_head_dim).scatter(1, rows, own) - family.norm.offset
        state[key] = gains[role].flatten() if family.attention.head_norms.over == "projection" else gains[role]
    install_head_gains(reference.get_submodule(family.attention.module), gains)


def _rows(kept: Tensor, head_dim: int) -> Tensor:
    return (kept + head_dim * torch.arange(len(kept))[:, None]).flatten()
