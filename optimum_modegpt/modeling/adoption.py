"""Makes a model object one of a compressed class, in place."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


def adopt(model: PreTrainedModel, model_class: type[PreTrainedModel], config: Any) -> None:
    """Turns `model`, whose blocks are already compressed, into a `model_class`; the caller's object stays the same.

    The new object is built from its configuration on the meta device and filled strictly, exactly as a reload is, so
    what works here works from disk. Tensors are moved over, not copied.
    """
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        new = model_class(config)
    new.load_state_dict(model.state_dict(), strict=True, assign=True)
    new.tie_weights()
    for name, buffer in dict(model.named_buffers()).items():
        owner, _, leaf = name.rpartition(".")
        target = new.get_submodule(owner)
        if leaf in target._non_persistent_buffers_set:  # the rotary table: derived, so in no state dict
            setattr(target, leaf, buffer)
    for name, parameter in model.named_parameters():
        new.get_parameter(name).requires_grad_(parameter.requires_grad)
    new.generation_config = model.generation_config
    new.train(model.training)
    model.__class__ = new.__class__
    model.__dict__ = new.__dict__
