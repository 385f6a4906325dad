"""Define `RecoveryConfig`. Imports neither torch nor transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from optimum_modegpt.errors import InvalidConfig


@dataclass(frozen=True)
class RecoveryConfig:
    """Settings of the fine-tuning.

    Args:
        steps: number of updates of the adapter.
        batch_size: windows per step. As many as fit are processed together, and gradients are accumulated.
        learning_rate: peak learning rate, after a warm-up over the first 5 % of the steps. It then decays to zero along
            a cosine. None takes 0.03 / √d_model, because wider models need a smaller one.
        lora_rank: rank of the adapter of every projection of the blocks.
        seed: seed of the adapter's initial values and the order of the windows.

    Raises:
        InvalidConfig: a value is out of range.
    """

    steps: int = 300
    batch_size: int = 8
    learning_rate: float | None = None
    lora_rank: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lora_rank"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InvalidConfig(f"{name} must be an integer of at least 1, found {value!r}.")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise InvalidConfig(f"learning_rate must be a number above 0, or None, found {self.learning_rate!r}.")

    def peak_learning_rate(self, model_config: Any) -> float:
        """Return the peak learning rate for a model of this configuration."""
        if self.learning_rate is not None:
            return self.learning_rate
        # Measured at widths of 64 and 96. At width 4096, it gives 5e-4, a usual value for LoRA.
        return 0.03 / math.sqrt(model_config.get_text_config().hidden_size)
