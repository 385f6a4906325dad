"""Preflight check: compare the memory and disk space that a compression needs with the free ones."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from optimum_modegpt.budget.estimate import Estimate
from optimum_modegpt.budget.placement import Free
from optimum_modegpt.errors import NotEnoughRoom

SMALLER = "a smaller --num-samples, --sequence-length or --batch-size"


def check_resources(found: Estimate, device: torch.device, folder: Path, *, written: int = 0) -> None:
    """Raise if a compression needs more memory or disk space than is free. Call this before reading any weight.

    Args:
        found: the estimate of the compression.
        device: the compute device.
        folder: the output folder, which need not exist.
        written: bytes that an interrupted run has already written to the disk.

    Raises:
        NotEnoughRoom: something does not fit. The message names the needed and the free bytes, and the remedy.
    """
    home = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    needs, free = (found.without if device.type == "cpu" else found.with_accelerator).needs, Free.beside(device)
    files = {f"{name}, in files": size for name, size in needs.files.items()}
    shortages = _shortage("host memory", needs.host, free.host, f"use {SMALLER}")
    on_disk = shutil.disk_usage(home).free + written
    shortages += _shortage(f"disk at {home}", {**found.disk, **files}, on_disk, "use an --output on another disk")
    if free.device is not None:
        shortages += _shortage(f"memory on {device}", needs.device, free.device, f"use {SMALLER}, or --device cpu")
    if shortages:
        raise NotEnoughRoom(
            "this compression does not fit:\n  "
            + "\n  ".join(shortages)
            + "\nPass --ignore-estimate to continue anyway."
        )


def _shortage(name: str, needs: Mapping[str, int], free: int, advice: str) -> list[str]:
    needed = sum(needs.values())
    if needed <= free:
        return []
    most = max(needs, key=lambda part: needs[part])
    return [f"{name}: needed {needed / 2**20:,.1f} MiB (most for {most}), free {free / 2**20:,.1f} MiB; {advice}."]
