"""Define the results of a comparison: by position, by prompt, and over all prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from optimum_modegpt.comparison.thresholds import Check, Thresholds
from optimum_modegpt.evaluation.perplexity import exponential


class Distances(NamedTuple):
    """Differences of two models on the same tokens, by position: (positions,) on the CPU, in float64 but for a mask."""

    kl: Tensor
    """KL(reference ‖ model) over the whole vocabulary, in nats."""
    top1: Tensor
    """1 if both models have the same most likely token, else 0."""
    top5: Tensor
    """Share of the reference's five most likely tokens that are among the model's five most likely."""
    nats: Tensor
    reference_nats: Tensor
    """Negative log-likelihood of the next token."""
    in_prompt: Tensor
    """Whether the next token belongs to the prompt. Otherwise it belongs to the continuation."""

    def means(self) -> dict[str, Any]:
        """Return the fields of `Means` but for the ratio."""
        return {
            "positions": len(self.kl),
            "kl": float(self.kl.mean()),
            "kl_max": float(self.kl.max()),
            "top1_agreement": float(self.top1.mean()),
            "top5_overlap": float(self.top5.mean()),
        }

    def of_prompt(self) -> tuple[float | None, float | None, float | None, float | None]:
        """Return mean KL, both perplexities and their ratio for the positions in prompts, or None if there are none."""
        tokens = int(self.in_prompt.sum())
        if tokens == 0:
            return None, None, None, None
        ours = exponential(float(self.nats[self.in_prompt].sum()), tokens)
        theirs = exponential(float(self.reference_nats[self.in_prompt].sum()), tokens)
        return float(self.kl[self.in_prompt].mean()), ours, theirs, ours / theirs


@dataclass(frozen=True, kw_only=True)
class Means:
    """Differences of two models as means over positions, each of which counts once."""

    positions: int
    kl: float
    """KL(reference ‖ model), in nats per position."""
    kl_max: float
    """Largest value of any position."""
    top1_agreement: float
    """Fraction of positions at which both models have the same most likely token."""
    top5_overlap: float
    """Share of the reference's five most likely tokens that are among the model's five most likely."""
    perplexity_ratio: float | None
    """The model's perplexity of prompts divided by the reference's. None if no prompt has a second token."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, safe for JSON."""
        return dataclasses.asdict(self)


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


@dataclass(frozen=True, kw_only=True)
class PromptComparison(Means):
    """Results of both models on one prompt."""

    index: int
    """Index of the prompt, from 0."""
    prompt: str
    prompt_tokens: int
    """Number of tokens read."""
    cut_tokens: int
    """Number of tokens truncated at the beginning, because prompt and continuation would not fit the context."""
    kl_of_prompt: float | None
    """Mean over the positions of the prompt. None for a prompt of one token."""
    kl_of_continuation: float
    kl_by_token: tuple[float, ...]
    """KL divergence at each position of the reference's continuation."""
    parting_token: int | None
    """Index of the first token in which the continuations differ. None if they are equal."""
    parting_character: int | None
    """Index of the first character in which the texts of the continuations differ. None if they are equal."""
    model: Written
    reference: Written


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


@dataclass(frozen=True, kw_only=True)
class Comparison(Means):
    """Results of both models on all prompts."""

    prompts: int
    kl_of_prompts: float | None
    """Mean over the positions of the prompts. This and the perplexities are None if all prompts have one token."""
    kl_of_continuations: float
    """Mean over the positions of the reference's continuations."""
    perplexity: float | None
    reference_perplexity: float | None
    """exp of the mean nats over all tokens of the prompts except each first one."""
    equal_continuations: int
    """Number of prompts that both models continue with the same tokens."""
    costs: Costs
    reference_costs: Costs
    setting: dict[str, Any]
    """max_new_tokens, device and dtype of both models, versions, and the start time (UTC)."""
    records: tuple[PromptComparison, ...]

    def worst_first(self) -> list[PromptComparison]:
        """Return the records sorted by decreasing mean KL divergence."""
        return sorted(self.records, key=lambda record: -record.kl)

    def check(self, thresholds: Thresholds) -> tuple[Check, ...]:
        """Return a check of each limit that is set. Errors are those of `Thresholds.checks`."""
        return thresholds.checks(self.kl, self.top1_agreement, self.perplexity_ratio)

    def summary(self) -> str:
        """Return a short table of both models' results and the differences between them."""
        lines = [f"{'':<28}{'model':>14}{'reference':>14}{'ratio':>9}"]
        for name, ours, theirs, ratio in self.rows():
            lines.append(f"{name:<28}{ours:>14}{theirs:>14}{ratio:>9}")
        differences = {
            "KL divergence": f"{self.kl:.4f} nats per position, {self.kl_max:.3f} at the worst",
            "  in prompts": "" if self.kl_of_prompts is None else f"{self.kl_of_prompts:.4f}",
            "  in continuations": f"{self.kl_of_continuations:.4f}",
            "top-1 agreement": f"{self.top1_agreement:.2%} of positions",
            "top-5 overlap": f"{self.top5_overlap:.2%} of the reference's five most likely tokens",
            "same continuation": f"{self.equal_continuations} of {_counted(self.prompts)}",
            "compared on": self.extent(),
        }
        for name, text in differences.items():
            if text:
                lines.append(f"{name:<28}{text}")
        return "\n".join(lines)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return the name, both models' values and their ratio, formatted, of each measure that both models have."""
        ours, theirs = self.costs, self.reference_costs
        measures: list[tuple[str, Any, Any, Callable[[Any], str]]] = [
            ("perplexity of the prompts", self.perplexity, self.reference_perplexity, "{:.4f}".format),
            ("parameters", ours.parameters, theirs.parameters, "{:,}".format),
            ("weights", ours.weight_bytes, theirs.weight_bytes, size),
            ("KV cache per token", ours.cache_bytes_per_token, theirs.cache_bytes_per_token, size),
            ("peak device memory", ours.peak_device_bytes, theirs.peak_device_bytes, size),
            ("time to first token", ours.first_token.median, theirs.first_token.median, milliseconds),
            ("time to first token, p95", ours.first_token.p95, theirs.first_token.p95, milliseconds),
        ]
        if ours.per_token and theirs.per_token:
            measures += [
                ("time per further token", ours.per_token.median, theirs.per_token.median, milliseconds),
                ("time per further token, p95", ours.per_token.p95, theirs.per_token.p95, milliseconds),
            ]
        rows = []
        for name, first, second, form in measures:
            if first is not None and second is not None:
                rows.append((name, form(first), form(second), f"{first / second:.3f}" if second else ""))
        return rows

    def extent(self) -> str:
        """Describe the amount of text, the devices and the dtypes of the comparison."""
        devices = {self.setting["model_device"], self.setting["reference_device"]}
        dtypes = {self.setting["model_dtype"], self.setting["reference_dtype"]}
        return (
            f"{_counted(self.prompts)}, {self.positions:,} positions; {' and '.join(sorted(devices))}, "
            f"{' and '.join(sorted(dtypes))}, batch size 1"
        )


def size(number: float) -> str:
    """Format a number of bytes in a suitable unit."""
    if number < 2**10:
        return f"{number:,.0f} B"
    if number < 2**20:
        return f"{number / 2**10:.1f} KiB"
    if number < 2**30:
        return f"{number / 2**20:.1f} MiB"
    return f"{number / 2**30:,.2f} GiB"


def milliseconds(seconds: float) -> str:
    """Format a time in seconds as milliseconds."""
    return f"{1000 * seconds:,.2f} ms"


def _counted(prompts: int) -> str:
    return f"{prompts:,} prompt{'s' if prompts > 1 else ''}"
