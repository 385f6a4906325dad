"""Compare a model with the one it should replace, prompt by prompt: predictions, text, speed and memory.

For each prompt, the reference generates a greedy continuation. Both models then read prompt and continuation in one
pass. A position is the prediction of a token, from the second one of the prompt on. KL divergence and agreements are
means over all positions. Perplexities are of the prompts only, because text by the reference would favour the
reference. Each model also generates its own greedy continuation, which shows the first difference and the latency.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from itertools import zip_longest
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from optimum_modegpt.comparison.greedy import Continuation, continuation
from optimum_modegpt.comparison.prompts import EncodedPrompt, Prompt, encode
from optimum_modegpt.comparison.records import Comparison, Costs, Distances, PromptComparison, Quantiles, Written
from optimum_modegpt.errors import EvaluationError
from optimum_modegpt.evaluation.fidelity import agreement, check_vocabularies, divergence
from optimum_modegpt.evaluation.perplexity import (
    by_position,
    check_ids,
    context_of,
    evaluating,
    logits_of,
    nats_of,
    targets,
)
from optimum_modegpt.progress import bar
from optimum_modegpt.quantities import dtype_name
from optimum_modegpt.report import count_parameters

logger = logging.getLogger(__name__)

WARM_UP_TOKENS = 8


def compare(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 48,
    on_record: Callable[[PromptComparison], None] | None = None,
    progress: bool = False,
) -> Comparison:
    """Compare `model` with `reference` on each prompt. The docstring of the module defines the positions.

    Args:
        model: the model, on the device to run it on. Its latency is measured there.
        reference: the reference, on the same device or another one.
        tokenizer: the tokenizer of both models.
        prompts: texts, or conversations for the tokenizer's chat template. A prompt that is too long for the context is
            truncated at its beginning, with a warning.
        max_new_tokens: maximum length of each continuation. The model may end the text earlier.
        on_record: called with each record as soon as it is complete.
        progress: whether to show a progress bar.

    Raises:
        EvaluationError: the prompts or the models cannot be compared, or a result is not finite.
    """
    check_vocabularies(model, reference)
    encoded = _encode(prompts, tokenizer, (model, reference), max_new_tokens)
    setting = _setting(model, reference, max_new_tokens)
    records: list[PromptComparison] = []
    measured: list[Distances] = []
    ours: list[Continuation] = []
    theirs: list[Continuation] = []
    with evaluating(model, reference):
        pairs = _continuations(model, reference, encoded, max_new_tokens)
        shown = bar(encoded, desc="compare", unit="prompt", shown=progress)
        for prompt, (own, other) in zip(shown, pairs, strict=True):
            ours.append(own)
            theirs.append(other)
            measured.append(distances(model, reference, prompt.ids, other.tokens))
            records.append(_record(len(records), prompt, tokenizer, own, other, measured[-1]))
            if on_record is not None:
                on_record(records[-1])
    return _comparison(records, measured, _costs(model, ours), _costs(reference, theirs), setting)


def _setting(model: PreTrainedModel, reference: PreTrainedModel, max_new_tokens: int) -> dict[str, Any]:
    return {
        "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "max_new_tokens": max_new_tokens,
        "model_device": str(model.device),
        "model_dtype": dtype_name(model.dtype),
        "reference_device": str(reference.device),
        "reference_dtype": dtype_name(reference.dtype),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _continuations(
    model: PreTrainedModel, reference: PreTrainedModel, prompts: Sequence[EncodedPrompt], max_new_tokens: int
) -> Iterator[tuple[Continuation, Continuation]]:
    """Yield the model's and the reference's continuation of each prompt. The two take turns in running first."""
    ends: Any = getattr(reference.generation_config, "eos_token_id", None)
    for each in (model, reference):  # not measured: the first calls allocate memory and select kernels
        continuation(each, prompts[0].ids, min(WARM_UP_TOKENS, max_new_tokens), ends)
    for index, prompt in enumerate(prompts):
        if index % 2:
            theirs = continuation(reference, prompt.ids, max_new_tokens, ends)
            ours = continuation(model, prompt.ids, max_new_tokens, ends)
        else:
            ours = continuation(model, prompt.ids, max_new_tokens, ends)
            theirs = continuation(reference, prompt.ids, max_new_tokens, ends)
        yield ours, theirs


def _comparison(
    records: Sequence[PromptComparison],
    measured: Sequence[Distances],
    costs: Costs,
    reference_costs: Costs,
    setting: dict[str, Any],
) -> Comparison:
    """Summarise the prompts. Each position counts once."""
    found = Distances(*map(torch.cat, zip(*measured, strict=True)))
    kl, perplexity, reference_perplexity, ratio = found.of_prompt()
    return Comparison(
        **found.means(),
        prompts=len(records),
        kl_of_prompts=kl,
        kl_of_continuations=float(found.kl[~found.in_prompt].mean()),
        perplexity=perplexity,
        reference_perplexity=reference_perplexity,
        perplexity_ratio=ratio,
        equal_continuations=sum(record.parting_token is None for record in records),
        costs=costs,
        reference_costs=reference_costs,
        setting=setting,
        records=tuple(records),
    )


def distances(model: PreTrainedModel, reference: PreTrainedModel, prompt: Tensor, answer: Tensor) -> Distances:
    """Compare the predictions of both models on the ids of a text, from its second token on.

    The caller must set evaluation mode and inference mode. `prompt` and `answer` have the shape (tokens,). Raise
    `EvaluationError` if logits are not finite.
    """
    batch = torch.cat((prompt, answer))[None].to(model.device)
    ours = logits_of(model, batch)
    theirs = logits_of(reference, batch.to(reference.device)).to(ours.device)
    found = Distances(
        kl=by_position(divergence, theirs, ours),
        top1=by_position(agreement, theirs, ours),
        top5=by_position(_overlap, theirs, ours),
        nats=by_position(nats_of, targets(batch), ours),
        reference_nats=by_position(nats_of, targets(batch), theirs),
        in_prompt=torch.arange(1, batch.shape[1]) < len(prompt),
    )
    if not found.kl.isfinite().all():
        raise EvaluationError("the divergence from the reference is not finite: logits overflow. Try another --dtype.")
    return found


def _overlap(reference: Tensor, logits: Tensor) -> Tensor:
    """Return the share of the reference's most likely tokens among the model's, (positions,)."""
    top = min(5, logits.shape[-1])
    first = reference.topk(top, dim=-1).indices  # (positions, top)
    second = logits.topk(top, dim=-1).indices
    return (first[:, :, None] == second[:, None, :]).sum(dim=(1, 2)) / top


def first_difference(first: Sequence[Any], second: Sequence[Any]) -> int | None:
    """Return the index of the first item in which two sequences differ, or None if they are equal."""
    for index, (one, other) in enumerate(zip_longest(first, second)):
        if one != other:
            return index
    return None


def _encode(
    prompts: Sequence[Prompt], tokenizer: Any, models: Iterable[PreTrainedModel], max_new_tokens: int
) -> list[EncodedPrompt]:
    """Encode the prompts. Truncate those that do not fit both contexts together with their continuation."""
    if not prompts:
        raise EvaluationError("expected at least one prompt, found none.")
    encoded = [encode(prompt, tokenizer, f"prompt {number}") for number, prompt in enumerate(prompts, 1)]
    context = sys.maxsize
    for model in models:
        check_ids(model, torch.cat([prompt.ids for prompt in encoded]))
        own = context_of(model.config)
        context = min(context, own or context)
    room = context - max_new_tokens
    if room < 1:
        raise EvaluationError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in a context of {context} tokens; lower it."
        )
    long = [prompt for prompt in encoded if len(prompt.ids) > room]
    for prompt in long:
        prompt.cut_tokens, prompt.ids = len(prompt.ids) - room, prompt.ids[-room:]
    if long:
        logger.warning(
            "%d of %d prompts are longer than the %d tokens that the context holds in addition to the continuation; "
            "they were truncated to their last %d tokens.",
            *(len(long), len(encoded), room, room),
        )
    return encoded


def _record(
    index: int, prompt: EncodedPrompt, tokenizer: Any, ours: Continuation, theirs: Continuation, found: Distances
) -> PromptComparison:
    kl, perplexity, reference_perplexity, ratio = found.of_prompt()
    model = _written(tokenizer, ours, perplexity)
    reference = _written(tokenizer, theirs, reference_perplexity)
    of_continuation = found.kl[~found.in_prompt]
    return PromptComparison(
        **found.means(),
        index=index,
        prompt=prompt.text,
        prompt_tokens=len(prompt.ids),
        cut_tokens=prompt.cut_tokens,
        perplexity_ratio=ratio,
        kl_of_prompt=kl,
        kl_of_continuation=float(of_continuation.mean()),
        kl_by_token=tuple(of_continuation.tolist()),
        parting_token=first_difference(ours.tokens.tolist(), theirs.tokens.tolist()),
        parting_character=first_difference(model.continuation, reference.continuation),
        model=model,
        reference=reference,
    )


def _written(tokenizer: Any, new: Continuation, perplexity: float | None) -> Written:
    return Written(
        perplexity=perplexity,
        continuation=tokenizer.decode(new.tokens, skip_special_tokens=True),
        tokens=len(new.tokens),
        first_token_seconds=new.first_token_seconds,
        seconds_per_token=new.seconds_per_token,
    )


def _costs(model: PreTrainedModel, generated: Sequence[Continuation]) -> Costs:
    weights = model.get_memory_footprint()
    working, first_token, per_token = [], [], []
    for each in generated:
        first_token.append(each.first_token_seconds)
        if each.working_bytes is not None:
            working.append(each.working_bytes)
        if each.seconds_per_token is not None:
            per_token.append(each.seconds_per_token)
    return Costs(
        parameters=count_parameters(model),
        weight_bytes=weights,
        cache_bytes_per_token=generated[0].cache_bytes_per_token,
        peak_device_bytes=weights + max(working) if working else None,
        first_token=_quantiles(first_token),
        per_token=_quantiles(per_token) if per_token else None,
    )


def _quantiles(values: Sequence[float]) -> Quantiles:
    median, p95 = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95], dtype=torch.float64))
    return Quantiles(float(median), float(p95))
