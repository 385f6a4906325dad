"""Define limits for the loss of a model against its reference, and check them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from optimum_modegpt.errors import EvaluationError, InvalidConfig


@dataclass(frozen=True)
class Check:
    """One threshold and the measured value."""

    measure: str
    found: float
    allowed: float
    at_least: bool
    """Whether `allowed` is a lower limit. Otherwise it is an upper limit."""

    @property
    def held(self) -> bool:
        """Return whether the measured value is within the limit."""
        return self.found >= self.allowed if self.at_least else self.found <= self.allowed

    def __str__(self) -> str:
        bound = "at least" if self.at_least else "at most"
        outcome = "held" if self.held else "BROKEN"
        return f"{outcome}: {self.measure} is {self.found:.4f}, allowed {bound} {self.allowed:g}"


@dataclass(frozen=True)
class Thresholds:
    """Limits for a roll-out. None means no limit.

    Args:
        max_kl: upper limit of the mean KL(reference ‖ model), in nats per position.
        min_agreement: lower limit of the top-1 agreement, a fraction of the positions.
        max_perplexity_ratio: upper limit of the model's perplexity divided by the reference's.

    Raises:
        InvalidConfig: a limit is out of range.
    """

    max_kl: float | None = None
    min_agreement: float | None = None
    max_perplexity_ratio: float | None = None

    def __post_init__(self) -> None:
        ranges = {"max_kl": math.inf, "min_agreement": 1.0, "max_perplexity_ratio": math.inf}
        for name, most in ranges.items():
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                hint = f" Fractions, not percent: for {value} % write {value / 100:g}." if value > most else ""
                raise InvalidConfig(f"{name} must be between 0 and {most:g}, found {value}.{hint}")

    def checks(self, found: Mapping[str, float | None]) -> tuple[Check, ...]:
        """Return a check for each limit that is set.

        `found` contains the measured values under `kl`, `top1_agreement` and `perplexity_ratio`.

        Raises:
            EvaluationError: a limit is set for a measure that is not available.
        """
        limits = (
            ("KL divergence", "kl", self.max_kl, False),
            ("top-1 agreement", "top1_agreement", self.min_agreement, True),
            ("perplexity ratio", "perplexity_ratio", self.max_perplexity_ratio, False),
        )
        chosen = [(measure, found.get(key), limit, least) for measure, key, limit, least in limits if limit is not None]
        for measure, value, limit, _ in chosen:
            if value is None:
                raise EvaluationError(
                    f"the limit {limit:g} of the {measure} cannot be checked: the measure needs prompts of at least "
                    "two tokens."
                )
        return tuple(
            Check(measure, value, limit, least) for measure, value, limit, least in chosen if value is not None
        )
