"""Find the blocks of a model. Unsupported models are refused here, before any work starts."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum_modegpt.architectures.block import Block
from optimum_modegpt.architectures.classes import FamilyClasses
from optimum_modegpt.architectures.families import family_of
from optimum_modegpt.architectures.head import LinearHead, LogitHead, cap_of, scale_of
from optimum_modegpt.architectures.refused import REFUSED
from optimum_modegpt.architectures.residual import multiplier_of, topology_of
from optimum_modegpt.decompositions.psd import at_least_float32
from optimum_modegpt.errors import AlreadyCompressed, UnsupportedModel
from optimum_modegpt.modeling import DENSE_TYPES
from optimum_modegpt.modeling.modegpt_attention import rotates
from optimum_modegpt.modeling.modegpt_blocks import mlp_shape
from optimum_modegpt.modeling.modegpt_config import count_heads
from optimum_modegpt.modeling.modegpt_contract import check_attention, check_release
from optimum_modegpt.modeling.modegpt_experts import projections_of
from optimum_modegpt.modeling.modegpt_family import Family, Part, is_compressed


@dataclass(frozen=True)
class Architecture:
    """A causal language model whose blocks we know how to read."""

    model: PreTrainedModel
    classes: FamilyClasses
    blocks: tuple[Block, ...]

    @property
    def family(self) -> Family:
        """The description of the model's family."""
        return self.classes.family

    @property
    def dense_parts(self) -> list[dict[Part, str]]:
        """The parts of every block that stay dense, each with the reason."""
        return [self.family.dense_parts(self.model.config.get_text_config(), block.index) for block in self.blocks]

    @property
    def block_list(self) -> nn.ModuleList:
        """The model's own list of blocks."""
        return self.model.base_model.get_submodule(self.family.blocks)  # pyright: ignore[reportReturnType]

    def text_model(self, model: PreTrainedModel) -> nn.Module:
        """Return the module of a model of this class that holds the blocks and computes the rotary tables."""
        return model.base_model.get_submodule(self.family.blocks.rpartition(".")[0])

    @property
    def final_norm(self) -> Any:
        """The norm after the last block, or None if this model has none."""
        return self._optional(self.family.head.norm)

    @property
    def block_paths(self) -> list[str]:
        """The paths of the blocks in the whole model."""
        return [f"{self._base}{self.family.blocks}.{index}" for index in range(len(self.blocks))]

    @property
    def final_norm_path(self) -> str:
        """The path of the final norm in the whole model."""
        return f"{self._base}{self.family.head.norm}"

    @property
    def _base(self) -> str:
        return "" if self.model.base_model is self.model else f"{self.model.base_model_prefix}."

    @property
    def head_is_tied(self) -> bool:
        """Whether the head and the input embeddings share one tensor. The configuration may say otherwise."""
        head: Any = self.model.get_output_embeddings()
        embeddings: Any = self.model.get_input_embeddings()
        return head.weight.data_ptr() == embeddings.weight.data_ptr()

    def tail(self, device: torch.device) -> LogitHead:
        """Copy the modules after the last block to `device`."""
        return copy.deepcopy(self.own_tail).to(device)

    @property
    def own_tail(self) -> LogitHead:
        """The model's own modules after the last block, from the final norm to the logits."""
        head, config = self.family.head, self.model.config.get_text_config()
        return LogitHead(
            self.final_norm,
            self._projection,
            cast(nn.Linear, self.model.get_output_embeddings()),
            scale=scale_of(head, config),
            cap=cap_of(head, config),
        )

    def head(self, device: torch.device) -> LinearHead:
        """Return the map from the final norm to the logits before a soft cap, in at least float32 on `device`."""
        output = cast(nn.Linear, self.model.get_output_embeddings())
        matrix = at_least_float32(output.weight.detach().to(device))
        offset = matrix.new_zeros(len(matrix)) if output.bias is None else output.bias.detach().to(matrix)
        if self._projection is not None:
            matrix = matrix @ self._projection.weight.detach().to(matrix)
        scale = scale_of(self.family.head, self.model.config.get_text_config())
        return LinearHead(matrix, offset) if scale == 1 else LinearHead(matrix * scale, offset * scale)

    @property
    def _projection(self) -> Any:
        path = self.family.head.projection
        return None if path is None else self._optional(path)

    def _optional(self, path: str) -> Any:
        parent, _, name = path.rpartition(".")
        return getattr(self.model.base_model.get_submodule(parent), name)


_ALREADY = (
    "this model ({}) is already compressed; compressing it again would calibrate on its own errors. "
    "Start from the dense model (config.modegpt names it) with a higher sparsity."
)


def check_model_type(model_type: str) -> FamilyClasses:
    """Return the family of a transformers model_type.

    Raises:
        AlreadyCompressed: for a result of this package.
        UnsupportedModel: for a type that cannot be compressed, with the reason; for one that we do not know, with the
            list of those that we know.
        ImportError: if the installed transformers is too old for the family, or changed its attention; before any
            weights are loaded.
    """
    if is_compressed(model_type):
        raise AlreadyCompressed(_ALREADY.format(model_type))
    if (reason := REFUSED.get(model_type)) is not None:
        raise UnsupportedModel(f"model_type {model_type!r} {reason}; it cannot be compressed.")
    if (classes := family_of(model_type)) is None:
        raise UnsupportedModel(f"model_type {model_type!r} is not supported; known: {', '.join(DENSE_TYPES)}.")
    check_release(model_type, classes.family.since)
    if classes.attention_class is not None:
        check_attention(classes.attention_class.dense_class(), classes.family.attention.passed_on)
    return classes


def check_dense(config: Any) -> FamilyClasses:
    """Return the family of a dense model with this configuration.

    Raises:
        AlreadyCompressed, UnsupportedModel, ImportError: as `check_model_type`; also if a model with a text tower has
            one of another type than the family's.
    """
    if _is_narrow_stock(getattr(config, "modegpt", None)):
        raise AlreadyCompressed(_ALREADY.format(f"the layout stock of {config.model_type}"))
    classes = check_model_type(config.model_type)
    found, expected = config.get_text_config().model_type, classes.text_type
    if found != expected:
        raise UnsupportedModel(
            f"model_type {config.model_type!r} has a text tower of type {found!r}; it can be compressed only with one "
            f"of type {expected!r}."
        )
    return classes


def _is_narrow_stock(record: object) -> bool:
    """Return whether a record is of the layout stock with narrow parts, not only with fewer experts."""
    if not isinstance(record, dict):
        return False
    recipe, achieved = record.get("recipe"), record.get("achieved")
    if not isinstance(recipe, dict) or not isinstance(achieved, dict):
        return False
    return recipe.get("layout") == "stock" and bool(achieved.get("sparsity"))


def resolve(model: PreTrainedModel) -> Architecture:
    """Return the blocks of `model`, by role.

    Raises:
        AlreadyCompressed, UnsupportedModel: before anything is computed.
    """
    classes = check_dense(model.config)
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
    for name in classes.family.refused:
        if value := getattr(model.config.get_text_config(), name):
            raise UnsupportedModel(
                f"{type(model).__name__} has {name}={value!r}, which changes its blocks; expected {type(value)()!r}."
            )
    architecture = read_blocks(model, classes)
    if not architecture.blocks:
        raise UnsupportedModel(f"{type(model).__name__} has no decoder blocks.")
    for block in architecture.blocks:
        _check_projections(block)
    return architecture


def read_blocks(model: PreTrainedModel, classes: FamilyClasses) -> Architecture:
    """Read the blocks of a dense model, which may be on the meta device, without any check."""
    modules: Any = model.base_model.get_submodule(classes.family.blocks)
    blocks = tuple(
        _read_block(module, classes, index, model.config.get_text_config()) for index, module in enumerate(modules)
    )
    return Architecture(model, classes, blocks)


def _read_block(module: Any, classes: FamilyClasses, index: int, config: Any) -> Block:
    family = classes.family
    parts = family.parts(config, index)
    attention = module.get_submodule(family.attention.module) if "qk" in parts else None
    heads = config.num_attention_heads
    counts = {"heads": heads, "kv_heads": heads} if attention is None else count_heads(attention, family, config)
    return Block(
        module,
        classes,
        index,
        config,
        heads=counts["heads"],
        kv_heads=counts["kv_heads"],
        head_dim=0 if attention is None else getattr(attention, family.attention.head_dim),
        d_model=config.hidden_size,
        mlp_width=mlp_shape(module, family)[1],
        topology=topology_of(family.residual, config),
        multiplier=multiplier_of(family.residual, config),
        rotary=attention is not None and rotates(attention, family),
        parts=parts,
        uncut=tuple(part for part in family.uncut(config) if part in parts),
    )


def _check_projections(block: Block) -> None:
    experts = block.experts
    if experts is not None and (reason := experts.refusal) is not None:
        raise UnsupportedModel(f"block {block.index}: {reason}, so it cannot be compressed.")
    for projection in projections_of(block.module, block.family, block.parts):
        module: Any = block.module.get_submodule(projection.dense_path)
        expected = Conv1D if projection.storage.transposed else block.classes.linear_class
        if type(module) is not expected or module.weight.is_meta:
            state = ", without its weights in memory" if type(module) is expected else ""
            raise UnsupportedModel(
                f"block {block.index}: {projection.dense_path} is {type(module).__name__}{state}; expected a plain "
                f"{'nn.Linear' if expected is nn.Linear else expected.__name__}, loaded. Compress before adapters, "
                "quantisation and offloading."
            )
