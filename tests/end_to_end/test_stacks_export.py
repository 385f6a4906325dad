"""Test torch.export with dynamic batch and length. `test_export_runtimes.py` tests the formats of other tools."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_configs import STACKS
from tiny_models import compressed, tokens
from torch import Tensor
from torch.export import Dim, ExportedProgram

SIZES = [(1, 31), (3, 9)]
"""Batch sizes and lengths of the test inputs; the example input has others."""


def inputs(batch: int, length: int) -> dict[str, Tensor]:
    """Return token ids with left padding that grows by two tokens a row."""
    padding = torch.arange(length) < 2 * torch.arange(batch)[:, None] % length
    ids = tokens(batch, length).masked_fill(padding, 0)
    return {"input_ids": ids, "attention_mask": (~padding).long()}


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits of all tokens except padding: (tokens, vocabulary)."""
    return model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]


@cache
def exported(name: str) -> tuple[Any, ExportedProgram]:
    """Return a model and its exported program, with dynamic batch and length up to the context length."""
    model = compressed(name)
    batch, length = Dim("batch", max=64), Dim("length", min=2, max=64)
    sizes = {0: batch, 1: length}
    program = torch.export.export(
        model,
        (),
        {**inputs(2, 8), "use_cache": False},
        dynamic_shapes={"input_ids": sizes, "attention_mask": sizes, "use_cache": None},
    )
    return model, program


@pytest.mark.parametrize(
    "name",
    [name if name in ("llama-gqa-tied", "opt") else pytest.param(name, marks=pytest.mark.slow) for name in STACKS],
)
def test_exported_program_can_be_saved_and_reloaded(name: str, tmp_path: Path) -> None:
    model, program = exported(name)
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    for size in SIZES:
        batch = inputs(*size)
        expected = logits(model, batch)
        torch.testing.assert_close(logits(program.module(), batch), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(logits(again, batch), logits(program.module(), batch))
