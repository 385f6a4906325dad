"""Define the results of a comparison: by position, by prompt, and over all prompts."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optimum_modegpt.comparison.thresholds import Check, Thresholds


@dataclass(frozen=True)
class Distances:
    """Differences of two models on the same tokens, by position: (positions,) in float64 on the CPU."""

    kl: Tensor
    """KL(reference ‖ model) over the whole vocabulary, in nats."""
    top1: Tensor
    """1 if both models have the same most likely token, else 0."""
    top5: Tensor
    """Share of the reference's five most likely tokens that are among the model's five most likely."""
    nats: Tensor
    reference_nats: Tensor
    """Negative log-likelihood of the next token."""


@dataclass(frozen=True)
class Written:
    """Perplexity, continuation and latency of one model on one prompt."""

    perplexity: float | None
    """Perplexity of the prompt. None for a prompt of one token."""
    continuation: str
    """Greedy continuation, without special tokens."""
    tokens: int
    first_token_seconds: float
    seconds_per_token: float | None
    """Mean over the tokens after the first. None if there is only one token."""


@dataclass(frozen=True)
class PromptComparison:
    """Results of both models on one prompt. Means are over its positions."""

    index: int
    """Index of the prompt, from 0."""
    prompt: str
    prompt_tokens: int
    """Number of tokens read."""
    cut_tokens: int
    """Number of tokens truncated at the beginning, because prompt and continuation would not fit the context."""
    positions: int
    kl: float
    kl_max: float
    """Largest value over the positions."""
    kl_of_prompt: float | None
    """Mean over the positions of the prompt. None for a prompt of one token."""
    kl_of_continuation: float
    kl_by_token: tuple[float, ...]
    """KL divergence at each position of the reference's continuation."""
    top1_agreement: float
    top5_overlap: float
    parting_token: int | None
    """Index of the first token in which the continuations differ. None if they are equal."""
    parting_character: int | None
    """Index of the first character in which the texts of the continuations differ. None if they are equal."""
    model: Written
    reference: Written

    @property
    def perplexity_ratio(self) -> float | None:
        """Return the model's perplexity divided by the reference's, or None for a prompt of one token."""
        return _ratio(self.model.perplexity, self.reference.perplexity)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, safe for JSON."""
        return {**dataclasses.asdict(self), "perplexity_ratio": self.perplexity_ratio}


@dataclass(frozen=True)
class Quantiles:
    """Median and 95th percentile over the prompts."""

    median: float
    p95: float


@dataclass(frozen=True)
class Costs:
    """Memory and latency of one model, measured on this machine at batch size 1. Sizes in bytes, times in seconds."""

    parameters: int
    weight_bytes: int
    """Size of parameters and buffers."""
    cache_bytes_per_token: float | None
    """Size of keys and values of all blocks for one token of context."""
    peak_device_bytes: int | None
    """Weights plus the largest rise of device memory during generation. None on a CPU."""
    first_token: Quantiles
    per_token: Quantiles | None
    """None if no continuation has a second token."""


@dataclass(frozen=True)
class Comparison:
    """Results of both models on all prompts. Means over positions count every position of every prompt once."""

    records: tuple[PromptComparison, ...]
    perplexity: float | None
    reference_perplexity: float | None
    """exp of the mean nats over all tokens of the prompts except each first one. None if all prompts have one token."""
    costs: Costs
    reference_costs: Costs
    setting: dict[str, Any]
    """max_new_tokens, device and dtype of both models, versions, and the start time (UTC)."""

    @property
    def positions(self) -> int:
        """Return the number of positions of all prompts."""
        return sum(record.positions for record in self.records)

    @property
    def kl(self) -> float:
        """Compute the mean KL(reference ‖ model), in nats per position."""
        return self._mean(record.kl for record in self.records)

    @property
    def kl_of_prompts(self) -> float | None:
        """Compute the mean KL divergence over the positions of the prompts. Return None if all have one token."""
        read = [(record.kl_of_prompt, record.prompt_tokens - 1) for record in self.records]
        known = [(kl, weight) for kl, weight in read if kl is not None]
        return _weighted_mean(known) if known else None

    @property
    def kl_of_continuations(self) -> float:
        """Compute the mean KL divergence over the positions of the reference's continuations."""
        return statistics.fmean(kl for record in self.records for kl in record.kl_by_token)

    @property
    def kl_max(self) -> float:
        """Return the largest KL(reference ‖ model) of any position, in nats."""
        return max(record.kl_max for record in self.records)

    @property
    def top1_agreement(self) -> float:
        """Compute the fraction of positions at which both models have the same most likely token."""
        return self._mean(record.top1_agreement for record in self.records)

    @property
    def top5_overlap(self) -> float:
        """Compute the mean share of the reference's five most likely tokens among the model's five most likely."""
        return self._mean(record.top5_overlap for record in self.records)

    @property
    def perplexity_ratio(self) -> float | None:
        """Return the model's perplexity divided by the reference's."""
        return _ratio(self.perplexity, self.reference_perplexity)

    @property
    def equal_continuations(self) -> int:
        """Return the number of prompts that both models continue with the same tokens."""
        return sum(record.parting_token is None for record in self.records)

    def worst_first(self) -> list[PromptComparison]:
        """Return the records sorted by decreasing mean KL divergence."""
        return sorted(self.records, key=lambda record: -record.kl)

    def check(self, thresholds: Thresholds) -> tuple[Check, ...]:
        """Return a check for each limit that is set.

        Raises:
            EvaluationError: a limit is set for a measure that is not available.
        """
        return thresholds.checks(self.sums())

    def summary(self) -> str:
        """Return a short table of both models' results and the differences between them."""
        from optimum_modegpt.comparison.table import table  # which imports this class

        return table(self)

    def sums(self) -> dict[str, Any]:
        """Return everything except the records and the setting, safe for JSON."""
        return {
            "prompts": len(self.records),
            "positions": self.positions,
            "kl": self.kl,
            "kl_of_prompts": self.kl_of_prompts,
            "kl_of_continuations": self.kl_of_continuations,
            "kl_max": self.kl_max,
            "top1_agreement": self.top1_agreement,
            "top5_overlap": self.top5_overlap,
            "perplexity": self.perplexity,
            "reference_perplexity": self.reference_perplexity,
            "perplexity_ratio": self.perplexity_ratio,
            "equal_continuations": self.equal_continuations,
            "costs": dataclasses.asdict(self.costs),
            "reference_costs": dataclasses.asdict(self.reference_costs),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, safe for JSON."""
        return {**self.sums(), "setting": self.setting, "records": [record.to_dict() for record in self.records]}

    def _mean(self, values: Iterable[float]) -> float:
        return _weighted_mean(zip(values, (record.positions for record in self.records), strict=True))


def _ratio(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first / second


def _weighted_mean(pairs: Iterable[tuple[float, float]]) -> float:
    """Compute the weighted mean of (value, weight) pairs."""
    known = list(pairs)
    return sum(value * weight for value, weight in known) / sum(weight for _, weight in known)
