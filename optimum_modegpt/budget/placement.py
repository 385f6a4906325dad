"""Choose the placement of the residual streams and the batch size from the free memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from optimum_modegpt.architectures.shapes import Shapes
from optimum_modegpt.calibration.transfers import LEAVING, pinned_size
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.methods.cost import ByteCounts, Extent, Peak
from optimum_modegpt.methods.registry import peaks_of

GROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""On Linux: the control groups, and those of this process."""
ENOUGH_TOKENS, MOST_TOKENS = 4096, 65_536
"""Tokens of a forward pass that keep a processor busy, and above which an accelerator gains nothing."""
AT_ONCE = 2 + LEAVING
"""Batches in transfer while an accelerator computes: two arrive and `LEAVING` leave, or three arrive."""
MARGIN = 1.25
"""Preferred ratio of free to needed memory, because allocators cache memory and estimates are not exact."""

Storage = Literal["device", "host", "files"]
"""The storage of residual streams: device memory, host memory, or files."""


@dataclass(frozen=True)
class Free:
    """Free bytes of host memory, and of device memory if the device reports it."""

    host: int
    device: int | None = None

    @classmethod
    def now(cls, device: torch.device) -> Free:
        """Measure the free memory of the host and of `device`."""
        return cls(host_memory(), device_memory(device))


@dataclass(frozen=True)
class Needs:
    """Bytes by purpose: in the memory of each device, in host memory, and in files of streams."""

    device: ByteCounts = field(default_factory=dict)
    host: ByteCounts = field(default_factory=dict)
    files: ByteCounts = field(default_factory=dict)

    def fit(self, free: Free, margin: float) -> bool:
        """Return whether the needs fit in free memory, with a margin."""
        on_device = free.device is None or margin * sum(self.device.values()) <= free.device
        return on_device and margin * sum(self.host.values()) <= free.host


@dataclass(frozen=True)
class Placement:
    """Storage of the streams, windows per batch, whether the refit keeps derivatives, and needs at the peak."""

    streams: Storage
    batch_size: int
    keep_derivatives: bool
    needs: Needs


def choose_placement(
    shapes: Shapes,
    config: ModeGPTConfig,
    extent: Extent,
    *,
    accelerated: bool,
    free: Free,
    held: Needs,
    processes: int = 1,
) -> Placement:
    """Return the fastest placement that fits, or else the one that needs least.

    Streams near the computation come first, then derivatives that are kept, then a large batch. A batch size in
    `config` is kept. `extent` is the calibration of all processes, which share the `free` host memory. `held` are the
    needs of each process in all stages; those in files are in host memory unless the streams are in files.
    """
    windows, near = -(-extent.windows // processes), accelerated and free.device is not None
    sizes = [config.batch_size or min(windows, max(1, (MOST_TOKENS if near else ENOUGH_TOKENS) // extent.length))]
    while config.batch_size is None and sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    large = [size for size in sizes if size >= min(sizes[0], ENOUGH_TOKENS // extent.length)]
    choices: list[tuple[Storage, bool, list[int]]] = [
        ("host", True, large),
        ("host", False, large),
        ("files", False, sizes),
    ]
    if near:
        choices = [("device", True, large), ("device", False, large), *choices]
    placements = []
    for streams, keep, usable in choices:
        for size in usable:
            own = replace(extent, windows=windows, batch=min(windows, size) * extent.length)
            needs = _needs(shapes, own, streams, peaks_of(shapes, config, own, keep), held, accelerated)
            host = {name: processes * amount for name, amount in needs.host.items()}
            files = {name: processes * amount for name, amount in needs.files.items()}
            placements.append(Placement(streams, size, keep, Needs(needs.device, host, files)))
    for margin in (MARGIN, 1):
        for placement in placements:
            if placement.needs.fit(free, margin):
                return placement
    return placements[-1]


def _needs(
    shapes: Shapes, extent: Extent, streams: Storage, peaks: list[Peak], held: Needs, accelerated: bool
) -> Needs:
    """Return the needs of one process."""
    row, files = shapes.d_model * extent.element, {}
    if streams == "device" or (streams == "host" and not accelerated):
        work, apart = _largest([work | kept for work, kept in peaks]), {}
    else:
        work, apart = _largest([work for work, _ in peaks]), _largest([kept for _, kept in peaks])
    if streams == "files":
        host, files = dict(held.host), held.files | apart
    else:
        batch = extent.batch * row
        pinned = pinned_size(batch) / batch  # only an accelerator keeps streams in other memory
        host = held.host | held.files | {name: int(pinned * size) for name, size in apart.items()}
    if not accelerated:
        return Needs({}, host | work, files)
    if streams == "device":
        host["streams to be written"] = 2 * extent.tokens * row
    else:
        work["batches on their way"] = AT_ONCE * extent.batch * row
    return Needs(held.device | work, host, files)


def _largest(needs: list[ByteCounts]) -> ByteCounts:
    return dict(max(needs, key=lambda parts: sum(parts.values())))


def finished_size(shapes: Shapes, config: ModeGPTConfig, element: int) -> ByteCounts:
    """Return the bytes of all compressed blocks with `element` bytes per weight."""
    return {"finished blocks": int((1 - config.sparsity) * shapes.blocks * shapes.weights * element)}


def host_memory() -> int:
    """Return the free bytes of host memory: those of the machine, or of a control group that has less.

    A line of the membership is `4:memory:/a/b` in version 1 of control groups, and `0::/a/b` in version 2. The system
    reclaims inactive file pages.
    """
    free = psutil.virtual_memory().available
    if not MEMBERSHIP.exists():
        return free
    for line in MEMBERSHIP.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        names = ("memory.max", "memory.current", "inactive_file")
        if "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        own = Path(path.lstrip("/"))
        for group in (own, *own.parents):
            folder = GROUPS / controllers / group
            if (folder / names[0]).exists():
                free = min(free, _free_in_group(folder, *names))
    return free


def _free_in_group(group: Path, limit: str, used: str, inactive: str) -> int:
    most = (group / limit).read_text(encoding="utf-8").strip()
    if most == "max":
        return sys.maxsize
    statistics = (group / "memory.stat").read_text(encoding="utf-8").split()
    reclaimable = int(statistics[statistics.index(inactive) + 1])
    return int(most) - int((group / used).read_text(encoding="utf-8")) + reclaimable


def device_memory(device: torch.device) -> int | None:
    """Return the free bytes on an accelerator; None on the host, or if the device does not report it."""
    backend: Any = getattr(torch, device.type, None)
    if device.type == "cpu" or not hasattr(backend, "mem_get_info"):
        return None
    return backend.mem_get_info(device)[0]
