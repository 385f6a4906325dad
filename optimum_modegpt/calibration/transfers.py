"""Copies from the host to an accelerator, beside the computing where the accelerator can do both at once.

What comes back waits for the computing that it is the result of, and the computing for it; it goes into pinned memory,
from which the next copy comes beside the computing. From other memory and from files a copy holds up the host instead.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def overlaps(device: torch.device) -> bool:
    """Whether copies to `device` can run while it computes."""
    return device.type != "cpu" and hasattr(torch.get_device_module(device), "Stream")


@functools.cache
def copies_to(device: torch.device) -> torch.Stream:
    """The one queue of copies: memory that was freed in one is of no use to another."""
    return torch.Stream(device=device)


def arriving(batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The batches on `device`, in their order; from the host, each is on its way while the one before is computed with.

    A copy has a queue of its own: computing waits for that copy alone, and its memory is not given away before the
    computing that was queued until then is done.
    """
    if not overlaps(device):
        yield from (batch.to(device) for batch in batches)
        return
    copying, computing = copies_to(device), torch.accelerator.current_stream(device)

    def sent(batch: Tensor) -> tuple[Tensor, Any]:
        if batch.device == device:
            return batch, None
        with copying:
            return batch.to(device, non_blocking=True), copying.record_event()

    for batch, arrival in _one_ahead(map(sent, batches)):
        if arrival is not None:
            computing.wait_event(arrival)
            batch.record_stream(computing)  # pyright: ignore[reportArgumentType]
        yield batch
        del batch  # while the next but one is sent


def to_host(tensor: Tensor) -> Tensor:
    """`tensor` in host memory, from an accelerator in pages that stay where they are: its copies need no detour."""
    if tensor.device.type == "cpu" or not overlaps(tensor.device):
        return tensor.to("cpu")
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def pinned_size(size: int) -> int:
    """Bytes that `to_host` takes for `size`: torch rounds up to a power of two."""
    return 1 << (size - 1).bit_length()


def _one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The items, each after the next one was asked for."""
    waiting: list[Any] = []
    for item in items:
        waiting.append(item)
        if len(waiting) == 2:
            yield waiting.pop(0)
    yield from waiting
