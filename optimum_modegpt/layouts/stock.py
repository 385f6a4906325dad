"""The layout "stock": write a compressed model whose blocks have the same widths as a model of a stock class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from optimum_modegpt.architectures import Architecture, Block
from optimum_modegpt.architectures.storage import stored_tensors
from optimum_modegpt.errors import UnsupportedModel
from optimum_modegpt.layouts.rotary_table import kept_rope_parameters, rotary_modules
from optimum_modegpt.modeling.adoption import built
from optimum_modegpt.modeling.modegpt_config import dense_values, with_text_values


def stock_model(architecture: Architecture, compressed: PreTrainedModel, pairs: list[int]) -> PreTrainedModel:
    """Return a model of a stock class that computes the same as `compressed`, and shares its tensors if it can.

    Args:
        architecture: the dense model.
        compressed: the compressed model, whose blocks have the same widths.
        pairs: the rotary pairs that all heads keep, increasing; empty if they keep all.

    Raises:
        UnsupportedModel: the stock class cannot hold the model.
    """
    config, model_class = stock_config(architecture, compressed.config, pairs)
    with torch.device("meta"):
        empty = model_class(config)
    replacements = {}
    for block, path in zip(architecture.blocks, architecture.block_paths, strict=True):
        replacements[path] = _stock_block(block, compressed.get_submodule(path), empty.get_submodule(path))
    if architecture.final_norm is not None:
        replacements[architecture.final_norm_path] = compressed.get_submodule(architecture.final_norm_path)
    model = built(architecture.model, model_class, config, replacements)
    if pairs:
        _renew_rotary_tables(architecture.text_model(model), config.get_text_config())
    return model


def stock_config(
    architecture: Architecture, compressed_config: Any, pairs: list[int]
) -> tuple[Any, type[PreTrainedModel]]:
    """Return the configuration of the stock class with the widths of a compressed model, and the model class."""
    family, whole = architecture.family, architecture.model.config
    dense: Any = whole.get_text_config()
    widths: dict[str, int] = {}
    for index, own in enumerate(compressed_config.widths()):
        name = family.width_name(dense, index)
        if widths.setdefault(name, own.mlp) != own.mlp:
            raise UnsupportedModel(f"block {index} has an MLP of width {own.mlp}; expected {widths[name]}, as others.")
    values: dict[str, Any] = dict(widths)
    if pairs:
        rope = kept_rope_parameters(architecture.text_model(architecture.model), dense, pairs)
        values |= {"head_dim": 2 * len(pairs), "rope_parameters": rope}
    if pairs and family.stock is not None:
        config_class = CONFIG_MAPPING[family.stock.model_type]
        known = config_class().to_dict().keys()
        values = {name: value for name, value in (dense_values(dense) | values).items() if name in known}
        config = config_class(**values | dict(family.stock.values))
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    else:
        config, model_class = with_text_values(whole, values), architecture.classes.stock_causal_lm
    config.modegpt = compressed_config.modegpt
    config.tie_word_embeddings = architecture.head_is_tied
    return config, model_class


def _stock_block(block: Block, compressed: nn.Module, empty: nn.Module) -> nn.Module:
    """Fill a block of the stock class, on the meta device, with the tensors of a compressed one."""
    tensors = {name: each for name, each in compressed.state_dict().items() if not name.endswith("rope_index")}
    if type(empty) is type(block.module):  # another class stores the projections as compressed blocks do
        tensors = stored_tensors(block.module, block.family, block.config, tensors, block.parts)
    if block.attends:
        path = block.family.attention.module
        attention: Any = compressed.get_submodule(path)
        if attention.qk_head_dim < block.head_dim:
            stock: Any = empty.get_submodule(path)
            share_gains(tensors, block)
            _scale_queries(tensors, block, attention.scaling / stock.scaling)
    for name, parameter in empty.named_parameters():
        if name.endswith("bias") and name not in tensors and type(empty) is not type(block.module):
            tensors[name] = next(iter(tensors.values())).new_zeros(parameter.shape)
    try:
        empty.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise UnsupportedModel(f"{type(empty).__name__} cannot hold block {block.index}: {error}") from error
    return empty


def share_gains(tensors: dict[str, Tensor], block: Block) -> None:
    """Give the norms over single heads one gain for all heads, as a stock class has, among the tensors of a block.

    Raises:
        UnsupportedModel: the heads have different gains.
    """
    if not block.normalised or block.norms_joint:
        return
    norms = block.head_norms
    assert norms is not None
    for role in ("query", "key"):
        name = f"{getattr(norms, role)}.weight"
        gains = tensors[name]
        if not torch.equal(gains, gains[:1].expand_as(gains)):
            raise UnsupportedModel(
                f"block {block.index}: each {role} head has its own gains in {name}, because the heads kept different "
                "pairs; a stock class has the same gains for all heads. Export the model as onnx or openvino, or "
                "compress with layout='stock'."
            )
        tensors[name] = gains[0].clone()


def _scale_queries(tensors: dict[str, Tensor], block: Block, ratio: float) -> None:
    """Multiply the queries by `ratio`, the softmax scale of the dense model relative to that of the stock class."""
    if ratio == 1:
        return
    norms = block.head_norms
    if norms is None:
        for leaf in ("weight", "bias"):
            name = f"{block.family.attention.query}.{leaf}"
            if name in tensors:
                tensors[name] = tensors[name] * ratio
    else:
        name, offset = f"{norms.query}.weight", block.norm.offset
        tensors[name] = (tensors[name] + offset) * ratio - offset


def _renew_rotary_tables(model: nn.Module, config: Any) -> None:
    """Compute the rotary tables of a text model from its configuration. Those of the dense model have more pairs."""
    for path in rotary_modules(model):
        dense: Any = model.get_submodule(path)
        with torch.device("cpu"):
            new = type(dense)(config)
        model.set_submodule(path, new.to(next(iter(dense.buffers())).device))
