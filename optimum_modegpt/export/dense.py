"""Pad a compressed model with zeros, so that the class of transformers that it derives from computes the same.

Zeros for all that was cut change nothing: a hidden channel without an output, a value coordinate without an output and
a query-key pair of zeros add nothing. The softmax scale and the rotary frequencies of a compressed model are those of
the dense one already.
"""

from __future__ import annotations

from collections.abc import ItemsView
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_modegpt.architectures.block import Block
from optimum_modegpt.architectures.families import family_of
from optimum_modegpt.architectures.resolve import read_blocks
from optimum_modegpt.architectures.storage import stored_tensors
from optimum_modegpt.errors import UnsupportedModel
from optimum_modegpt.layouts.stock import share_gains
from optimum_modegpt.modeling.adoption import built
from optimum_modegpt.modeling.modegpt_common import ModeGPTModelMixin
from optimum_modegpt.modeling.modegpt_experts import channel_axis, packed_names
from optimum_modegpt.modeling.modegpt_family import is_compressed

PER_LAYER = "per_layer_config"
NOT_STOCK = ("model_type", "architectures", "auto_map", "transformers_version", PER_LAYER)
"""The keys of a compressed configuration that the stock one has not, or has with another value."""
EXPORT = "export"
"""The key of the record in config.json that names the format of an exported model."""


def export_dense(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Save a compressed model in `folder` as one of its stock class, with zeros for all that was cut.

    Raises:
        UnsupportedModel: the model is not compressed, or its stock class cannot hold it. Nothing is written.
    """
    padded_model(model).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def padded_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the stock class that computes the same as a compressed one. It shares the uncut tensors.

    The result is exact, except that queries and keys that are normalised over all heads are multiplied by a constant,
    which rounds them in the model's dtype.

    Raises:
        UnsupportedModel: the model is not compressed, or quantised, or not loaded completely; or it has norms of narrow
            heads, which have a gain for each head, and the stock class has one for all heads.
    """
    _check(model)
    stock_class: Any = type(model).__bases__[-1]
    config = dense_config(model.config)
    classes = family_of(config.model_type)
    assert classes is not None
    with torch.device("meta"):
        architecture = read_blocks(stock_class(config), classes)
    narrow: Any = model.base_model.get_submodule(classes.family.blocks)
    replacements: dict[str, nn.Module] = {}
    for path, block, module in zip(architecture.block_paths, architecture.blocks, narrow, strict=True):
        tensors = padded_tensors(module, block)
        share_gains(tensors, block)
        stored = stored_tensors(block.module, block.family, block.config, tensors, block.parts)
        block.module.load_state_dict(stored, strict=True, assign=True)
        replacements[path] = block.module
    return built(model, stock_class, config, replacements)


def _check(model: PreTrainedModel) -> None:
    """Refuse a model that cannot be padded, before anything is computed."""
    name = type(model).__name__
    if not is_compressed(model.config.model_type) or not isinstance(model, ModeGPTModelMixin):
        raise UnsupportedModel(
            f"{name} is a stock class of transformers already, which every tool reads; expected a compressed model "
            "with narrow blocks. Use the model as it is."
        )
    if getattr(model, "quantization_method", None) is not None:
        raise UnsupportedModel(f"{name} is quantised; export the model that it was quantised from.")
    if model.holds_adapters:
        raise UnsupportedModel(f"{name} has adapters; merge them into the weights first.")
    if any(tensor.is_meta for tensor in model.parameters()):
        raise UnsupportedModel(f"{name} has weights outside of memory; load it without device_map and offloading.")


def dense_config(config: Any) -> Any:
    """Return the configuration of the dense model, with the record of the compression, from the compressed one."""
    values = {name: value for name, value in config.to_dict().items() if name not in NOT_STOCK}
    text = getattr(config, "text_config", None)
    if text is not None:
        values["text_config"] = dense_config(text)
    else:
        sizes = config.family.layer_sizes
        entries = {index: {name: entry[name] for name in sizes if name in entry} for index, entry in per_layer(config)}
        values |= {PER_LAYER: entries} if any(entries.values()) else {}
    if "modegpt" in values:
        values["modegpt"] = values["modegpt"] | {EXPORT: "dense"}
    return type(config).__bases__[-1](**values)


def per_layer(config: Any) -> ItemsView[int, dict[str, int]]:
    """Return the sizes that a compressed configuration has for every block, by its index."""
    return {int(index): entry for index, entry in config.to_dict()[PER_LAYER].items()}.items()


def padded_tensors(narrow: nn.Module, dense: Block) -> dict[str, Tensor]:
    """Return the tensors of a compressed block at full width by name, with zeros for all that was cut.

    The projections are separate, and the coordinates of heads in the order of compressed models. The weight of a norm
    over a head is (heads, head_dim), because each head of a narrow block has other gains.

    Args:
        narrow: the compressed block.
        dense: the block of the stock class, which may be on the meta device.
    """
    tensors = {name: values for name, values in narrow.state_dict().items() if not name.endswith("rope_index")}
    if dense.experts is None:
        channels = torch.arange(_mlp_width(narrow, dense))
        for path in dense.family.mlp.inputs:
            _spread(tensors, path, 0, channels, dense.mlp_width)
        _spread(tensors, dense.family.mlp.output, 1, channels, dense.mlp_width)
    else:
        tensors |= _padded_experts(narrow, dense)
        _widen_shared(tensors, dense)
    if dense.attends:
        _widen_heads(tensors, narrow.get_submodule(dense.family.attention.module), dense)
    return tensors


def _widen_shared(tensors: dict[str, Tensor], dense: Block) -> None:
    """Give the shared expert, if any, among the tensors of a block its full width."""
    described = dense.family.shared
    if described is None or dense.shared is None:
        return
    channels = torch.arange(tensors[f"{described.output}.weight"].shape[1])
    for path in described.inputs:
        _spread(tensors, path, 0, channels, dense.shared_width)
    _spread(tensors, described.output, 1, channels, dense.shared_width)


def _mlp_width(narrow: nn.Module, dense: Block) -> int:
    return narrow.get_submodule(dense.family.mlp.output).in_features  # pyright: ignore[reportReturnType]


def _spread(tensors: dict[str, Tensor], path: str, axis: int, places: Tensor, size: int) -> None:
    """Put the rows or columns of a projection, and its bias if they are rows, to their `places` among zeros."""
    for leaf in ("weight", "bias") if axis == 0 else ("weight",):
        if (values := tensors.get(f"{path}.{leaf}")) is not None:
            tensors[f"{path}.{leaf}"] = _spread_values(values, axis, places, size)


def _spread_values(values: Tensor, axis: int, places: Tensor, size: int) -> Tensor:
    shape = list(values.shape)
    shape[axis] = size
    return values.new_zeros(shape).index_copy(axis, places.to(values.device), values)


def _widen_heads(tensors: dict[str, Tensor], attention: Any, dense: Block) -> None:
    """Give the heads of an attention, among the tensors of a block, their full width."""
    names, heads, kv_heads, head_dim = dense.family.attention, dense.heads, dense.kv_heads, dense.head_dim
    kept = {"key": _kept(attention, dense)}
    kept["query"] = kept["key"].repeat_interleave(heads // kv_heads, 0)
    for role, places in kept.items():
        _spread(tensors, getattr(names, role), 0, _rows(places, head_dim), places.shape[0] * head_dim)
    values = torch.arange(attention.v_head_dim)
    own, repeated = (_rows(values.expand(count, -1), head_dim) for count in (kv_heads, heads))
    _spread(tensors, names.value, 0, own, kv_heads * head_dim)
    _spread(tensors, names.output, 1, repeated, heads * head_dim)
    if names.gate is not None:
        _spread(tensors, names.gate, 0, repeated, heads * head_dim)
    if dense.normalised:
        for role, places in kept.items():
            _widen_norm(tensors, role, places, dense)


def _kept(attention: Any, dense: Block) -> Tensor:
    """Return the coordinates (kv_heads, qk_head_dim) that the key heads kept, in the order of compressed models."""
    if not attention.rotates:
        return torch.arange(attention.qk_head_dim).expand(dense.kv_heads, -1)
    pairs = attention.rope_index.long()
    return torch.cat((pairs, pairs + dense.head_dim // 2), dim=1)


def _rows(places: Tensor, head_dim: int) -> Tensor:
    """Return the rows of a projection from the coordinates (heads, width) of its heads."""
    return (places + head_dim * torch.arange(len(places), device=places.device)[:, None]).flatten()


def _widen_norm(tensors: dict[str, Tensor], role: str, places: Tensor, dense: Block) -> None:
    """Widen the norm of "query" or "key", whose rows are at their full width already.

    Rows that are larger by √(head_dim / width) have the same mean square over more coordinates. A gain of 0 silences
    the coordinates that are not kept.
    """
    names, offset, width = dense.head_norms, dense.norm.offset, places.shape[1]
    assert names is not None
    ratio = (dense.head_dim / width) ** 0.5
    for leaf in ("weight", "bias"):
        if (rows := tensors.get(f"{getattr(dense.family.attention, role)}.{leaf}")) is not None and ratio != 1:
            rows.mul_(ratio)
    key = f"{getattr(names, role)}.weight"
    weight = tensors[key]
    own = ((weight.view(-1, width) + offset) / ratio).expand(places.shape)
    gains = own.new_zeros(len(places), dense.head_dim).scatter(1, places.to(own.device), own) - offset
    tensors[key] = gains.flatten() if dense.norms_joint else gains


def _padded_experts(narrow: nn.Module, dense: Block) -> dict[str, Tensor]:
    """Return the packed parameters of a block's experts with zeros up to their full width."""
    described, padded = dense.family.mlp.experts, {}
    assert described is not None
    experts: Any = narrow.get_submodule(described.packed)
    for name in packed_names(experts):
        values, axis, size = getattr(experts, name).detach(), channel_axis(experts, name), dense.mlp_width
        places = torch.arange(values.shape[axis])
        if name.startswith("gate_up"):
            size *= 2
            if experts.is_concatenated:
                gate, up = places.chunk(2)
                places = torch.cat((gate, up - len(gate) + dense.mlp_width))
        padded[f"{described.packed}.{name}"] = _spread_values(values, axis, places, size)
    return padded
