"""The processes that compress one model together, each on its own share of the calibration windows.

`torchrun` or `accelerate launch` starts them. Every sum over tokens goes through `total`, so all of them go on with the
same numbers and come to the same decisions. A process alone gets back from each function what it gave.
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
"""Longest that a process waits for the others: they may read a model from disks that differ in speed."""
MOST_DIMENSIONS = 4
"""Of a tensor that is summed."""

Value = TypeVar("Value", bound=Tensor | float)


@dataclass(frozen=True)
class _Group:
    rank: int
    world_size: int
    device: torch.device


_joined: _Group | None = None


def world_size() -> int:
    """How many processes work together."""
    return 1 if _joined is None else _joined.world_size


def rank() -> int:
    """Of this process among them, from 0."""
    return 0 if _joined is None else _joined.rank


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def shard(windows: Tensor) -> Tensor:
    """This process's part of windows (n, …): consecutive ones, none where there are fewer windows than processes."""
    return windows if _joined is None else windows.tensor_split(_joined.world_size)[_joined.rank]


def all_reduce(value: Value) -> Value:
    """The sum of `value` over all processes; one that has nothing to add to a float64 tensor gives 0.0.

    All of them must ask for the same sums in the same order.

    Raises:
        ProcessError: another process has ended, or does not come.
    """
    if _joined is None:
        return value
    own = torch.as_tensor(value, dtype=getattr(value, "dtype", torch.float64), device=_joined.device)
    shape = torch.zeros(MOST_DIMENSIONS, dtype=torch.int64, device=_joined.device)
    shape[: own.ndim] = torch.tensor(own.shape, dtype=torch.int64)
    with _together():
        distributed.all_reduce(shape, distributed.ReduceOp.MAX)
        summed = own.expand([size for size in shape.tolist() if size]).clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(summed)
    return summed.to(value.device) if isinstance(value, Tensor) else summed  # pyright: ignore[reportReturnType]


def exclusive_sum(own: int) -> int:
    """How many there are in the processes before this one, where each has `own`."""
    if _joined is None:
        return 0
    counts = torch.zeros(_joined.world_size, dtype=torch.int64)
    counts[_joined.rank] = own
    return int(all_reduce(counts)[: _joined.rank].sum())


def broadcast(choice: Tensor) -> Tensor:
    """The first process's `choice`: equal numbers may be ordered differently where two machines round differently.

    Raises:
        ProcessError: another process has ended, or does not come.
    """
    if _joined is None:
        return choice
    shared = choice.to(_joined.device, copy=True).contiguous()
    with _together():
        distributed.broadcast(shared, 0)
    return shared.to(choice.device)


def broadcast_object(value: Any) -> Any:
    """The first process's `value`, which can be pickled; that of the others counts for nothing.

    Raises:
        ProcessError: another process has ended, or does not come.
    """
    return all_gather_object(value)[0]


def all_gather_object(value: Any) -> list[Any]:
    """The values of all processes, which can be pickled, the first one's first.

    Raises:
        ProcessError: another process has ended, or does not come.
    """
    if _joined is None:
        return [value]
    values = [None] * _joined.world_size
    with _together():
        distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Goes on when all processes have come here.

    Raises:
        ProcessError: another process has ended, or does not come.
    """
    all_gather_object(None)


@contextmanager
def joined(wanted: torch.device | None) -> Iterator[torch.device | None]:
    """Inside, this process works with those that were started with it; the device for it to compute on, or `wanted`
    where it is alone.

    With accelerators, each process takes one of its own, unless another kind of device is wanted.

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
            f"WORLD_SIZE says {processes} processes, but they do not find each other: {str(error).splitlines()[0]} "
            "Start them with torchrun or accelerate launch; for one alone, unset WORLD_SIZE."
        ) from error
    try:
        _joined = _Group(distributed.get_rank(), processes, device)
        yield device
        barrier()  # where one fails until here, all do
    finally:
        _joined = None
    # Only now: to take leave may wait for the others. A process that failed just ends, and its connections with it.
    distributed.destroy_process_group()


def _own_device(wanted: torch.device | None) -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or (wanted is not None and wanted.type != accelerator.type):
        return wanted or torch.device("cpu")
    if wanted is not None and wanted.index is not None:
        raise ProcessError(
            f"--device {wanted} with several processes: each takes an accelerator of its own. "
            f"Say --device {wanted.type}, or nothing."
        )
    own, there = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    if own >= there:
        raise ProcessError(
            f"process {own + 1} of this machine has no accelerator of its own, there are {there}: start {there} "
            "processes, or compute on the processor with --device cpu."
        )
    torch.accelerator.set_device_index(own)
    return torch.device(accelerator.type, own)


@contextmanager
def _together() -> Iterator[None]:
    """What torch says where another process fails is one message."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            "another process of this run has ended or does not answer; its own message says why."
        ) from error
