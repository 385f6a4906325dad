"""Models that compute the same as a compressed one: a dense one at full width, and one that is padded with zeros."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import classes, dense
from torch import Tensor
from transformers import PreTrainedModel

from optimum_modegpt.architectures import resolve
from optimum_modegpt.modeling.adoption import become, built
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

    It is the stock model, or the compressed class at full width if the stock model stores the projections otherwise.
    """
    family = model.config.family
    twin = dense(name)
    if not resolve(twin).blocks[0].is_separate:
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
        }
        columns = {family.attention.output: _rows(torch.arange(vo).expand(heads, -1), head_dim)}
        if experts_of(block, family) is None:
            rows |= {path: torch.arange(block.get_submodule(path).out_features) for path in family.mlp.inputs}
            columns[family.mlp.output] = torch.arange(block.get_submodule(family.mlp.output).in_features)
        padded = _padded_experts(block, reference, family)
        for path, places in rows.items():
            for leaf, full in reference.get_submodule(path).named_parameters():
                own = block.get_parameter(f"{path}.{leaf}")
                padded[f"{path}.{leaf}"] = torch.zeros_like(full).index_copy(0, places, own)
        for path, places in columns.items():
            full = reference.get_submodule(path).weight
            padded[f"{path}.weight"] = torch.zeros_like(full).index_copy(1, places, block.get_submodule(path).weight)
        state |= {f"{prefix}.{index}.{path}": tensor for path, tensor in padded.items()}
    twin.load_state_dict(state, strict=True)
    return twin


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
