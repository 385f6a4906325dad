"""Test the order of overlapping copies on a simulated device; test_accelerator uses a real one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

from optimum_modegpt.calibration import transfers
from optimum_modegpt.calibration.streams import map_stream
from optimum_modegpt.calibration.transfers import LEAVING, offload, pinned_size, prefetch, to_host

HOST, AWAY = torch.device("cpu"), torch.device("meta")


class Event:
    """Mark a point of a queue. Its copies run only once the host waits for the event."""

    def __init__(self, name: str, log: list[str], copies: list[Callable[[], Any]]) -> None:
        self.name, self.log, self.copies = name, log, copies

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")
        for copy in self.copies:
            copy()


class Queue:
    """Act as a device stream that logs its calls."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.events, self.copies = name, log, 0, []

    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> None: ...

    def record_event(self) -> Event:
        event = Event(f"{self.name} {self.events}", self.log, self.copies)
        self.log.append(event.name)
        self.events, self.copies = self.events + 1, []
        return event

    def wait_event(self, event: Event) -> None:
        self.log.append(f"{self.name} waits for {event.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    noted: list[str] = []
    queues, copy = {name: Queue(name, noted) for name in ("to", "from", "computing")}, torch.Tensor.copy_

    def send(home: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        assert non_blocking
        queues["from"].copies.append(lambda: copy(home, source))
        return home

    def hold(tensor: torch.Tensor, queue: Queue) -> None:
        noted.append(f"hold {len(tensor)} for {queue.name}")

    monkeypatch.setattr(transfers, "overlaps", lambda device: True)
    monkeypatch.setattr(transfers, "copy_stream", lambda device, direction: queues[direction])
    monkeypatch.setattr(transfers, "pinned", torch.zeros_like)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: queues["computing"])
    monkeypatch.setattr(torch.Tensor, "record_stream", hold)
    monkeypatch.setattr(torch.Tensor, "copy_", send)
    return noted


def test_next_batch_is_sent_before_the_current_one_is_waited_for(log: list[str]) -> None:
    for batch in prefetch((torch.ones(n) for n in (1, 2, 3)), AWAY):
        assert batch.device == AWAY
        log.append(f"compute {len(batch)}")
    assert log == [
        *("to 0", "to 1", "computing waits for to 0", "hold 1 for computing", "compute 1"),
        *("to 2", "computing waits for to 1", "hold 2 for computing", "compute 2"),
        *("computing waits for to 2", "hold 3 for computing", "compute 3"),
    ]


def computed(log: list[str], sizes: Iterable[int]) -> Iterator[torch.Tensor]:
    """Yield tensors of these sizes filled with their size; raise at size 0."""
    for n in sizes:
        if n == 0:
            raise RuntimeError("it fails")
        log.append(f"compute {n}")
        yield torch.full((n,), float(n))


def seen(log: list[str], sizes: Iterable[int]) -> Iterator[int]:
    """Yield the size of each tensor that arrives on the host, after checking its values."""
    for tensor in offload(computed(log, sizes)):
        assert tensor.tolist() == [len(tensor)] * len(tensor)
        log.append(f"see {len(tensor)}")
        yield len(tensor)


def test_tensors_are_yielded_after_their_copy_while_the_next_are_computed(log: list[str]) -> None:
    assert list(seen(log, (1, 2, 3, 4))) == [1, 2, 3, 4]

    def sent(n: int) -> tuple[str, ...]:
        event = f"computing {n - 1}"
        return f"compute {n}", event, f"from waits for {event}", f"from {n - 1}", f"hold {n} for from"

    assert log == [
        *(*sent(1), *sent(2), *sent(3), "host waits for from 0", "see 1"),
        *(*sent(4), "host waits for from 1", "see 2"),
        *("host waits for from 2", "see 3", "host waits for from 3", "see 4"),
    ]


def test_number_of_pending_copies_is_limited(log: list[str]) -> None:
    assert list(seen(log, range(1, 9))) == list(range(1, 9))
    pending = most = 0
    for line in log:
        if line.startswith("hold"):
            pending += 1
        elif line.startswith("host"):
            pending -= 1
        elif line.startswith("compute "):
            most = max(most, pending)
    assert most == LEAVING


def test_error_discards_pending_copies(log: list[str]) -> None:
    found = []
    with pytest.raises(RuntimeError, match="it fails"):
        found.extend(seen(log, (1, 2, 3, 0)))
    assert found == [1]
    assert [line for line in log if line.startswith(("hold", "host"))] == [
        *(f"hold {n} for from" for n in (1, 2, 3)),
        "host waits for from 0",
    ]


def test_single_copy_is_waited_for_at_once(log: list[str]) -> None:
    assert to_host(torch.ones(2)).tolist() == [1, 1]
    assert log[-1] == "host waits for from 0"


def test_map_stream_overlaps_copies_to_the_host_with_computation(log: list[str]) -> None:
    stream = [torch.full((n,), float(n)) for n in (1, 2, 3, 4)]
    found = map_stream(lambda one, other: log.append("compute") or one + other, HOST, stream, stream)
    assert [tensor.tolist() for tensor in found] == [[2 * n] * n for n in (1, 2, 3, 4)]
    order = [line for line in log if line.startswith(("compute", "host"))]
    assert order[:5] == [*(LEAVING + 1) * ["compute"], "host waits for from 0", "compute"]


def test_each_direction_has_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Stream", lambda device: object())
    monkeypatch.setattr(transfers, "copy_stream", functools.cache(transfers.copy_stream.__wrapped__))
    assert transfers.copy_stream(AWAY, "to") is transfers.copy_stream(AWAY, "to")
    assert transfers.copy_stream(AWAY, "to") is not transfers.copy_stream(AWAY, "from")


def test_tensors_on_the_target_device_are_not_copied(log: list[str]) -> None:
    batches = [torch.ones(n, device=AWAY) for n in (1, 2)]
    assert [one is other for one, other in zip(prefetch(batches, AWAY), batches, strict=True)] == [True, True]
    assert log == []


def test_nothing_is_prefetched_on_the_host() -> None:
    asked: list[int] = []

    def batches() -> Iterator[torch.Tensor]:
        for n in (1, 2, 3):
            asked.append(n)
            yield torch.ones(n)

    for batch in prefetch(batches(), HOST):
        assert asked[-1] == len(batch)
    assert list(prefetch([], HOST)) == []
    asked.clear()
    for batch in offload(batches()):
        assert asked[-1] == len(batch)
    assert list(offload([])) == []


def test_to_host_returns_a_host_tensor_itself() -> None:
    tensor = torch.ones(3)
    assert to_host(tensor) is tensor


@pytest.mark.parametrize(("size", "taken"), [(1, 1), (2, 2), (3, 4), (4096, 4096), (4097, 8192)])
def test_pinned_memory_is_allocated_in_powers_of_two(size: int, taken: int) -> None:
    assert pinned_size(size) == taken
