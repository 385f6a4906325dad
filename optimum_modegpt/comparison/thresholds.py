"""Define limits for the loss of a model against its reference, and check them."""

from __future__ import annotations

import math
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
        if self.at_least:
            return self.found >= self.allowed
        return self.found <= self.allowed

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
        for name, most in (("max_kl", math.inf), ("min_agreement", 1.0), ("max_perplexity_ratio", math.inf)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                hint = f" Fractions, not percent: for {value} % write {value / 100:g}." if value > most else ""
                raise InvalidConfig(f"{name} must be between 0 and {most:g}, found {value}.{hint}")

    def checks(self, kl: float, agreement: float, perplexity_ratio: float | None = None) -> tuple[Check, ...]:
        """Return a check of each limit that is set.

        Raise `EvaluationError` if the perplexity ratio has a limit but is None.
        """
        found = []
        if self.max_kl is not None:
            found.append(Check("KL divergence", kl, self.max_kl, at_least=False))
        if self.min_agreement is not None:
            found.append(Check("top-1 agreement", agreement, self.min_agreement, at_least=True))
        if self.max_perplexity_ratio is not None:
            if perplexity_ratio is None:
                raise EvaluationError(
                    f"the limit {self.max_perplexity_ratio:g} of the perplexity ratio cannot be checked: it needs "
                    "prompts of at least two tokens."
                )
            found.append(Check("perplexity ratio", perplexity_ratio, self.max_perplexity_ratio, at_least=False))
        return tuple(found)
