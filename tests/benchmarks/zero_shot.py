"""Score zero-shot questions from JSONL files by the log-likelihood of each option, and compare two models on them.

A file is a task. Its lines have the fields `query`, `choices` and `gold`, or `context_options`, `continuation` and
`gold`, or `context` and `continuation`. The tokens that all options of a question begin with are read once.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_modegpt.calibration.parsing import encode, opening_token
from optimum_modegpt.evaluation.perplexity import by_position, evaluating, nats_of
from optimum_modegpt.kv_cache import cache_argument, cache_of

COMPLETIONS = ("hellaswag",)
"""Tasks whose choices continue the query directly. All others ask a question and begin the answer."""
BATCH = 4
"""Questions per forward pass."""


@dataclass(frozen=True)
class Option:
    """Token ids of a prompt with a continuation, the index of the first scored one, and the divisor of the score."""

    tokens: list[int]
    start: int
    length: int = 1


@dataclass(frozen=True)
class Question:
    """Options, and the index of the right one. None if the only option must be the model's greedy continuation."""

    options: tuple[Option, ...]
    gold: int | None

    @cached_property
    def shared(self) -> int:
        """Number of first tokens that all options share and none of them scores."""
        columns = zip(*(option.tokens for option in self.options), strict=False)
        equal = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        return min(equal, *(option.start - 1 for option in self.options))

    @property
    def longest_tail(self) -> int:
        """Largest number of tokens of an option after the shared ones."""
        return max(len(option.tokens) for option in self.options) - self.shared


def read_questions(file: Path, tokenizer: Any, context: int | None, limit: int | None = None) -> list[Question]:
    """Read the first `limit` questions of a task. Prompts that do not fit the context lose their first tokens."""
    lines = file.read_text(encoding="utf-8").splitlines()[:limit]
    return [_question(json.loads(line), file.stem, tokenizer, context) for line in lines]


def _question(item: dict[str, Any], task: str, tokenizer: Any, context: int | None) -> Question:
    if "context_options" in item:
        texts = [(prompt, item["continuation"], 1) for prompt in item["context_options"]]
    elif "choices" in item:
        texts = [(_prompt(item["query"], task), choice, len(choice)) for choice in item["choices"]]
    else:
        texts = [(item["context"], item["continuation"], 1)]
    options = tuple(_option(*text, tokenizer, context) for text in texts)
    return Question(options, item.get("gold"))


def _prompt(query: str, task: str) -> str:
    if task in COMPLETIONS:
        return query
    question = query.removeprefix("Question: ").rstrip("\n")
    return f"Question: {question}\nAnswer:"


def _option(prompt: str, continuation: str, length: int, tokenizer: Any, context: int | None) -> Option:
    """Encode a prompt and its continuation together, after the special token that begins every text."""
    opening = opening_token(tokenizer)
    first = [] if opening is None else [opening]
    tokens = first + encode(tokenizer, f"{prompt} {continuation}").tolist()
    start = len(first) + len(encode(tokenizer, prompt))
    excess = max(0, len(tokens) - (context or len(tokens)))
    if start <= excess:
        raise ValueError(f"a continuation has {len(tokens) - start} tokens; expected fewer than the context {context}.")
    return Option(tokens[excess:], start - excess, length)


def right_answers(model: PreTrainedModel, questions: Sequence[Question]) -> list[bool]:
    """Return for each question whether the model prefers the right option."""
    right = [False] * len(questions)
    with evaluating(model):
        for batch in _batches(questions):
            scores = _scores(model, [questions[index] for index in batch])
            for index, (nats, greedy) in zip(batch, scores, strict=True):
                right[index] = _is_right(questions[index], nats, greedy)
    return right


def _is_right(question: Question, nats: list[float], greedy: list[bool]) -> bool:
    if question.gold is None:
        return greedy[0]
    costs = [cost / option.length for cost, option in zip(nats, question.options, strict=True)]
    return costs.index(min(costs)) == question.gold


def _batches(questions: Sequence[Question]) -> Iterator[list[int]]:
    """Yield indices of questions of similar length. Questions with and without shared tokens are kept apart."""
    order = sorted(range(len(questions)), key=lambda index: questions[index].longest_tail)
    alone = [index for index in order if questions[index].shared == 0]
    others = [index for index in order if questions[index].shared > 0]
    for indices in (alone, others):
        for begin in range(0, len(indices), BATCH):
            yield indices[begin : begin + BATCH]


def _scores(model: PreTrainedModel, questions: Sequence[Question]) -> list[tuple[list[float], list[bool]]]:
    """Return the nats of each option's continuation and whether it is the greedy one, by question.

    Rows are padded on the right. The key-value cache of the shared tokens is repeated for each option.
    """
    options = [(owner, option) for owner, question in enumerate(questions) for option in question.options]
    owners = torch.tensor([owner for owner, _ in options], device=model.device)
    heads, head_mask = _padded([question.options[0].tokens[: question.shared] for question in questions], model)
    tails, tail_mask = _padded([option.tokens[questions[owner].shared :] for owner, option in options], model)
    _check_window(model, heads.shape[1] + tails.shape[1])
    arguments: dict[str, Any] = {}
    if heads.shape[1]:
        read = model(input_ids=heads, attention_mask=head_mask, use_cache=True, logits_to_keep=1)
        cache = cache_of(read)
        cache.batch_select_indices(owners)
        arguments = {cache_argument(model): cache, "use_cache": True}
    positions = head_mask[owners].sum(dim=1, keepdim=True) + torch.arange(tails.shape[1], device=model.device)
    logits = model(
        input_ids=tails,
        attention_mask=torch.cat((head_mask[owners], tail_mask), dim=1),
        position_ids=positions.clamp(max=_last_position(model)),
        **arguments,
    ).logits
    found: list[tuple[list[float], list[bool]]] = [([], []) for _ in questions]
    for row, (owner, option) in enumerate(options):
        shared, end = questions[owner].shared, len(option.tokens)
        target = tails[row, option.start - shared : end - shared]
        predicted = logits[row, option.start - shared - 1 : end - shared - 1]
        found[owner][0].append(float(by_position(nats_of, target, predicted).sum()))
        found[owner][1].append(bool((predicted.argmax(dim=-1) == target).all()))
    return found


def _padded(rows: Sequence[list[int]], model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return token ids padded on the right with zeros, and the mask, both (rows, longest)."""
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64, device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=model.device)
    return tokens, mask.long()


def _check_window(model: PreTrainedModel, tokens: int) -> None:
    """Raise if a sliding window would count the padding between the shared tokens and the others."""
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window is not None and tokens > window:
        raise ValueError(f"questions have {tokens} tokens; expected at most the sliding window of {window}.")


def _last_position(model: PreTrainedModel) -> int | None:
    """Return the last position that the model knows, None if there is no limit. Only padding can exceed it."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if context is None else context - 1


def accuracy(right: Sequence[bool]) -> tuple[float, float]:
    """Return the fraction of right answers and its standard error."""
    share = statistics.fmean(right)
    return share, math.sqrt(share * (1 - share) / len(right))


def mean_accuracy(tasks: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """Return the unweighted mean over tasks of the accuracies, and its standard error."""
    shares, errors = zip(*map(accuracy, tasks), strict=True)
    return statistics.fmean(shares), math.hypot(*errors) / len(tasks)


def share_kept(dense: Sequence[Sequence[bool]], ours: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """Return the mean accuracy over tasks as a share of the dense model's, and its paired standard error.

    Both models answer the same questions. The error is that of a ratio, from the differences by question.
    """
    (before, _), (after, _) = mean_accuracy(dense), mean_accuracy(ours)
    share, errors = after / before, []
    for theirs, mine in zip(dense, ours, strict=True):
        differences = [new - share * old for old, new in zip(theirs, mine, strict=True)]
        errors.append(statistics.pstdev(differences) / math.sqrt(len(differences)))
    return share, math.hypot(*errors) / len(dense) / before
