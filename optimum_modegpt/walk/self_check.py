"""The self-check: a finished model answers the same with its key-value cache as without, and can be reloaded."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from optimum_modegpt.errors import NumericalError, UnsupportedModel
from optimum_modegpt.kv_cache import cache_argument, cache_of

SAME_TOKENS = 64
"""Tokens whose logits are compared between a model of a stock class and the compressed model it was made from."""
PREFILL, STEPS = 8, 4
"""Tokens of the prefill, and cached steps of one token after it."""
SMALLEST_TOLERANCE = 1e-3
ROUNDINGS = 32
"""The tolerance is this many times the rounding error of the model's dtype. Correct models of up to 30 blocks were
measured at up to 10 times it in 16 bits, and at 7e-6 in float32. Faults of the cache were measured from 0.05 on, which
this tolerance can hide in 16 bits, so the first blocks of such a model are compared in float32 as well."""
FIRST_BLOCKS = 2
"""Blocks that are compared in float32."""
WEIGHT_ROUNDINGS = 2
"""The tolerance between a stock class and a compressed one in float32, in rounding errors of the dtype of the weights:
the softmax scale is rounded with the weights that it is folded into."""


@dataclass(frozen=True)
class SelfCheck:
    """The extent and the result of a self-check.

    Attributes:
        tokens: length of the text, prefill and cached steps together.
        difference: largest relative difference at one position between cached and uncached logits, each centred over
            the vocabulary.
        tolerance: largest difference that passes.
        seconds: time that the check took.
    """

    tokens: int
    difference: float
    tolerance: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"self-check: logits of {self.tokens} tokens are finite, and equal with and without the key-value cache "
            f"up to {self.difference:.1e} (relative)."
        )


@torch.no_grad()
def self_check(model: PreTrainedModel, tokens: Tensor) -> SelfCheck:
    """Compare a prefill and cached steps with one uncached pass over the same tokens.

    The first blocks of a compressed model in 16 bits are compared in float32 too: there rounding hides no fault.

    Args:
        model: a causal language model in evaluation mode.
        tokens: token ids (length,), of which at most `PREFILL + STEPS` are used.

    Raises:
        NumericalError: if logits are not finite.
        UnsupportedModel: if the two differ by more than rounding, or the outputs have no key-value cache.
    """
    start = time.perf_counter()
    embeddings: Any = model.get_input_embeddings()
    ids = tokens[None, : PREFILL + STEPS].to(embeddings.weight.device)  # (1, length)
    uncached = model(input_ids=ids, use_cache=False).logits
    if not uncached.isfinite().all():
        raise NumericalError("self-check: the model's logits are not finite.")
    tolerance = tolerance_of(uncached.dtype)
    name = cache_argument(model)
    cached = in_steps(lambda part, **arguments: model(input_ids=part, **arguments), ids, name)
    difference = _compare(torch.cat([output.logits for output in cached], dim=1), uncached, tolerance)
    family = getattr(model.config, "family", None)
    if family is not None and uncached.dtype.itemsize < torch.float32.itemsize and _is_plain(model):
        with _first_blocks(model.base_model, family.blocks) as base:
            _check_in_float32(base, embeddings(ids).float(), name)
    return SelfCheck(ids.shape[1], difference, tolerance, time.perf_counter() - start)


def in_steps(run: Callable[..., Any], inputs: Tensor, cache_name: str) -> list[Any]:
    """Return the outputs of a prefill and of a cached step for each later position of `inputs` (1, length, ...)."""
    prefill = max(1, inputs.shape[1] - STEPS)
    outputs = [run(inputs[:, :prefill], use_cache=True)]
    for position in range(prefill, inputs.shape[1]):
        cache = cache_of(outputs[-1])
        if cache is None:
            raise UnsupportedModel(
                f"self-check: the model's output has no key-value cache, only {', '.join(outputs[-1].keys())}. "
                "Set use_cache=True in its configuration, or update optimum-modegpt."
            )
        outputs.append(run(inputs[:, position : position + 1], **{cache_name: cache}, use_cache=True))
    return outputs


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the largest relative difference that rounding explains in a model of this dtype."""
    return max(SMALLEST_TOLERANCE, ROUNDINGS * torch.finfo(dtype).eps)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest ‖found − expected‖ / ‖expected‖ of all positions, each centred over its last dimension."""
    return float(_relative_differences(found, expected).max())


def _relative_differences(found: Tensor, expected: Tensor) -> Tensor:
    """Return ‖found − expected‖ / ‖expected‖ of every position, each centred over its last dimension."""
    found = found.float() - found.float().mean(-1, keepdim=True)
    expected = expected.float() - expected.float().mean(-1, keepdim=True)
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)


def _compare(found: Tensor, expected: Tensor, tolerance: float) -> float:
    """Return the relative difference.

    Raises:
        UnsupportedModel: if it is above the tolerance.
    """
    difference = relative_difference(found, expected)
    if not difference <= tolerance:
        raise UnsupportedModel(
            f"self-check: results with the key-value cache differ from those without by {difference:.1e} (relative), "
            f"allowed are {tolerance:.1e}. The model would generate nonsense. Please report this with the versions of "
            "torch and transformers."
        )
    return difference


@torch.no_grad()
def check_same(stock: PreTrainedModel, compressed: PreTrainedModel, tokens: Tensor) -> None:
    """Check that a model of a stock class has the same logits as the compressed model that it was made from.

    In 16 bits, rounding can make a router choose other experts for some tokens, so the median of all positions counts.
    The first blocks of such models are compared in float32 too: there rounding hides no fault.

    Args:
        stock, compressed: causal language models in evaluation mode.
        tokens: token ids (length,), of which at most `SAME_TOKENS` are used.

    Raises:
        UnsupportedModel: they differ by more than rounding.
    """
    embeddings: Any = stock.get_input_embeddings()
    ids = tokens[None, :SAME_TOKENS].to(embeddings.weight.device)
    expected = compressed(input_ids=ids, use_cache=False).logits
    rounding, exact = torch.finfo(expected.dtype).eps, expected.dtype.itemsize >= torch.float32.itemsize
    differences = _relative_differences(stock(input_ids=ids, use_cache=False).logits, expected)
    _check_difference(stock, differences.max() if exact else differences.median(), ROUNDINGS * rounding)
    if exact:
        return
    family: Any = compressed.config.family  # pyright: ignore[reportAttributeAccessIssue]
    embedded, states = embeddings(ids).float(), []
    for model in (stock, compressed):
        with _first_blocks(model.base_model, family.blocks) as base:
            states.append(_in_float32(base)(embedded, use_cache=False).last_hidden_state)
    _check_difference(stock, _relative_differences(*states).median(), WEIGHT_ROUNDINGS * rounding)


def _check_difference(stock: PreTrainedModel, found: Tensor, tolerance: float) -> None:
    """Raise an `UnsupportedModel` if the difference of two results is above `tolerance` and the smallest tolerance."""
    difference, tolerance = float(found), max(SMALLEST_TOLERANCE, tolerance)
    if not difference <= tolerance:
        raise UnsupportedModel(
            f"self-check: {type(stock).__name__} differs from the compressed model by {difference:.1e} (relative), "
            f"allowed are {tolerance:.1e}. Use layout='per_layer', and please report this with the version of "
            "transformers."
        )


def _is_plain(model: nn.Module) -> bool:
    """Return whether all parameters are ordinary floating-point tensors; quantised ones cannot be converted."""
    return all(type(one) is nn.Parameter and one.is_floating_point() for one in model.parameters())


@contextmanager
def _first_blocks(base: Any, path: str) -> Iterator[Any]:
    """Leave only the first blocks in the base model while the context is open."""
    parent, _, name = path.rpartition(".")
    owner = base.get_submodule(parent)
    blocks = getattr(owner, name)
    setattr(owner, name, blocks[:FIRST_BLOCKS])
    try:
        yield base
    finally:
        setattr(owner, name, blocks)


def _check_in_float32(base: Any, embedded: Tensor, cache_name: str) -> None:
    """Compare cached and uncached hidden states of a base model without a head, from embedded tokens."""
    run = _in_float32(base)
    cached = torch.cat([output.last_hidden_state for output in in_steps(run, embedded, cache_name)], dim=1)
    _compare(cached, run(embedded, use_cache=False).last_hidden_state, SMALLEST_TOLERANCE)


def _in_float32(base: Any) -> Callable[..., Any]:
    """Return the forward pass of a base model without a head in float32, from embedded tokens."""
    embeddings = base.get_input_embeddings().weight  # not used, and large
    tensors = {name: one.float() for name, one in base.named_parameters() if one is not embeddings}

    def run(part: Tensor, **arguments: Any) -> Any:
        return functional_call(base, tensors, kwargs={"inputs_embeds": part, **arguments})

    return run


def check_reloads(model: PreTrainedModel) -> None:
    """Check that the model that a saved configuration builds has the same tensors, by name and shape.

    Raises:
        UnsupportedModel: with the tensors that differ.
    """
    config: Any = type(model.config).from_dict(json.loads(model.config.to_json_string(use_diff=False)))
    with torch.device("meta"):
        rebuilt = type(model)(config)
    own, expected, different = model.state_dict(), rebuilt.state_dict(), []
    for name in sorted(own.keys() | expected.keys()):
        if name not in own or name not in expected or own[name].shape != expected[name].shape:
            different.append(name)
    if different:
        raise UnsupportedModel(
            f"self-check: a reload would not find the tensors of this model: {', '.join(different[:5])}."
        )
