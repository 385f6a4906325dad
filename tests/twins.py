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
from optimum_modegpt.modeling.modegpt_experts import channel_axis, experts_of, packed_names
from optimum_modegpt.modeling.modegpt_family import Family

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
    if not all(block.is_separate and not block.normalised for block in resolve(twin).blocks):
        adopt(twin, name)
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("rope_index")}
    state |= {key: value for key, value in twin.state_dict().items() if key.endswith("rope_index")}
    prefix = f"{model.base_model_prefix}.{family.blocks}"
    for index, block in enumerate(blocks_of(model, name)):
        reference, parts = blocks_of(twin, name)[index], family.parts(model.config, index)
        rows, columns = _of_mlp(block, family)
        if "qk" in parts:
            own_rows, own_columns = _of_attention(block.get_submodule(family.attention.module), family)
            rows, columns = rows | own_rows, columns | own_columns
        for path, places in rows.items():
            for leaf, full in reference.get_submodule(path).named_parameters():
                key = f"{prefix}.{index}.{path}.{leaf}"
                state[key] = torch.zeros_like(full).index_copy(0, places, state[key])
        if "qk" in parts and family.attention.norms_of(model.config) is not None:
            _widen_norms(block, reference, family, state, f"{prefix}.{index}")
        for path, places in columns.items():
            full = reference.get_submodule(path).weight
            key = f"{prefix}.{index}.{path}.weight"
            state[key] = torch.zeros_like(full).index_copy(1, places, state[key])
        padded = _padded_experts(block, reference, family)
        state |= {f"{prefix}.{index}.{path}": tensor for path, tensor in padded.items()}
    twin.load_state_dict(state, strict=True)
    return twin


def _of_mlp(block: Any, family: Family) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the places of rows and columns as `_of_attention`, for the projections of an MLP without experts."""
    if experts_of(block, family) is not None:
        return {}, {}
    rows = {path: torch.arange(block.get_submodule(path).out_features) for path in family.mlp.inputs}
    return rows, {family.mlp.output: torch.arange(block.get_submodule(family.mlp.output).in_features)}


def _of_attention(attention: Any, family: Family) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the places of the rows, and of the columns, of a compressed attention's projections in the dense ones."""
    head_dim, vo = attention.dense_head_dim, attention.v_head_dim
    heads, kv_heads = _head_counts(attention)
    kept = _kept(attention)
    rows = {
        family.attention.query: _rows(kept.repeat_interleave(heads // kv_heads, 0), head_dim),
        family.attention.key: _rows(kept, head_dim),
        family.attention.value: _rows(torch.arange(vo).expand(kv_heads, -1), head_dim),
    }
    values = _rows(torch.arange(vo).expand(heads, -1), head_dim)
    if family.attention.gate is not None:
        rows[family.attention.gate] = values
    return rows, {family.attention.output: values}


def _head_counts(attention: Any) -> tuple[int, int]:
    return tuple(attention.projection(role).out_features // attention.qk_head_dim for role in ("query", "key"))


def _kept(attention: Any) -> Tensor:
    """Return the dense coordinates (kv_heads, qk_head_dim) of the key heads."""
    if not attention.rotates:
        return torch.arange(attention.qk_head_dim).expand(_head_counts(attention)[1], -1)
    pairs = attention.rope_index.long()
    return torch.cat((pairs, pairs + attention.dense_head_dim // 2), dim=1)


def _widen_norms(block: Any, reference: Any, family: Family, state: dict[str, Tensor], prefix: str) -> None:
    """Widen the norms of narrow heads in `state`, in which their rows are at their dense places already.

    Larger rows have the same mean square over more coordinates. A gain of 0 silences those that are not kept.
    """
    attention = block.get_submodule(family.attention.module)
    head_dim, qk = attention.dense_head_dim, attention.qk_head_dim
    if qk == head_dim:
        return
    gains, offset, ratio = {}, family.norm.offset, (head_dim / qk) ** 0.5
    heads, kv_heads = _head_counts(attention)
    kept = _kept(attention)
    for role, places in (("query", kept.repeat_interleave(heads // kv_heads, 0)), ("key", kept)):
        path = getattr(family.attention, role)
        for leaf, _ in reference.get_submodule(path).named_parameters():
            state[f"{prefix}.{path}.{leaf}"] *= ratio
        key = f"{prefix}.{getattr(family.attention.head_norms, role)}.weight"
        own = (state[key].view(-1, qk) + offset) / ratio
        gains[role] = torch.zeros(len(own), head_dim).scatter(1, places, own) - offset
        state[key] = gains[role].flatten() if family.attention.head_norms.over == "projection" else gains[role]
    install_head_gains(reference.get_submodule(family.attention.module), gains)


def _padded_experts(block: Any, reference: Any, family: Family) -> dict[str, Tensor]:
    """Return the packed parameters of a block's experts, if any, with zeros up to the width of the reference."""
    experts, padded = experts_of(block, family), {}
    for name in () if experts is None else packed_names(experts):
        full, axis = getattr(experts_of(reference, family), name), channel_axis(experts, name)
        places = torch.arange(getattr(experts, name).shape[axis])
        if name.startswith("gate_up") and experts.is_concatenated:
            gate, up = places.chunk(2)
            places = torch.cat((gate, up - len(gate) + full.shape[axis] // 2))
        values = torch.zeros_like(full).index_copy(axis, places, getattr(experts, name))
        padded[f"{family.mlp.experts.packed}.{name}"] = values
    return padded


def _rows(kept: Tensor, head_dim: int) -> Tensor:
    return (kept + head_dim * torch.arange(len(kept))[:, None]).flatten()
