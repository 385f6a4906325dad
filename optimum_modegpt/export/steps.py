"""The forward pass that an exported program repeats: a model, example inputs and an empty key-value cache."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from optimum_modegpt.errors import UnsupportedModel
from optimum_modegpt.kv_cache import cache_argument

EXAMPLE = (2, 4)
"""The sequences, and the tokens of each, with which a model is traced. Programs with a growing cache take others."""


@dataclass(frozen=True)
class Step:
    """A forward pass of a few tokens with a key-value cache.

    Attributes:
        module: the module to trace.
        inputs: its arguments, as an example. They include a cache.
        empty: the cache with which a program starts, for one sequence.
        shapes: the sizes of the inputs that may differ later, as torch.export takes them; None if all may.
    """

    module: Any
    inputs: dict[str, Any]
    empty: Any
    shapes: dict[str, Any] | None = None


def growing_step(model: PreTrainedModel) -> Step:
    """Return a step of two tokens after a prompt of `EXAMPLE`, with a cache that becomes longer.

    A size of 1 becomes fixed; all others may differ later.

    Raises:
        UnsupportedModel: layers have another state than keys and values.
    """
    from transformers.exporters.utils import decompose_for_generation

    ids = _example_tokens(model, EXAMPLE)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # otherwise the program would have no mask
    settings = GenerationConfig(do_sample=False, pad_token_id=0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    steps = decompose_for_generation(model, inputs, generation_config=settings, multi_token_decode=True)
    module, arguments = steps["decode"]
    cache = arguments[cache_argument(model)]
    _check_layers(model, cache.layers, DynamicLayer)
    empty = copy.deepcopy(cache)
    for layer in empty.layers:
        layer.keys, layer.values = layer.keys[:1, :, :0].cpu(), layer.values[:1, :, :0].cpu()
    return Step(module, arguments, empty)


@torch.no_grad()
def fixed_step(model: PreTrainedModel, length: int, at_once: int) -> Step:
    """Return a step of up to `at_once` tokens of one sequence, with a cache of `length` tokens.

    Layers with a sliding window also get `length` tokens. The program masks the tokens outside of the window.

    Raises:
        UnsupportedModel: layers have another state than keys and values.
    """
    from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

    cache, name = StaticCache(config=model.config, max_cache_len=length), cache_argument(model)
    _check_layers(model, cache.layers, StaticLayer)
    cache.layers[:] = [StaticLayer(length) for _ in cache.layers]
    ids = _example_tokens(model, (1, EXAMPLE[1]))
    inputs: dict[str, Any] = {"input_ids": ids}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.arange(ids.shape[1], device=ids.device)[None]
    shapes: dict[str, Any] = {key: {1: Dim.DYNAMIC(min=1, max=at_once)} for key in inputs}
    model(**inputs, **{name: cache}, use_cache=True)  # the first keys and values give a layer its widths
    cache.reset()
    register_cache_pytrees_for_model(model)
    shapes[name] = [None] * len(tree_leaves(cache))
    return Step(model, inputs | {name: cache, "use_cache": True, "return_dict": True}, copy.deepcopy(cache), shapes)


def _example_tokens(model: PreTrainedModel, shape: tuple[int, int]) -> Tensor:
    ids = torch.arange(math.prod(shape), device=model.device).view(shape)
    return ids % model.config.get_text_config().vocab_size


def _check_layers(model: PreTrainedModel, layers: Collection[Any], expected: type) -> None:
    """Check that a cache holds keys and values only.

    Raises:
        UnsupportedModel: layers without softmax attention have a state, which is not empty before the first token.
    """
    for index, layer in enumerate(layers):
        if not isinstance(layer, expected):
            raise UnsupportedModel(
                f"block {index} of {type(model).__name__} has a {type(layer).__name__} as its cache; expected keys and "
                "values of all tokens. Export the model to dense."
            )
