"""Copies between the host and an accelerator, beside the computing where the accelerator can do both at once.

Who takes tensors from `arriving` and `leaving` finds them there: a copy on its way is in nobody's hands. What leaves
goes into pinned memory, from which the next copy comes beside the computing. From other memory, and to and from files,
a copy holds up the host instead.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

LEAVING = 2
"""Most tensors on their way to the host while the next is computed: a pass that makes two a batch goes on beside."""


def overlaps(device: torch.device) -> bool:
    """Whether copies to `device` and from it can run while it computes."""
    return device.type != "cpu" and hasattr(torch.get_device_module(device), "Stream")


@functools.cache
def copies(device: torch.device, direction: Literal["to", "from"]) -> torch.Stream:
    """The one queue of copies in that direction: memory that was freed in one is of no use to another.

    The directions do not wait for each other; the wires between host and accelerator carry both at once.
    """
    return torch.Stream(device=device)


def arriving(batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The batches on `device`, in their order; from the host, each is on its way while the one before is computed with.

    A copy has a queue of its own: computing waits for that copy alone, and its memory is not given away before the
    computing that was queued until then is done.
    """
    if not overlaps(device):
        yield from (batch.to(device) for batch in batches)
        return
    copying, computing = copies(device, "to"), torch.accelerator.current_stream(device)

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


def leaving(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors in host memory, in their order, each once it has arrived; the next are computed while it is copied.

    A copy waits for what was queued when it was sent, and its source is not given away before it is done. At most
    `LEAVING` are on their way when the next tensor is asked for. Where that fails, what is on its way is dropped: both
    allocators know the queue that uses its memory.
    """
    waiting: deque[tuple[Tensor, Any]] = deque()
    for sent in map(_sent_home, tensors):
        waiting.append(sent)
        while waiting and (len(waiting) > LEAVING or waiting[0][1] is None):
            yield _arrived(*waiting.popleft())
    while waiting:
        yield _arrived(*waiting.popleft())


def to_host(tensor: Tensor) -> Tensor:
    """`tensor` in host memory, there when this returns; from an accelerator in pinned memory."""
    return _arrived(*_sent_home(tensor))


def _sent_home(tensor: Tensor) -> tuple[Tensor, Any]:
    """Memory of the host that `tensor` is copied into, and the event of its arrival; None where it is there already."""
    device = tensor.device
    if not overlaps(device):
        return tensor.to("cpu"), None
    copying, computing = copies(device, "from"), torch.accelerator.current_stream(device)
    copying.wait_event(computing.record_event())
    with copying:
        home = pinned(tensor).copy_(tensor, non_blocking=True)
        arrival = copying.record_event()
    tensor.record_stream(copying)  # pyright: ignore[reportArgumentType]
    return home, arrival


def _arrived(home: Tensor, arrival: Any) -> Tensor:
    if arrival is not None:
        arrival.synchronize()
    return home


def pinned(tensor: Tensor) -> Tensor:
    """Memory of the host for such a tensor, in pages that stay where they are: copies need no detour."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def pinned_size(size: int) -> int:
    """Bytes that `pinned` takes for `size`: torch rounds up to a power of two."""
    return 1 << (size - 1).bit_length()


def _one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The items, each after the next one was asked for."""
    waiting: list[Any] = []
    for item in items:
        waiting.append(item)
        if len(waiting) == 2:
            yield waiting.pop(0)
    yield from waiting
