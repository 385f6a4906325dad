"""Set the speed of a device in 16 bits."""

from __future__ import annotations

import pytest
import torch

from optimum_modegpt.budget import compute_dtype


def set_rate_in_16_bits(monkeypatch: pytest.MonkeyPatch, slowdown: float) -> None:
    """Let products take `slowdown` times as long in 16 bits as in float32."""

    def rates(_: torch.device, dtype: torch.dtype) -> dict[str, float]:
        return {"own": 1 / slowdown if dtype.itemsize == 2 else 1.0}

    monkeypatch.setattr(compute_dtype, "product_rates", rates)
