"""How a compression uses the memory that is free: where the residual streams are kept, how many windows go at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from optimum_modegpt.budget.memory import ByteCounts, Peak, peaks
from optimum_modegpt.budget.work import Extent, Shapes
from optimum_modegpt.calibration.transfers import LEAVING, pinned_size
from optimum_modegpt.config import ModeGPTConfig

GROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Of Linux: the control groups, and those that this process is in."""

ENOUGH_TOKENS, MOST_TOKENS = 4096, 65_536
"""Tokens of a forward pass: with the first a processor is busy, more than the second do not help an accelerator."""

AT_ONCE = 2 + LEAVING
"""Batches on their way while an accelerator computes: those of two streams come and `LEAVING` go, or three come."""
MARGIN = 1.25
"""How often what is counted has to fit, if it can: allocators keep back what is freed, and counts are a little off."""

Streams = Literal["device", "host", "files"]
"""Where residual streams are kept: in the accelerator's memory, in the host's, in files."""


@dataclass(frozen=True)
class Free:
    """Bytes that can still be taken: of the host's memory, and of the accelerator's; None without one that says it."""

    host: int
    device: int | None = None

    @classmethod
    def beside(cls, device: torch.device) -> Free:
        """What is free now where the work is done on `device`."""
        return cls(host_memory(), device_memory(device))


@dataclass(frozen=True)
class Needs:
    """Bytes by what takes them: in the accelerator's memory, in the host's, in files of streams."""

    device: ByteCounts = field(default_factory=dict)
    host: ByteCounts = field(default_factory=dict)
    files: ByteCounts = field(default_factory=dict)


@dataclass(frozen=True)
class Arrangement:
    """Where residual streams are kept, windows per forward pass, whether the refit of gate and up keeps its derivatives
    from one iteration to the next, and what is needed at the peak with all that."""

    streams: Streams
    batch_size: int
    keep_derivatives: bool
    needs: Needs


def arrange(
    shapes: Shapes,
    config: ModeGPTConfig,
    *,
    extent: Extent,
    accelerated: bool,
    free: Free,
    besides: Needs,
    processes: int = 1,
) -> Arrangement:
    """The fastest arrangement that fits; where none does, the one that needs least.

    Streams are kept as near as they can be with `ENOUGH_TOKENS` at once, then derivatives where there is room, then as
    many windows go at once as pay.

    Args:
        shapes: of the model.
        config: what to do; its batch size, where it has one, is not questioned.
        extent: of all processes; the batch is chosen here.
        accelerated: whether the work is done on an accelerator.
        free: what can be taken.
        besides: what is held all along; what it says of files is held on the host while streams are in memory.
        processes: how many share the windows and the host; what is needed is what each of them needs.
    """
    windows, length = -(-extent.windows // processes), extent.length
    free = replace(free, host=free.host // processes)
    most = MOST_TOKENS if accelerated and free.device is not None else ENOUGH_TOKENS
    sizes = [config.batch_size] if config.batch_size else _batch_sizes(windows, length, most)
    least = min(sizes[0], max(1, ENOUGH_TOKENS // length))
    near: tuple[Streams, ...] = ("device", "host") if accelerated and free.device is not None else ("host",)
    options: list[tuple[Streams, bool, int]] = [
        (streams, keep, size) for streams in near for keep in (True, False) for size in sizes if size >= least
    ]
    arrangements = []
    for streams, keep, size in [*options, *(("files", False, size) for size in sizes)]:
        own = Extent(windows, length, min(windows, size) * length, extent.element)
        batch = own.batch * shapes.d_model * own.element
        pinned = pinned_size(batch) / batch if accelerated and streams == "host" else 1.0
        needs = _needs(peaks(shapes, config, own, keep), streams, accelerated, besides, pinned)
        if accelerated and streams != "device":
            needs.device["batches on their way"] = AT_ONCE * batch
        if streams == "device":
            needs.host["streams to be written"] = 2 * own.tokens * shapes.d_model * own.element
        arrangements.append(Arrangement(streams, size, keep, needs))
    fitting = (each for margin in (MARGIN, 1) for each in arrangements if _fits(each.needs, free, margin))
    return next(fitting, arrangements[-1])


def finished_size(shapes: Shapes, config: ModeGPTConfig, element: int) -> ByteCounts:
    """The compressed blocks, all of them, at `element` bytes a weight."""
    return {"finished blocks": int((1 - config.sparsity) * shapes.blocks * shapes.weights * element)}


def _batch_sizes(windows: int, length: int, tokens: int) -> list[int]:
    """Windows of at most `tokens`, then of half of them, and so on down to one window."""
    sizes = []
    while tokens >= length:
        sizes.append(min(windows, tokens // length))
        tokens //= 2
    return sizes or [1]


def _needs(found: list[Peak], streams: Streams, accelerated: bool, besides: Needs, pinned: float) -> Needs:
    """`pinned`: how many times their size streams on the host take."""
    beside_work = streams == "device" or (streams == "host" and not accelerated)
    work = _largest({**moment.work, **moment.streams} if beside_work else moment.work for moment in found)
    apart = {} if beside_work else _largest(moment.streams for moment in found)
    apart = {name: int(pinned * size) for name, size in apart.items()}
    if streams == "files":
        host, files = besides.host, {**besides.files, **apart}
    else:
        host, files = {**besides.host, **besides.files, **apart}, {}
    if accelerated:
        return Needs({**besides.device, **work}, dict(host), files)
    return Needs({}, {**host, **work}, files)


def _largest(needs: Iterable[ByteCounts]) -> ByteCounts:
    return max(needs, key=lambda parts: sum(parts.values()))


def _fits(needs: Needs, free: Free, margin: float) -> bool:
    on_device = free.device is None or margin * sum(needs.device.values()) <= free.device
    return on_device and margin * sum(needs.host.values()) <= free.host


# -------------------------------------------------------------------------------------------------------- what is free


def host_memory() -> int:
    """Bytes of host memory that can still be taken: of the machine, or of a control group where that has less."""
    return min((psutil.virtual_memory().available, *_left_in_groups()))


def _left_in_groups() -> Iterator[int]:
    """Of each control group with a limit that this process is in, up to the outermost that is seen from here.

    A line of the membership is `4:memory:/a/b` in the first version of control groups, `0::/a/b` in the second.
    """
    for line in MEMBERSHIP.read_text(encoding="utf-8").splitlines() if MEMBERSHIP.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            names = "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        own = Path(path.lstrip("/"))
        for group in (GROUPS / controllers / each for each in (own, *own.parents)):
            if (group / names[0]).exists():
                yield from _left_in(group, *names)


def _left_in(group: Path, limit: str, used: str, inactive: str) -> Iterator[int]:
    """Nothing where there is no limit; file pages that are not in use are given back."""
    most, taken = ((group / name).read_text(encoding="utf-8").strip() for name in (limit, used))
    fields = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
    if most != "max":
        yield int(most) - int(taken) + int(fields[inactive])


def device_memory(device: torch.device) -> int | None:
    """Free bytes on an accelerator; None where it does not say, and on the host."""
    backend: Any = getattr(torch, device.type, None)
    if device.type == "cpu" or not hasattr(backend, "mem_get_info"):
        return None
    return backend.mem_get_info(device)[0]
