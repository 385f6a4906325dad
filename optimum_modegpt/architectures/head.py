"""The modules between the last block and the logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from optimum_modegpt.modeling.modegpt_family import Head


class LogitHead(nn.Module):
    """Computes logits from the stream after the last block: final norm, projection, head, scale and soft cap.

    Attributes:
        norm, projection: None if the model has none.
        output: the language model's head.
        scale: factor of the logits.
        cap: the logits are cap · tanh(logits / cap); None if they are not capped.
    """

    def __init__(self, norm: Any, projection: Any, output: nn.Linear, *, scale: float, cap: float | None) -> None:
        super().__init__()
        self.norm, self.projection, self.output = norm, projection, output
        self.scale, self.cap = scale, cap

    @property
    def linear(self) -> bool:
        """Whether the logits are a linear map of the norm's output."""
        return self.cap is None and self.output.bias is None

    def forward(self, stream: Tensor) -> Tensor:
        """Map the stream (…, d_model) to logits (…, vocabulary)."""
        for module in (self.norm, self.projection):
            if module is not None:
                stream = module(stream)
        logits = self.output(stream)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()


def scale_of(head: Head, config: Any) -> float:
    """Return the factor of a model's logits."""
    scale = 1.0 if head.scale is None else getattr(config, head.scale)
    return scale if head.divisor is None else scale / getattr(config, head.divisor)


def cap_of(head: Head, config: Any) -> float | None:
    """Return the soft cap of a model's logits, or None."""
    return None if head.cap is None else getattr(config, head.cap)
