"""Save tiny models and texts to disk, for tests of the user interface."""

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
"""Compression settings that take about a second."""


def save_dense(folder: Path, name: str = "llama-gqa-tied", **changes: Any) -> Path:
    """Save a dense random model and its tokenizer, and return the folder."""
    dense(name, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def empty_picture(kept: Any, title: str, path: Path) -> None:
    """Replace `plot_kept`, which takes longer than everything else that saves a tiny model."""
    path.touch()


def save_text(path: Path, seed: int = 0, words: int = 1000) -> Path:
    """Save a text of random words and return its path. The tokenizer makes one token of each character."""
    draw = random.Random(seed)
    letters = [draw.choices("aeionrst", k=draw.randint(2, 7)) for _ in range(words)]
    path.write_text(" ".join(map("".join, letters)))
    return path
