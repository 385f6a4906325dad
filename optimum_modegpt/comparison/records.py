"""What a comparison finds: by position, by prompt, and over all prompts."""

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
    """Two models on the same tokens, by position, (positions,) in float64 on the CPU."""

    kl: Tensor
    """KL(reference ‖ model) over the whole vocabulary, in nats."""
    top1: Tensor
    """1 where both find the same token most likely, else 0."""
    top5: Tensor
    """Share of the reference's five likeliest tokens that are among the model's five likeliest."""
    nats: Tensor
    reference_nats: Tensor
    """Negative log-likelihood of the token that follows."""


@dataclass(frozen=True)
class Written:
    """What one model did with one prompt."""

    perplexity: float | None
    """Of the prompt; None for a prompt of one token."""
    continuation: str
    """Greedy, without special tokens."""
    tokens: int
    first_token_seconds: float
    seconds_per_token: float | None
    """Of the tokens after the first; None where there is none."""


@dataclass(frozen=True)
class PromptComparison:
    """Both models on one prompt; means are over its positions."""

    index: int
    """Of the prompt among those given, from 0."""
    prompt: str
    prompt_tokens: int
    """That were read."""
    cut_tokens: int
    """Tokens at its beginning that were left out because prompt and continuation would not fit the context."""
    positions: int
    kl: float
    kl_max: float
    """At the position where it is largest."""
    kl_of_prompt: float | None
    """Over the positions of the prompt; None for a prompt of one token."""
    kl_of_continuation: float
    kl_by_token: tuple[float, ...]
    """At each position of the reference's continuation."""
    top1_agreement: float
    top5_overlap: float
    parting_token: int | None
    """Index of the first token in which the continuations differ; None where they are equal."""
    parting_character: int | None
    """The same in their texts."""
    model: Written
    reference: Written

    @property
    def perplexity_ratio(self) -> float | None:
        """The model's perplexity over the reference's; None for a prompt of one token."""
        return _ratio(self.model.perplexity, self.reference.perplexity)

    def to_dict(self) -> dict[str, Any]:
        """All of it, safe for JSON."""
        return {**dataclasses.asdict(self), "perplexity_ratio": self.perplexity_ratio}


@dataclass(frozen=True)
class Quantiles:
    """Median and 95th percentile over the prompts."""

    median: float
    p95: float


@dataclass(frozen=True)
class Costs:
    """What one model takes, measured on this machine at batch size 1; sizes in bytes, times in seconds."""

    parameters: int
    weight_bytes: int
    """Parameters and buffers."""
    cache_bytes_per_token: float | None
    """Keys and values of all blocks for one token of context."""
    peak_device_bytes: int | None
    """Weights and the largest rise of device memory while it wrote; None on a CPU."""
    first_token: Quantiles
    per_token: Quantiles | None
    """None where no continuation has a second token."""


@dataclass(frozen=True)
class Comparison:
    """Both models on all prompts. Means over positions count every position of every prompt once."""

    records: tuple[PromptComparison, ...]
    perplexity: float | None
    reference_perplexity: float | None
    """exp of the mean nats over the tokens of all prompts but each first one; None where all have one token."""
    costs: Costs
    reference_costs: Costs
    setting: dict[str, Any]
    """max_new_tokens, device and dtype of both, versions, and when it began (UTC)."""

    @property
    def positions(self) -> int:
        """Of all prompts."""
        return sum(record.positions for record in self.records)

    @property
    def kl(self) -> float:
        """Mean KL(reference ‖ model), in nats per position."""
        return self._mean(record.kl for record in self.records)

    @property
    def kl_of_prompts(self) -> float | None:
        """The same over the positions of the prompts; None where all have one token."""
        read = [(record.kl_of_prompt, record.prompt_tokens - 1) for record in self.records]
        known = [(kl, weight) for kl, weight in read if kl is not None]
        return _weighted_mean(known) if known else None

    @property
    def kl_of_continuations(self) -> float:
        """The same over the positions of the reference's continuations."""
        return statistics.fmean(kl for record in self.records for kl in record.kl_by_token)

    @property
    def kl_max(self) -> float:
        """KL(reference ‖ model) at the position where it is largest, in nats."""
        return max(record.kl_max for record in self.records)

    @property
    def top1_agreement(self) -> float:
        """Fraction of positions where both find the same token most likely."""
        return self._mean(record.top1_agreement for record in self.records)

    @property
    def top5_overlap(self) -> float:
        """Mean share of the reference's five likeliest tokens that are among the model's five likeliest."""
        return self._mean(record.top5_overlap for record in self.records)

    @property
    def perplexity_ratio(self) -> float | None:
        """The model's perplexity over the reference's."""
        return _ratio(self.perplexity, self.reference_perplexity)

    @property
    def equal_continuations(self) -> int:
        """Prompts that both continue with the same tokens."""
        return sum(record.parting_token is None for record in self.records)

    def worst_first(self) -> list[PromptComparison]:
        """The records by falling mean KL divergence."""
        return sorted(self.records, key=lambda record: -record.kl)

    def check(self, thresholds: Thresholds) -> tuple[Check, ...]:
        """A check for each limit that is set.

        Raises:
            EvaluationError: a limit is set for what could not be measured.
        """
        return thresholds.checks(self.sums())

    def summary(self) -> str:
        """A short table: both models side by side, and how far they are apart."""
        from optimum_modegpt.comparison.table import table  # which is written in terms of this class

        return table(self)

    def sums(self) -> dict[str, Any]:
        """Everything but the records and the setting, safe for JSON."""
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
        """All of it, safe for JSON."""
        return {**self.sums(), "setting": self.setting, "records": [record.to_dict() for record in self.records]}

    def _mean(self, values: Iterable[float]) -> float:
        return _weighted_mean(zip(values, (record.positions for record in self.records), strict=True))


def _ratio(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first / second


def _weighted_mean(pairs: Iterable[tuple[float, float]]) -> float:
    """The mean of values that come with their weights."""
    known = list(pairs)
    return sum(value * weight for value, weight in known) / sum(weight for _, weight in known)
