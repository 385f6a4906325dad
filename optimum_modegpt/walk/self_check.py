"""The self-check: a finished model answers the same with its key-value cache as without, and can be reloaded."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_modegpt.errors import NumericalError, UnsupportedModel
from optimum_modegpt.kv_cache import cache_argument, cache_of

PREFILL, STEPS = 8, 4
"""Tokens of the prefill, and cached steps of one token after it."""
SMALLEST_TOLERANCE = 1e-3
ROUNDINGS = 32
"""The tolerance is this many times the rounding error of the model's dtype. Correct models of up to 30 blocks were
measured at up to 10 times it in 16 bits (60 times in float32, which is far below 1e-3); a cache that loses its content
differs by more than 1."""


@dataclass(frozen=True)
class SelfCheck:
    """What a self-check compared.

    Attributes:
        tokens: length of the text, prefill and cached steps together.
        difference: largest relative difference at one position between cached and uncached logits, each centred over
            the vocabulary; None for a model without a key-value cache.
        tolerance: largest difference that passes.
        seconds: time that the check took.
    """

    tokens: int
    difference: float | None
    tolerance: float
    seconds: float

    def __str__(self) -> str:
        finite = f"self-check: logits of {self.tokens} tokens are finite"
        if self.difference is None:
            return f"{finite}; the model has no key-value cache to compare."
        return f"{finite}, and equal with and without the key-value cache up to {self.difference:.1e} (relative)."


@torch.no_grad()
def self_check(model: PreTrainedModel, tokens: Tensor) -> SelfCheck:
    """Compare a prefill and cached steps with one uncached pass over the same tokens.

    Args:
        model: a causal language model in evaluation mode.
        tokens: token ids (length,), of which at most `PREFILL + STEPS` are used.

    Raises:
        NumericalError: if logits are not finite.
        UnsupportedModel: if the two differ by more than rounding: generation would be wrong.
    """
    start = time.perf_counter()
    embeddings: Any = model.get_input_embeddings()
    ids = tokens[None, : PREFILL + STEPS].to(embeddings.weight.device)  # (1, length)
    uncached = model(input_ids=ids, use_cache=False).logits
    if not uncached.isfinite().all():
        raise NumericalError("self-check: the model's logits are not finite.")
    tolerance = max(SMALLEST_TOLERANCE, ROUNDINGS * torch.finfo(uncached.dtype).eps)
    cached = _cached_logits(model, ids)
    difference = None if cached is None else _relative_difference(cached, uncached)
    if difference is not None and not difference <= tolerance:
        raise UnsupportedModel(
            f"self-check: logits with the key-value cache differ from those without by {difference:.1e} (relative), "
            f"allowed are {tolerance:.1e}. The model would generate nonsense. Please report this with the versions of "
            "torch and transformers."
        )
    return SelfCheck(ids.shape[1], difference, tolerance, time.perf_counter() - start)


def _cached_logits(model: PreTrainedModel, ids: Tensor) -> Tensor | None:
    """Return the logits (1, length, vocabulary) of a prefill and of one cached step for each token after it."""
    prefill = max(1, ids.shape[1] - STEPS)
    outputs = [model(input_ids=ids[:, :prefill], use_cache=True)]
    for position in range(prefill, ids.shape[1]):
        cache = cache_of(outputs[-1])
        if cache is None:
            return None
        outputs.append(
            model(input_ids=ids[:, position : position + 1], **{cache_argument(model): cache}, use_cache=True)
        )
    return torch.cat([output.logits for output in outputs], dim=1)


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest ‖found − expected‖ / ‖expected‖ of all positions, each centred over the vocabulary."""
    found, expected = (logits.float() - logits.float().mean(-1, keepdim=True) for logits in (found, expected))
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)).max())


def check_reloads(model: PreTrainedModel) -> None:
    """Check that the model that a saved configuration builds has the same tensors, by name and shape.

    Raises:
        UnsupportedModel: with the tensors that differ.
    """
    config: Any = type(model.config).from_dict(json.loads(model.config.to_json_string(use_diff=False)))
    with torch.device("meta"):
        rebuilt = type(model)(config)
    shapes = [{name: tuple(tensor.shape) for name, tensor in one.state_dict().items()} for one in (model, rebuilt)]
    if different := sorted(name for name, _ in shapes[0].items() ^ shapes[1].items()):
        raise UnsupportedModel(
            f"self-check: a reload would not find the tensors of this model: {', '.join(dict.fromkeys(different[:5]))}."
        )
