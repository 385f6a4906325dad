"""Tiny checkpoints and texts on disk, for tests of what users call."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tiny_models import dense, tokenizer

RECIPE: dict[str, Any] = {
    "sparsity": 0.3,
    "method": "paper",
    "allocation": "uniform",
    "num_samples": 8,
    "sequence_length": 32,
}
"""A recipe that takes about a second."""


def save_dense(folder: Path, name: str = "llama-gqa-tied", **changes: Any) -> Path:
    """A dense random model and its tokenizer."""
    dense(name, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_text(path: Path, seed: int = 0, words: int = 1000) -> Path:
    """A text of random words; the tokenizer makes one token a character."""
    draw = random.Random(seed)
    path.write_text(" ".join("".join(draw.choices("aeionrst", k=draw.randint(2, 7))) for _ in range(words)))
    return path
