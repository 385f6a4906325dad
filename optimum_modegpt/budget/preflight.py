"""Preflight check: compare the memory and disk space that a compression needs with the free ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from optimum_modegpt.budget.estimate import Estimate
from optimum_modegpt.budget.placement import Free
from optimum_modegpt.errors import InsufficientResources
from optimum_modegpt.methods.cost import ByteCounts

SMALLER = "a smaller --num-samples, --sequence-length or --batch-size"


def check_resources(found: Estimate, device: torch.device, folder: Path, *, written: int = 0) -> None:
    """Raise InsufficientResources if a compression on `device` needs more memory or disk space than is free.

    The output `folder` need not exist. `written` are the bytes on disk that an interrupted run has already written.
    """
    needs, free = (found.without if device.type == "cpu" else found.with_accelerator).needs, Free.now(device)
    disk = found.disk | {f"{name}, in files": size for name, size in needs.files.items()}
    home = folder.absolute()
    while not home.exists():
        home = home.parent
    shortages = [
        _shortage("host memory", needs.host, free.host, f"use {SMALLER}"),
        _shortage(f"disk at {home}", disk, shutil.disk_usage(home).free + written, "use an --output on another disk"),
    ]
    if free.device is not None:
        shortages.append(_shortage(f"memory on {device}", needs.device, free.device, f"use {SMALLER}, or --device cpu"))
    if any(shortages):
        raise InsufficientResources(
            f"this compression does not fit:{''.join(shortages)}\nPass --ignore-estimate to continue anyway."
        )


def _shortage(name: str, needs: ByteCounts, free: int, advice: str) -> str:
    """Return a line of the message; an empty string if the needs fit."""
    needed = sum(needs.values())
    if needed <= free:
        return ""
    most = max(needs, key=lambda part: needs[part])
    sizes = f"needed {needed / 2**20:,.1f} MiB (most for {most}), free {free / 2**20:,.1f} MiB"
    return f"\n  {name}: {sizes}; {advice}."
