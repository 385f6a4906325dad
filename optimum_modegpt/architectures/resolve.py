"""Family × model → blocks. All "unsupported" errors come from here, before any work starts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_modegpt.architectures.block import Block
from optimum_modegpt.architectures.families import FAMILIES
from optimum_modegpt.architectures.spec import Family
from optimum_modegpt.decompositions.psd import raised
from optimum_modegpt.errors import AlreadyCompressed, UnsupportedModel
from optimum_modegpt.modeling.modegpt_contract import check_attention


@dataclass(frozen=True)
class Architecture:
    """A causal language model whose blocks we know how to read."""

    model: PreTrainedModel
    family: Family
    blocks: tuple[Block, ...]

    @property
    def block_list(self) -> nn.ModuleList:
        """The model's own list of blocks."""
        return self.model.base_model.get_submodule(self.family.layout.blocks)  # pyright: ignore[reportReturnType]

    @property
    def final_norm(self) -> Any:
        """The norm after the last block, or None where this model has none."""
        return self._optional(self.family.final_norm)

    @property
    def head_is_tied(self) -> bool:
        """Whether the head and the input embeddings share one tensor, whatever the configuration says."""
        modules = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        head, embeddings = (cast(nn.Linear, module).weight for module in modules)
        return head.data_ptr() == embeddings.data_ptr()

    def tail(self, device: torch.device) -> nn.Sequential:
        """Copy the modules after the last block to `device`."""
        return nn.Sequential(*(copy.deepcopy(module).to(device) for module in self.own_tail))

    @property
    def own_tail(self) -> nn.Sequential:
        """Return the model's own modules after the last block: final norm and projection, if it has them, and head."""
        projection = self._optional(self.family.projection) if self.family.projection else None
        modules = (self.final_norm, projection, self.model.get_output_embeddings())
        return nn.Sequential(*(module for module in modules if module is not None))

    def head(self, device: torch.device) -> torch.Tensor:
        """The map (vocabulary, d_model) from the final norm's output to the logits, at least float32, on `device`."""
        matrix = cast(nn.Linear, self.model.get_output_embeddings()).weight
        matrix = raised(matrix.detach().to(device))
        projection = self._optional(self.family.projection) if self.family.projection else None
        return matrix if projection is None else matrix @ projection.weight.detach().to(matrix)

    def _optional(self, path: str) -> Any:
        parent, _, name = path.rpartition(".")
        return getattr(self.model.base_model.get_submodule(parent), name)


def check_model_type(model_type: str) -> Family:
    """The family of a transformers model_type.

    Raises:
        AlreadyCompressed: for a result of this package.
        UnsupportedModel: for a type we do not know, with the list of those we know.
        ImportError: if the installed transformers changed the family's attention; before any weights are loaded.
    """
    if model_type.startswith("modegpt_"):
        raise AlreadyCompressed(
            f"this model ({model_type}) is already compressed; compressing it again would calibrate on its own errors. "
            "Start from the dense model (config.modegpt names it) with a higher sparsity."
        )
    if model_type not in FAMILIES:
        raise UnsupportedModel(f"model_type {model_type!r} is not supported; known: {', '.join(sorted(FAMILIES))}.")
    family = FAMILIES[model_type]
    check_attention(family.attention_class.dense_class())
    return family


def resolve(model: PreTrainedModel) -> Architecture:
    """The blocks of `model`, by role.

    Raises:
        AlreadyCompressed, UnsupportedModel: before anything is computed.
    """
    config = model.config
    family = check_model_type(config.model_type)
    if model.get_output_embeddings() is None:
        raise UnsupportedModel(
            f"{type(model).__name__} has no language-model head; load the model with AutoModelForCausalLM, "
            "compress it, and load the result with the class you need."
        )
    if getattr(model, "quantization_method", None) not in (None, "modegpt") or getattr(
        model, "is_loaded_in_4bit", False
    ):
        raise UnsupportedModel("the model is quantised; compress first and quantise the result.")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UnsupportedModel(
            "the model is spread over devices by accelerate; load it without device_map: one block at a time goes to "
            "the compute device by itself."
        )
    modules: Sequence[nn.Module] = model.base_model.get_submodule(family.layout.blocks)  # pyright: ignore[reportAssignmentType]
    norm_first = family.norm_first_flag is None or bool(getattr(config, family.norm_first_flag))
    blocks = tuple(_block(module, family, index, norm_first) for index, module in enumerate(modules))
    if not blocks:
        raise UnsupportedModel(f"{type(model).__name__} has no decoder blocks.")
    return Architecture(model, family, blocks)


def _block(module: nn.Module, family: Family, index: int, norm_first: bool) -> Block:
    layout = family.layout
    attention = (layout.query, layout.key, layout.value, layout.output)
    for path in (*attention, *layout.mlp_inputs, layout.mlp_output):
        linear: Any = module.get_submodule(path)
        if type(linear) is not nn.Linear or linear.weight.is_meta:
            state = ", without its weights in memory" if type(linear) is nn.Linear else ""
            raise UnsupportedModel(
                f"block {index}: {path} is {type(linear).__name__}{state}; expected a plain nn.Linear, loaded. "
                "Compress before adapters, quantisation and offloading."
            )
    head_dim: Any = module.get_submodule(layout.attention).head_dim
    query, key = (cast(nn.Linear, module.get_submodule(path)) for path in (layout.query, layout.key))
    return Block(
        module, family, index, query.out_features // head_dim, key.out_features // head_dim, head_dim, norm_first
    )
