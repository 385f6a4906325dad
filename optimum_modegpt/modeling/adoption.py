"""Turn a model object into one of a compressed class, in place: `become(model, built(model, ...))`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

MODULE_STATE = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")
"""Attributes of modules that are a choice of the caller, not of the class."""


def built(
    model: PreTrainedModel, model_class: type[PreTrainedModel], config: Any, replacements: Mapping[str, nn.Module]
) -> PreTrainedModel:
    """Build a `model_class` from the tensors of `model` and of `replacements`; `model` does not change.

    The new object is built from its configuration on the meta device and filled strictly, exactly as a reload is.
    Tensors are shared, not copied.

    Raises:
        RuntimeError: the new class ties tensors that are separate in `model`, and would lose one of them.
    """
    config._attn_implementation = model.config._attn_implementation
    config._experts_implementation = model.config._experts_implementation
    with torch.device("meta"):
        new = model_class(config)
    tensors = dict(_tensors(model, replacements))
    new.load_state_dict(tensors, strict=True, assign=True)
    new.tie_weights()
    _share_bias(new, tensors)
    if lost := [name for name, each in new.state_dict().items() if each.data_ptr() != tensors[name].data_ptr()]:
        raise RuntimeError(f"{model_class.__name__} replaced {', '.join(lost)} when it tied its weights.")
    dense = dict(model.named_modules())
    for path, target in new.named_modules():
        if path in dense:
            _carry_over(dense[path], target)
        else:  # a projection that the dense model stores together with others
            start = next(start for start in replacements if path.startswith(f"{start}."))
            _carry_over(replacements[start].get_submodule(path.removeprefix(f"{start}.")), target)
            target.training = dense[start].training
    new.generation_config = model.generation_config
    return new


def become(model: PreTrainedModel, new: PreTrainedModel) -> None:
    """Give the object `model` the class and the state of `new`."""
    model.__class__, model.__dict__ = new.__class__, new.__dict__


def _tensors(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        if not any(name.startswith(f"{path}.") for path in replacements):
            yield name, tensor
    for path, replacement in replacements.items():
        for name, tensor in replacement.state_dict().items():
            yield f"{path}.{name}", tensor


def _share_bias(new: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Share the bias of the head again. transformers copies it when it ties the head's weight."""
    head = new.get_output_embeddings()
    for name, parameter in new.named_parameters():
        if parameter is getattr(head, "bias", None):
            parameter.data = tensors[name]


def _carry_over(source: nn.Module, target: nn.Module) -> None:
    """Copy the state that no state dict contains: derived buffers such as rotary tables, frozen parameters, modes."""
    for name in target._non_persistent_buffers_set:
        setattr(target, name, getattr(source, name))
    known = dict(source.named_parameters(recurse=False))
    for name, parameter in target.named_parameters(recurse=False):
        if name in known:  # the class may have a bias that the dense one has not
            parameter.requires_grad_(known[name].requires_grad)
    for name in MODULE_STATE:
        if name in vars(source):
            setattr(target, name, getattr(source, name))
