"""Whether a compression fits into the memory and onto the disk that are there, before any weight is read."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from optimum_modegpt.errors import NotEnoughRoom
from optimum_modegpt.evaluation.estimate import Estimate

CGROUP = Path("/sys/fs/cgroup")
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
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    on_host = found.cpu_only_memory if device.type == "cpu" else found.cpu_memory
    shortages = [
        *_shortage("host memory", on_host, host_memory(), f"take {SMALLER}"),
        *_shortage(
            f"disk at {place}", found.disk, shutil.disk_usage(place).free + written, "take an --output on another disk"
        ),
    ]
    if (free := device_memory(device)) is not None:
        shortages += _shortage(f"memory on {device}", found.device_memory, free, f"take {SMALLER}, or --device cpu")
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


def host_memory() -> int:
    """Bytes of host memory that can still be taken: of the machine, or of the control group where that has less."""
    left, machine = _left_in_group(), psutil.virtual_memory().available
    return machine if left is None else min(machine, left)


def _left_in_group() -> int | None:
    """Of the control group, None where it has no limit; file pages that are not in use are given back."""
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        fields = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except FileNotFoundError:  # no control groups, or of the first version
        return None
    return None if limit == "max" else int(limit) - int(used) + int(fields["inactive_file"])


def device_memory(device: torch.device) -> int | None:
    """Free bytes on an accelerator; None where it does not say, and on the host."""
    backend: Any = getattr(torch, device.type, None)
    if device.type == "cpu" or not hasattr(backend, "mem_get_info"):
        return None
    return backend.mem_get_info(device)[0]
