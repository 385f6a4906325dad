"""Compare a model with the one it should replace, prompt by prompt: predictions, text, speed and memory.

For each prompt, the reference generates a greedy continuation. Both models then read the same tokens, prompt and
continuation, in one pass (teacher forcing). A position is the prediction of a token from all tokens before it: the
tokens of the prompt from the second one on, and all of the continuation. KL divergence and agreements are means over
all positions. Perplexities are over the positions of the prompts only, because text by the reference would favour the
reference. Each model also generates its own greedy continuation at batch size 1. The two show the first difference and
give the latency.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from optimum_modegpt.comparison.greedy import Continuation, continuation, stops_of
from optimum_modegpt.comparison.prompts import EncodedPrompt, Prompt, encode
from optimum_modegpt.comparison.records import Comparison, Costs, Distances, PromptComparison, Quantiles, Written
from optimum_modegpt.errors import EvaluationError
from optimum_modegpt.evaluation.fidelity import agreement, check_vocabularies, divergence
from optimum_modegpt.evaluation.perplexity import (
    by_position,
    check_ids,
    evaluating,
    exponential,
    logits_of,
    nats_of,
    targets,
)
from optimum_modegpt.progress import bar
from optimum_modegpt.report import count_parameters

logger = logging.getLogger(__name__)

TOP = 5
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
    encoded = [encode(prompt, tokenizer, f"prompt {number}") for number, prompt in enumerate(prompts, 1)]
    room = _room((model, reference), max_new_tokens)
    _check_prompts(encoded, (model, reference), room)
    began = datetime.now(timezone.utc).isoformat(timespec="seconds")
    pair = _Pair(model, reference, tokenizer, max_new_tokens, room)
    with evaluating(model, reference):
        pair.warm_up(encoded[0])
        for index, prompt in enumerate(bar(encoded, desc="compare", unit="prompt", shown=progress)):
            record = pair.record(index, prompt)
            if on_record is not None:
                on_record(record)
    return pair.comparison(began)


def distances(model: PreTrainedModel, reference: PreTrainedModel, ids: Tensor) -> Distances:
    """Compare the predictions of both models on `ids` (tokens,), at tokens − 1 positions.

    The caller must set evaluation mode and inference mode.

    Raises:
        EvaluationError: logits are not finite.
    """
    batch = ids[None].to(model.device)
    ours = logits_of(model, batch)
    theirs = logits_of(reference, batch.to(reference.device)).to(ours.device)
    found = Distances(
        kl=by_position(divergence, theirs, ours),
        top1=by_position(agreement, theirs, ours),
        top5=by_position(_overlap, theirs, ours),
        nats=by_position(nats_of, targets(batch), ours),
        reference_nats=by_position(nats_of, targets(batch), theirs),
    )
    if not found.kl.isfinite().all():
        raise EvaluationError("the divergence from the reference is not finite: logits overflow. Try another --dtype.")
    return found


def _overlap(reference: Tensor, logits: Tensor) -> Tensor:
    top = min(TOP, logits.shape[-1])
    first, second = (each.topk(top, dim=-1).indices for each in (reference, logits))  # (positions, top)
    return (first[:, :, None] == second[:, None, :]).sum(dim=(1, 2)) / top


def parting(first: Sequence[Any], second: Sequence[Any]) -> int | None:
    """Return the index of the first item in which two sequences differ, or None if they are equal."""
    differing = (index for index, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(differing, None if len(first) == len(second) else min(len(first), len(second)))


def _room(models: Iterable[PreTrainedModel], max_new_tokens: int) -> int | None:
    """Return the maximum number of tokens of a prompt, or None if neither model has a limit."""
    if max_new_tokens < 1:
        raise EvaluationError(f"max_new_tokens must be at least 1, found {max_new_tokens}.")
    contexts = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
    context = min((each for each in contexts if each is not None), default=None)
    if context is not None and max_new_tokens >= context:
        raise EvaluationError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in a context of {context} tokens; lower it."
        )
    return None if context is None else context - max_new_tokens


def _check_prompts(encoded: Sequence[EncodedPrompt], models: Iterable[PreTrainedModel], room: int | None) -> None:
    if not encoded:
        raise EvaluationError("expected at least one prompt, found none.")
    for model in models:
        check_ids(model, torch.cat([prompt.ids for prompt in encoded]))
    long = sum(room is not None and len(prompt.ids) > room for prompt in encoded)
    if long:
        logger.warning(
            "%d of %d prompts are longer than the %d tokens that the context holds in addition to the continuation; "
            "they were truncated to their last %d tokens.",
            *(long, len(encoded), room, room),
        )


class _Pair:
    """Both models, with the sums over prompts that the records do not contain."""

    def __init__(
        self,
        model: PreTrainedModel,
        reference: PreTrainedModel,
        tokenizer: Any,
        max_new_tokens: int,
        room: int | None,
    ) -> None:
        self.models = {"model": model, "reference": reference}
        self.tokenizer, self.max_new_tokens, self.room = tokenizer, max_new_tokens, room
        self.stops = stops_of(reference)
        self.records: list[PromptComparison] = []
        self.written: dict[str, list[Continuation]] = {name: [] for name in self.models}
        self.nats, self.scored = dict.fromkeys(self.models, 0.0), 0

    def warm_up(self, prompt: EncodedPrompt) -> None:
        """Run both models once without measuring, because the first calls allocate memory and select kernels."""
        for model in self.models.values():
            continuation(model, self._fitting(prompt), min(WARM_UP_TOKENS, self.max_new_tokens), self.stops)

    def record(self, index: int, prompt: EncodedPrompt) -> PromptComparison:
        """Compare both models on one prompt. The model that generates first alternates."""
        ids = self._fitting(prompt)
        order = ("reference", "model") if index % 2 else ("model", "reference")
        new = {name: continuation(self.models[name], ids, self.max_new_tokens, self.stops) for name in order}
        for name, each in new.items():
            self.written[name].append(each)
        found = distances(self.models["model"], self.models["reference"], torch.cat((ids, new["reference"].tokens)))
        read = len(ids) - 1
        nats = {"model": found.nats[:read], "reference": found.reference_nats[:read]}
        self.scored += read
        for name, each in nats.items():
            self.nats[name] += float(each.sum())
        sides = {name: self._side(new[name], nats[name]) for name in self.models}
        record = PromptComparison(
            index=index,
            prompt=prompt.text,
            prompt_tokens=len(ids),
            cut_tokens=len(prompt.ids) - len(ids),
            positions=len(found.kl),
            kl=float(found.kl.mean()),
            kl_max=float(found.kl.max()),
            kl_of_prompt=float(found.kl[:read].mean()) if read else None,
            kl_of_continuation=float(found.kl[read:].mean()),
            kl_by_token=tuple(found.kl[read:].tolist()),
            top1_agreement=float(found.top1.mean()),
            top5_overlap=float(found.top5.mean()),
            parting_token=parting(*(new[name].tokens.tolist() for name in self.models)),
            parting_character=parting(*(sides[name].continuation for name in self.models)),
            **sides,
        )
        self.records.append(record)
        return record

    def comparison(self, began: str) -> Comparison:
        """Return the comparison over all records."""
        perplexities = {
            name: exponential(self.nats[name], self.scored) if self.scored else None for name in self.models
        }
        return Comparison(
            records=tuple(self.records),
            perplexity=perplexities["model"],
            reference_perplexity=perplexities["reference"],
            costs=_costs(self.models["model"], self.written["model"]),
            reference_costs=_costs(self.models["reference"], self.written["reference"]),
            setting={
                "began": began,
                "max_new_tokens": self.max_new_tokens,
                **{
                    f"{name}_{key}": str(getattr(self.models[name], key)).removeprefix("torch.")
                    for name in self.models
                    for key in ("device", "dtype")
                },
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        )

    def _fitting(self, prompt: EncodedPrompt) -> Tensor:
        return prompt.ids if self.room is None else prompt.ids[-self.room :]

    def _side(self, new: Continuation, nats: Tensor) -> Written:
        return Written(
            perplexity=exponential(float(nats.sum()), len(nats)) if len(nats) else None,
            continuation=self.tokenizer.decode(new.tokens, skip_special_tokens=True),
            tokens=len(new.tokens),
            first_token_seconds=new.first_token_seconds,
            seconds_per_token=new.seconds_per_token,
        )


def _costs(model: PreTrainedModel, written: Sequence[Continuation]) -> Costs:
    weights = model.get_memory_footprint()
    working = [each.working_bytes for each in written if each.working_bytes is not None]
    per_token = [each.seconds_per_token for each in written if each.seconds_per_token is not None]
    return Costs(
        parameters=count_parameters(model),
        weight_bytes=weights,
        cache_bytes_per_token=written[0].cache_bytes_per_token,
        peak_device_bytes=weights + max(working) if working else None,
        first_token=_quantiles([each.first_token_seconds for each in written]),
        per_token=_quantiles(per_token) if per_token else None,
    )


def _quantiles(values: Sequence[float]) -> Quantiles:
    median, p95 = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95], dtype=torch.float64))
    return Quantiles(float(median), float(p95))
