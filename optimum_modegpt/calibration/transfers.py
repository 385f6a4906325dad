"""Copy tensors between the host and an accelerator, and overlap the copies with computation if the device can.

Both iterators, `prefetch` and `offload`, yield a tensor only after its copy has completed. Offload
copies to pinned memory, so that the next prefetch of the tensor overlaps with computation. Copies from pageable memory,
and to and from files, block the host instead.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

LEAVING = 2
"""Maximum number of pending copies to the host while the next tensor is computed. A pass that produces two tensors per
batch still overlaps."""


def overlaps(device: torch.device) -> bool:
    """Return whether copies to and from `device` can overlap with its computation."""
    return device.type != "cpu" and hasattr(torch.get_device_module(device), "Stream")


@functools.cache
def copy_stream(device: torch.device, direction: Literal["to", "from"]) -> torch.Stream:
    """Return the only copy stream for this direction, because a stream cannot reuse memory freed in another stream.

    Copies in opposite directions do not wait for each other, because the bus transfers both at the same time.
    """
    return torch.Stream(device=device)


def prefetch(batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Prefetch batches to `device`, in order. The copy of a batch overlaps with computation on the previous one.

    Copies use a separate stream. Computation waits only for the copy of its own batch, and the memory of a batch is not
    reused before the computation queued until then is done.
    """
    if not overlaps(device):
        for batch in batches:
            yield batch.to(device)
        return
    copying, computing = copy_stream(device, "to"), torch.accelerator.current_stream(device)

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
        del batch  # free it while the next but one is copied


def offload(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Offload tensors to host memory, in order. Each copy overlaps with the computation of the next tensors.

    A copy waits for the computation queued before it, and the memory of its source is not reused before the copy is
    done. At most `LEAVING` copies are pending when the next tensor is requested. If computing that tensor fails, the
    pending copies are dropped. This is safe, because both allocators know the stream that uses the memory.
    """
    waiting: deque[tuple[Tensor, Any]] = deque()
    for sent in map(_sent_home, tensors):
        waiting.append(sent)
        while waiting and (len(waiting) > LEAVING or waiting[0][1] is None):
            yield _arrived(*waiting.popleft())
    while waiting:
        yield _arrived(*waiting.popleft())


def to_host(tensor: Tensor) -> Tensor:
    """Copy `tensor` to host memory, and block until the copy is done. From an accelerator, the memory is pinned."""
    return _arrived(*_sent_home(tensor))


def _sent_home(tensor: Tensor) -> tuple[Tensor, Any]:
    """Start a copy of `tensor` to the host. Return it with its completion event, or None if it is already complete."""
    device = tensor.device
    if not overlaps(device):
        return tensor.to("cpu"), None
    copying, computing = copy_stream(device, "from"), torch.accelerator.current_stream(device)
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
    """Allocate page-locked host memory for a tensor like `tensor`, so that copies need no staging buffer."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def pinned_size(size: int) -> int:
    """Return the bytes that `pinned` allocates for `size` bytes, which torch rounds up to a power of two."""
    return 1 << (size - 1).bit_length()


def _one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Yield each item after the next one was requested."""
    waiting: list[Any] = []
    for item in items:
        waiting.append(item)
        if len(waiting) == 2:
            yield waiting.pop(0)
    yield from waiting
