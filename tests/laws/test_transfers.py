"""Copies beside the computing: what waits for what, on a device that is simulated (a real one: test_accelerator)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from optimum_modegpt.calibration import transfers
from optimum_modegpt.calibration.transfers import arriving, pinned_size, to_host

HOST, AWAY = torch.device("cpu"), torch.device("meta")


class Queue:
    """A stream that notes what it is asked for."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.copies = log, 0

    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> None: ...

    def record_event(self) -> int:
        self.log.append(f"copy {self.copies}")
        self.copies += 1
        return self.copies - 1

    def wait_event(self, event: int) -> None:
        self.log.append(f"wait for {event}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    noted: list[str] = []
    monkeypatch.setattr(transfers, "overlaps", lambda device: device == AWAY)
    monkeypatch.setattr(transfers, "copies_to", lambda device: Queue(noted))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: Queue(noted))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, queue: noted.append(f"hold {len(tensor)}"))
    return noted


def test_the_next_batch_is_sent_before_this_one_is_waited_for(log: list[str]) -> None:
    for batch in arriving((torch.ones(n) for n in (1, 2, 3)), AWAY):
        assert batch.device == AWAY
        log.append(f"compute {len(batch)}")
    assert log == [
        *("copy 0", "copy 1", "wait for 0", "hold 1", "compute 1"),
        *("copy 2", "wait for 1", "hold 2", "compute 2"),
        *("wait for 2", "hold 3", "compute 3"),
    ]


def test_what_is_there_already_is_not_copied(log: list[str]) -> None:
    batches = [torch.ones(n, device=AWAY) for n in (1, 2)]
    assert [one is other for one, other in zip(arriving(batches, AWAY), batches, strict=True)] == [True, True]
    assert log == []


def test_on_the_host_nothing_is_asked_for_ahead() -> None:
    asked: list[int] = []

    def batches() -> Iterator[torch.Tensor]:
        for n in (1, 2, 3):
            asked.append(n)
            yield torch.ones(n)

    for batch in arriving(batches(), HOST):
        assert asked[-1] == len(batch)
    assert list(arriving([], HOST)) == []


def test_what_is_on_the_host_stays_what_it_is() -> None:
    tensor = torch.ones(3)
    assert to_host(tensor) is tensor


@pytest.mark.parametrize(("size", "taken"), [(1, 1), (2, 2), (3, 4), (4096, 4096), (4097, 8192)])
def test_pinned_memory_is_taken_in_powers_of_two(size: int, taken: int) -> None:
    assert pinned_size(size) == taken
