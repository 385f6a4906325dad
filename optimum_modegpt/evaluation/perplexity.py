"""Compute the perplexity of a model on windows of token ids, which are scored independently."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimum_modegpt.errors import EvaluationError
from optimum_modegpt.progress import bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_BYTES = 256 * 2**20
"""Maximum size in bytes of the logits of one batch in float32, if the batch size is automatic."""
CHUNK_BYTES = 64 * 2**20
"""Maximum size in bytes of a float32 copy of logits while it is reduced to one number per position."""


@dataclass(frozen=True)
class Perplexity:
    """exp(mean nats per scored position), and the number of positions."""

    perplexity: float
    tokens: int


def perplexity(
    model: PreTrainedModel, windows: Tensor, *, batch_size: int | None = None, progress: bool = False
) -> Perplexity:
    """Compute exp of the mean negative log-likelihood in nats. A window of L tokens gives L − 1 predictions.

    The first token of a window (BOS, if the tokenizer adds one) is read but not scored.

    Args:
        model: the model, on the device to run it on.
        windows: token ids (windows, length).
        batch_size: windows per forward pass. None chooses by the size of the logits.
        progress: whether to show a progress bar.

    Raises:
        EvaluationError: the windows do not fit the model, or a result is not finite.
    """
    check_windows(model, windows)
    nats = 0.0
    with evaluating(model):
        for batch in batches(model, windows, batch_size, progress):
            nats += float(by_position(nats_of, targets(batch), logits_of(model, batch)).sum())
    tokens = windows[:, 1:].numel()
    return Perplexity(exponential(nats, tokens), tokens)


def exponential(nats: float, tokens: int) -> float:
    """Compute exp(nats / tokens), infinite beyond the largest float. Raise `EvaluationError` if nats are not finite."""
    if not math.isfinite(nats):
        raise EvaluationError(
            f"the model's loss on this text is {nats}. The weights or activations overflow: try another --dtype, and "
            "check that the folder is complete."
        )
    try:
        return math.exp(nats / tokens)
    except OverflowError:
        return math.inf


def context_of(model_config: Any) -> int | None:
    """Return the context length of a model in tokens; None if it has no limit."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


def check_windows(model: PreTrainedModel, windows: Tensor) -> None:
    """Raise an EvaluationError if windows are longer than the context or contain ids outside the vocabulary."""
    context = context_of(model.config)
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise EvaluationError(f"expected windows of shape (windows, length ≥ 2), found {tuple(windows.shape)}.")
    if context is not None and windows.shape[1] > context:
        raise EvaluationError(
            f"windows of {windows.shape[1]} tokens are longer than the model's context of {context}; lower the "
            "sequence length."
        )
    check_ids(model, windows)


def check_ids(model: PreTrainedModel, ids: Tensor) -> None:
    """Raise an EvaluationError if token ids are outside the model's vocabulary."""
    known = model.config.get_text_config().vocab_size
    if int(ids.min()) < 0 or int(ids.max()) >= known:
        raise EvaluationError(
            f"the text has token ids up to {int(ids.max())}, but the model's vocabulary has {known} tokens; use the "
            "tokenizer of the model."
        )


@contextmanager
def evaluating(*models: PreTrainedModel) -> Iterator[None]:
    """Put the models in evaluation mode and disable gradients within the context."""
    training = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        with torch.inference_mode():
            yield
    finally:
        for model, was_training in zip(models, training, strict=True):
            model.train(was_training)


def batches(model: PreTrainedModel, windows: Tensor, batch_size: int | None, progress: bool) -> Iterator[Tensor]:
    """Yield the windows in batches on the model's device."""
    if batch_size is None:
        row = windows.shape[1] * model.config.get_text_config().vocab_size * 4
        batch_size = min(32, max(1, LOGITS_BYTES // row))
    if batch_size < 1:
        raise EvaluationError(f"batch_size must be at least 1 or None, found {batch_size}.")
    for batch in bar(windows.split(batch_size), desc="evaluate", unit="batch", shown=progress):
        yield batch.to(model.device)


def logits_of(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Return the logits of all but the last position, (positions, vocabulary), in the model's dtype."""
    return model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)  # (batch · (length − 1), vocabulary)


def targets(batch: Tensor) -> Tensor:
    """Return the tokens that `logits_of` should predict, (positions,)."""
    return batch[:, 1:].flatten()


def by_position(reduce: Callable[..., Tensor], *columns: Tensor) -> Tensor:
    """Apply `reduce` to chunks of the positions, (positions,) in float64 on the CPU. Chunks are computed in float32."""
    return torch.cat([reduce(*chunk).cpu().double() for chunk in chunks_of(*columns)])


def chunks_of(*columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split the positions of all columns, of which the last are logits, into chunks of at most `CHUNK_BYTES`."""
    size = max(1, CHUNK_BYTES // (4 * columns[-1].shape[-1]))
    return zip(*(column.split(size) for column in columns), strict=True)


def nats_of(target: Tensor, logits: Tensor) -> Tensor:
    """Compute the negative log-likelihood of the targets in nats, (positions,), from logits (positions, vocabulary)."""
    return nn.functional.cross_entropy(logits.float(), target, reduction="none")
