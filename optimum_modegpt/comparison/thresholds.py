"""What a model may lose against its reference, and whether it held."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from optimum_modegpt.errors import EvaluationError, InvalidConfig


@dataclass(frozen=True)
class Check:
    """One threshold beside what was found."""

    measure: str
    found: float
    allowed: float
    at_least: bool
    """Whether `allowed` is the least; else it is the most."""

    @property
    def held(self) -> bool:
        """Whether what was found is allowed."""
        return self.found >= self.allowed if self.at_least else self.found <= self.allowed

    def __str__(self) -> str:
        bound = "at least" if self.at_least else "at most"
        outcome = "held" if self.held else "BROKEN"
        return f"{outcome}: {self.measure} is {self.found:.4f}, allowed {bound} {self.allowed:g}"


@dataclass(frozen=True)
class Thresholds:
    """Limits for a roll-out; None is no limit.

    Args:
        max_kl: of the mean KL(reference ‖ model), nats per position.
        min_agreement: of the top-1 agreement, a fraction of the positions.
        max_perplexity_ratio: of the model's perplexity over the reference's.

    Raises:
        InvalidConfig: for a limit that nothing or everything meets.
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
                raise InvalidConfig(f"{name} must lie between 0 and {most:g}, found {value}.{hint}")

    def checks(self, found: Mapping[str, float | None]) -> tuple[Check, ...]:
        """A check for each limit that is set, of `found` by `kl`, `top1_agreement` and `perplexity_ratio`.

        Raises:
            EvaluationError: a limit is set for what could not be measured.
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
                    f"the {measure} is to be checked against {limit:g} and could not be measured; it needs prompts of "
                    "at least two tokens."
                )
        return tuple(
            Check(measure, value, limit, least) for measure, value, limit, least in chosen if value is not None
        )
