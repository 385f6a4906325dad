"""Measure the difference between the predictions of a model and a reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from optimum_modegpt.errors import EvaluationError
from optimum_modegpt.evaluation.perplexity import (
    batches,
    by_position,
    check_windows,
    evaluating,
    exponential,
    logits_of,
    nats_of,
    targets,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PROBE = "The Café's 2,048 tokens: naïve\tΩmega\n\n  def f(x): return x**2  # 東京 🙂"
"""Text with letters of both cases, accents, digits, white space, symbols and other scripts, to compare tokenizers."""


@dataclass(frozen=True)
class Fidelity:
    """Results of a model and its reference on the same tokens."""

    perplexity: float
    reference_perplexity: float
    kl: float
    """Mean KL(reference ‖ model) of the next-token distributions, in nats per position."""
    top1_agreement: float
    """Fraction of positions at which both models have the same most likely token."""
    tokens: int


def fidelity(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    windows: Tensor,
    *,
    batch_size: int | None = None,
    progress: bool = False,
) -> Fidelity:
    """Compute both perplexities, the mean KL divergence (exact, over the whole vocabulary) and the top-1 agreement.

    Arguments and errors are those of `perplexity`. It also raises `EvaluationError` if the vocabularies differ in size.
    """
    for each in (model, reference):
        check_windows(each, windows)
    check_vocabularies(model, reference)
    nats = reference_nats = kl = agreeing = 0.0
    with evaluating(model, reference):
        for batch in batches(model, windows, batch_size, progress):
            ours = logits_of(model, batch)
            theirs = logits_of(reference, batch.to(reference.device)).to(ours.device)
            nats += float(by_position(nats_of, targets(batch), ours).sum())
            reference_nats += float(by_position(nats_of, targets(batch), theirs).sum())
            kl += float(by_position(divergence, theirs, ours).sum())
            agreeing += float(by_position(agreement, theirs, ours).sum())
    if not math.isfinite(kl):
        raise EvaluationError(f"the divergence from the reference is {kl}: logits are not finite. Try another --dtype.")
    tokens = windows[:, 1:].numel()
    return Fidelity(
        perplexity=exponential(nats, tokens),
        reference_perplexity=exponential(reference_nats, tokens),
        kl=kl / tokens,
        top1_agreement=agreeing / tokens,
        tokens=tokens,
    )


def check_vocabularies(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    """Raise an EvaluationError if the vocabularies of two models differ in size."""
    ours, theirs = model.config.get_text_config().vocab_size, reference.config.get_text_config().vocab_size
    if ours != theirs:
        raise EvaluationError(
            f"the model predicts {ours} tokens, the reference {theirs}; only models with one vocabulary can be "
            "compared."
        )


def check_tokenizers(ours: Any, theirs: Any) -> None:
    """Raise an EvaluationError if the vocabularies of two tokenizers differ."""
    if different := _different_tokens(ours.get_vocab(), theirs.get_vocab()):
        raise EvaluationError(
            f"the tokenizers of model and reference differ in {different} tokens of their vocabularies, so the models "
            "cannot be given the same tokens. Compare a model with the one it was compressed from. If that was "
            "done with a foreign tokenizer, name it: --tokenizer NAME --allow-foreign-tokenizer."
        )


def tokenizer_differences(own: Any, other: Any) -> list[str]:
    """List in words how `other` differs from a model's own tokenizer: vocabulary, special tokens, chat template, ids.

    A padding token is compared only if the model's own tokenizer has one: users often add it later, and no text
    contains it.
    """
    own_vocabulary, vocabulary = own.get_vocab(), dict(other.get_vocab())
    own_special, special = own.special_tokens_map, dict(other.special_tokens_map)
    if "pad_token" not in own_special:
        padding = special.pop("pad_token", None)
        if padding not in own_vocabulary:
            vocabulary.pop(padding, None)
    found = []
    if different := _different_tokens(own_vocabulary, vocabulary):
        found.append(f"{different} tokens of the vocabulary")
    for name in sorted(own_special.keys() | special.keys()):
        expected, given = _with_id(own, own_special.get(name)), _with_id(other, special.get(name))
        if given != expected:
            found.append(f"{name} {given} instead of {expected}")
    if getattr(own, "chat_template", None) != getattr(other, "chat_template", None):
        found.append("the chat template")
    if not found and own(PROBE)["input_ids"] != other(PROBE)["input_ids"]:
        found.append("the way in which it splits a text into tokens")
    return found


def _different_tokens(ours: dict[str, int], theirs: dict[str, int]) -> int:
    """Count the tokens that two vocabularies do not both have with the same id."""
    return len(dict(ours.items() ^ theirs.items()))


def _with_id(tokenizer: Any, token: str | None) -> str:
    return "none" if token is None else f"{token!r} (id {tokenizer.convert_tokens_to_ids(token)})"


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """Compute KL(reference ‖ model) in nats, (positions,), from logits of shape (positions, vocabulary)."""
    expected = reference.float().log_softmax(dim=-1)
    return (expected.exp() * (expected - logits.float().log_softmax(dim=-1))).sum(dim=-1)


def agreement(reference: Tensor, logits: Tensor) -> Tensor:
    """Return whether the most likely tokens agree, (positions,), from logits of shape (positions, vocabulary)."""
    return reference.argmax(dim=-1) == logits.argmax(dim=-1)
