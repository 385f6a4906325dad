"""Compress one model with several processes, each of which has its own share of the calibration windows.

`torchrun` or `accelerate launch` starts them. All sums over tokens go through `all_reduce`, so that all ranks compute
with the same numbers and make the same decisions. With one process, each function returns its argument.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from optimum_modegpt.errors import ProcessError

TIMEOUT = timedelta(minutes=30)
"""Longest wait for another rank, which may read the model from a slower disk."""
MOST_DIMENSIONS = 4
"""Largest number of dimensions of a reduced tensor."""

Value = TypeVar("Value", bound=Tensor | float)


@dataclass(frozen=True)
class _Group:
    rank: int
    world_size: int
    device: torch.device


_joined: _Group | None = None


def world_size() -> int:
    """Return the number of ranks."""
    return 1 if _joined is None else _joined.world_size


def rank() -> int:
    """Return the rank of this process."""
    return 0 if _joined is None else _joined.rank


def is_first() -> bool:
    """Return whether this process is rank 0, which writes and prints."""
    return rank() == 0


def shard(windows: Tensor) -> Tensor:
    """Return the consecutive part of `windows` (n, …) of this rank; it is empty if there are too few windows."""
    return windows.tensor_split(world_size())[rank()]


def all_reduce(value: Value) -> Value:
    """Return the sum of `value` over all ranks. A rank without a tensor to add passes 0.0.

    All ranks must request the same sums in the same order.

    Raises:
        ProcessError: another rank exited or timed out.
    """
    if _joined is None:
        return value
    own = torch.as_tensor(value, dtype=getattr(value, "dtype", torch.float64), device=_joined.device)
    shape = torch.zeros(MOST_DIMENSIONS, dtype=torch.int64, device=_joined.device)
    shape[: own.ndim] = torch.tensor(own.shape, dtype=torch.int64)
    with _process_errors():
        distributed.all_reduce(shape, distributed.ReduceOp.MAX)
        summed = own.expand([size for size in shape.tolist() if size]).clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(summed)
    return summed.to(value.device) if isinstance(value, Tensor) else summed  # pyright: ignore[reportReturnType]


def exclusive_sum(own: int) -> int:
    """Return the sum of `own` over all lower ranks.

    Raises:
        ProcessError: another rank exited or timed out.
    """
    return sum(all_gather_object(own)[: rank()])


def broadcast(choice: Tensor) -> Tensor:
    """Return `choice` of rank 0. Ranks on different machines may round, and so order equal numbers, differently.

    Raises:
        ProcessError: another rank exited or timed out.
    """
    if _joined is None:
        return choice
    shared = choice.to(_joined.device, copy=True).contiguous()
    with _process_errors():
        distributed.broadcast(shared, 0)
    return shared.to(choice.device)


def broadcast_object(value: Any) -> Any:
    """Return the picklable `value` of rank 0.

    Raises:
        ProcessError: another rank exited or timed out.
    """
    return all_gather_object(value)[0]


def all_gather_object(value: Any) -> list[Any]:
    """Return the picklable values of all ranks, in order.

    Raises:
        ProcessError: another rank exited or timed out.
    """
    if _joined is None:
        return [value]
    values = [None] * _joined.world_size
    with _process_errors():
        distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all ranks.

    Raises:
        ProcessError: another rank exited or timed out.
    """
    all_gather_object(None)


@contextmanager
def joined(wanted: torch.device | None) -> Iterator[torch.device | None]:
    """Join the process group in the context, and yield the compute device of this rank.

    Each rank has an accelerator of its own if they are available, unless `wanted` is another kind of device. Without
    other processes, yield `wanted`.

    Raises:
        ProcessError: the processes cannot work together.
    """
    global _joined
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        yield wanted
        return
    device = _own_device(wanted)
    try:
        distributed.init_process_group(timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"WORLD_SIZE={processes}, but the processes cannot connect: {str(error).splitlines()[0]} "
            "Start them with torchrun or accelerate launch; for a single process, unset WORLD_SIZE."
        ) from error
    try:
        _joined = _Group(distributed.get_rank(), processes, device)
        yield device
        barrier()  # if one rank fails before this, all fail
    finally:
        _joined = None
    # Not after an error: this may wait for the other ranks. A failed process exits, which closes its connections.
    distributed.destroy_process_group()


def _own_device(wanted: torch.device | None) -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or (wanted is not None and wanted.type != accelerator.type):
        return wanted or torch.device("cpu")
    if wanted is not None and wanted.index is not None:
        raise ProcessError(
            f"found --device {wanted} with several processes, each of which needs an accelerator of its own. "
            f"Use --device {wanted.type}, or omit it."
        )
    own, available = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    if own >= available:
        raise ProcessError(
            f"process {own + 1} of this machine has no accelerator, found {available}. Start {available} processes, "
            "or compute on the CPU with --device cpu."
        )
    torch.accelerator.set_device_index(own)
    return torch.device(accelerator.type, own)


@contextmanager
def _process_errors() -> Iterator[None]:
    """Raise ProcessError in place of torch's errors if another rank fails."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessError("another rank exited or timed out; see the log of that rank for the cause.") from error
