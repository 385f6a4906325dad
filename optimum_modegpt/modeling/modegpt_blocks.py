"""Blocks of compressed models: separate the dense projections, install weights, and change widths.

This file is also remote code: it is copied next to the weights. It imports only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_config import Dense, count_heads, head_dim
from .modegpt_contract import ENGINES, check_attention
from .modegpt_experts import experts_of, narrow_experts, packed_shape, projections_of
from .modegpt_family import PARTS, Family, Part, Widths

HEADS = (("query", "heads"), ("key", "kv_heads"))
"""The projections of query and key, and the name of the number of their heads."""


class ModeGPTMLPMixin(Dense):
    """Extends a dense MLP class that stacks its input projections. The compressed MLP has separate ones."""

    family: ClassVar[Family]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (batch, length, d_model) to the same shape, as the dense class does."""
        mlp = self.family.mlp
        hidden = self.submodule(mlp.activation)(self.submodule(mlp.inputs[0])(hidden_states))
        for path in mlp.inputs[1:]:
            hidden = hidden * self.submodule(path)(hidden_states)
        return self.submodule(mlp.output)(hidden)

    def submodule(self, path: str) -> nn.Module:
        """Return a module of the MLP by its path from the block."""
        return self.get_submodule(path.removeprefix(f"{self.family.mlp.module}."))


def adopt_block(block: Any, model_class: type[Any], config: Any, parts: Collection[Part] = PARTS) -> None:
    """Turn a dense block of a model with this configuration, which has these parts, into one of the compressed classes.

    The result has the full width.

    Projections that the dense block stacks or transposes become separate linear layers, which are not initialised.

    Raises:
        ImportError: the dense class takes an argument that the compressed one does not handle.
    """
    family = model_class.config_class.family
    _separate(block, family, config, parts)
    if "qk" in parts:
        attention = block.get_submodule(family.attention.module)
        if not hasattr(attention, "config"):
            attention.config = config
        adopt_attention(attention, model_class.attention_class)
    if model_class.mlp_class is not None and experts_of(block, family) is None:
        block.get_submodule(family.mlp.module).__class__ = model_class.mlp_class


def adopt_attention(attention: Any, attention_class: type[ModeGPTAttentionMixin]) -> None:
    """Turn a dense attention module, with separate projections, into the compressed class at full width.

    Raises:
        ImportError: the dense class takes an argument that the compressed one does not handle.
    """
    attention.cache_argument = check_attention(
        attention_class.dense_class(), attention_class.family.attention.passed_on
    )
    attention.__class__ = attention_class
    head_dim, key = attention.dense_head_dim, attention.projection("key")
    attention.set_widths(head_dim, head_dim)
    if attention.rotates:
        device = key.weight.device
        if attention.config._attn_implementation in ENGINES:
            # They create parameters on "meta", and buffers on the default device.
            device = torch.get_default_device()
        pairs = torch.arange(head_dim // 2, dtype=torch.int32, device=device)
        install_rope_index(attention, pairs.expand(key.out_features // head_dim, -1))


def mlp_shape(block: nn.Module, family: Family) -> tuple[int, int]:
    """Return the width of the residual stream and that of the MLP, or of each expert, of a dense block."""
    if (experts := experts_of(block, family)) is not None:
        return packed_shape(experts)
    output: Any = block.get_submodule(family.mlp.output)
    d_model, width = output.weight.T.shape if family.mlp.storage.transposed else output.weight.shape
    return d_model, width


def _separate(block: nn.Module, family: Family, config: Any, parts: Collection[Part]) -> None:
    """Replace the projections that the dense block stacks or transposes by uninitialised linear layers."""
    d_model, mlp = mlp_shape(block, family)
    units, widths = {"block": 1}, {"mlp": mlp}
    if "qk" in parts:
        units |= count_heads(block.get_submodule(family.attention.module), family, config)
        widths |= dict.fromkeys(("qk", "vo"), head_dim(config))
    stacked: set[str] = set()
    for projection in projections_of(block, family, parts):
        if projection.storage.plain:
            continue
        dense: Any = block.get_submodule(projection.dense_path)
        shape = [d_model, d_model]
        shape[projection.axis] = units[projection.unit] * widths[projection.part]
        new = empty_linear(dense, shape[0], shape[1])
        block.set_submodule(projection.path, new.requires_grad_(dense.weight.requires_grad))
        if projection.dense_path != projection.path:
            stacked.add(projection.dense_path)
    for path in stacked:
        parent, _, name = path.rpartition(".")
        delattr(block.get_submodule(parent), name)


def install_rope_index(attention: nn.Module, index: Tensor) -> None:
    """Set the coordinate pairs (kv_heads, qk_head_dim / 2) that each key-value head kept."""
    attention.register_buffer("rope_index", index.to(torch.int32).contiguous(), persistent=True)


def install_linear(block: nn.Module, path: str, weight: Tensor, bias: Tensor | None) -> None:
    """Replace a projection by one of the given weight (out, in), in the dtype and on the device of the old one.

    `bias` must be given if, and only if, the old projection has one.
    """
    old: Any = block.get_submodule(path)
    assert (bias is None) == (old.bias is None), path
    new = empty_linear(old, weight.shape[0], weight.shape[1])
    with torch.no_grad():
        new.weight.copy_(weight)
        if bias is not None:
            new.bias.copy_(bias)
    new.requires_grad_(old.weight.requires_grad)
    block.set_submodule(path, new)


def install_head_gains(attention: Any, gains: Mapping[str, Tensor]) -> None:
    """Replace the weights of the norms of "query" and "key" by `gains`, (heads, qk_head_dim) each."""
    over_heads = attention.family.attention.head_norms.over == "head"
    for role, weight in gains.items():
        weight = weight if over_heads else weight.flatten()
        norm = attention.head_norm(role)
        norm.weight = nn.Parameter(weight.to(norm.weight).contiguous(), requires_grad=norm.weight.requires_grad)


def empty_linear(like: Any, out_features: int, in_features: int) -> nn.Linear:
    """Return an uninitialised projection of another shape, with the bias, dtype, device and mode of `like`."""
    new: Any = nn.utils.skip_init(
        nn.Linear,
        in_features,
        out_features,
        bias=like.bias is not None,
        dtype=like.weight.dtype,
        device=like.weight.device,
    )
    return new.train(like.training)


def shrink_block(block: Any, model_class: type[Any], config: Any, widths: Widths) -> None:
    """Give a newly built dense block the widths of a compressed one. The values must be loaded afterwards."""
    family = model_class.config_class.family
    parts: list[Part] = [part for part in PARTS if getattr(widths, part)]
    units = {"block": 1}
    if "qk" in parts:
        units |= count_heads(block.get_submodule(family.attention.module), family, config)
    adopt_block(block, model_class, config, parts)
    if "qk" in parts:
        attention = block.get_submodule(family.attention.module)
        attention.set_widths(widths.qk, widths.vo)
        if attention.rotates:
            install_rope_index(attention, attention.rope_index[:, : widths.qk // 2])
        if family.attention.norms_of(config) is not None and widths.qk < attention.dense_head_dim:
            empty = {role: attention.head_norm(role).weight.new_empty(units[unit], widths.qk) for role, unit in HEADS}
            install_head_gains(attention, empty)
    if (experts := experts_of(block, family)) is not None:
        narrow_experts(experts, widths.mlp)
    for projection in projections_of(block, family, parts):
        old = block.get_submodule(projection.path)
        shape = list(old.weight.shape)
        shape[projection.axis] = units[projection.unit] * getattr(widths, projection.part)
        block.set_submodule(projection.path, empty_linear(old, *shape))
