"""Measure the time and peak memory of the stages of a compression."""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from optimum_modegpt.decompositions.psd import accumulation_dtype, products_of, row_type, to_float64
from optimum_modegpt.report import Stage

SAMPLING_SECONDS = 0.02
RATE_REPEATS = 4


def compute_device(wanted: torch.device | str | None, home: torch.device) -> torch.device:
    """Return the compute device: `wanted`, else the accelerator if available, else `home`, the device of the model.

    An accelerator without an index becomes the current one, so that it compares equal to the device of its tensors.
    """
    accelerator, device = torch.accelerator.current_accelerator(check_available=True), home
    if wanted is not None:
        device = torch.device(wanted)
    elif accelerator is not None and home.type != accelerator.type:
        device = accelerator
    if accelerator is not None and device.type == accelerator.type and device.index is None:
        device = torch.device(device.type, torch.accelerator.current_device_index())
    return device


@functools.cache
def product_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return the multiply-adds per second on `device` for a model of this dtype, by the precisions of `Work`.

    The rates are measured once per process.
    """
    # float64 products run on the host if the device does not support float64.
    exact = to_float64(torch.zeros((), device=device)).device
    with products_of(dtype):
        return {
            "own": _product_rate(device, dtype),
            "moments": _product_rate(device, row_type(device, dtype)),
            "raised": _product_rate(device, accumulation_dtype(dtype)),
            "exact": _product_rate(exact, torch.float64),
        }


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best of a few measured rates for square matrices, in multiply-adds per second."""
    width = 512 if device.type == "cpu" else 4096
    square = torch.ones(width, width, dtype=dtype, device=device)
    clock = StageClock(device)
    for repeat in range(RATE_REPEATS):
        with clock.stage(str(repeat)):
            torch.mm(square, square)
    return width**3 / min(stage.seconds for stage in clock.stages)


class StageClock:
    """Collects `Stage`s.

    Peak memory is the peak of the accelerator's allocator, or else the sampled resident size of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        backend = getattr(torch, device.type, None)
        self.allocator: Any = None
        self.memory_kind = "sampled resident size"
        if hasattr(backend, "max_memory_allocated"):
            self.allocator, self.memory_kind = backend, "device memory"
        self.stages: list[Stage] = []

    def in_use(self) -> int:
        """Return the bytes currently in use, from which a peak rises.

        On the host, memory that the C allocator caches is first returned to the operating system.
        """
        if self.allocator:
            return self.allocator.memory_allocated(self.device)
        _give_back()
        return psutil.Process().memory_info().rss

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure time and peak memory of the body, also if it fails."""
        peak = self._allocator_peak() if self.allocator else _resident_peak()
        start = time.perf_counter()
        with peak as measured:
            yield
        self.stages.append(Stage(name, time.perf_counter() - start, max(measured)))

    @contextmanager
    def _allocator_peak(self) -> Iterator[list[int]]:
        measured = [0]
        self.allocator.reset_peak_memory_stats(self.device)
        try:
            yield measured
        finally:
            self.allocator.synchronize(self.device)
            measured.append(self.allocator.max_memory_allocated(self.device))


@contextmanager
def _resident_peak() -> Iterator[list[int]]:
    process, done = psutil.Process(), threading.Event()
    measured = [process.memory_info().rss]

    def sample() -> None:
        while not done.wait(SAMPLING_SECONDS):
            measured.append(process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield measured
    finally:
        done.set()
        thread.join()
        measured.append(process.memory_info().rss)


def _give_back() -> None:
    """Return freed memory to the operating system, because cached memory would hide a rise.

    This works only with the GNU C library.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
