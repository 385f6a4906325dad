"""Whether a compression fits into the memory and onto the disk that are there, before any weight is read."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from optimum_modegpt.errors import NotEnoughRoom
from optimum_modegpt.evaluation.estimate import Estimate
from optimum_modegpt.methods.placement import Free

SMALLER = "a smaller --num-samples, --sequence-length or --batch-size"


def check_room(found: Estimate, device: torch.device, folder: Path, *, written: int = 0) -> None:
    """Refuses what does not fit.

    Args:
        found: what the compression needs.
        device: where it computes.
        folder: where the result goes; it need not exist.
        written: bytes of it that an interrupted run has written.

    Raises:
        NotEnoughRoom: with what is needed, what is there, and what to do.
    """
    home = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    needs, free = (found.without if device.type == "cpu" else found.with_accelerator).needs, Free.beside(device)
    files = {f"{name}, in files": size for name, size in needs.files.items()}
    shortages = _shortage("host memory", needs.host, free.host, f"take {SMALLER}")
    on_disk = shutil.disk_usage(home).free + written
    shortages += _shortage(f"disk at {home}", {**found.disk, **files}, on_disk, "take an --output on another disk")
    if free.device is not None:
        shortages += _shortage(f"memory on {device}", needs.device, free.device, f"take {SMALLER}, or --device cpu")
    if shortages:
        raise NotEnoughRoom(
            "this compression does not fit:\n  " + "\n  ".join(shortages) + "\n--ignore-estimate goes on."
        )


def _shortage(name: str, needs: Mapping[str, int], free: int, advice: str) -> list[str]:
    needed = sum(needs.values())
    if needed <= free:
        return []
    most = max(needs, key=lambda part: needs[part])
    return [f"{name}: needed {needed / 2**20:,.1f} MiB (most for {most}), free {free / 2**20:,.1f} MiB; {advice}."]
