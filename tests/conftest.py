"""Configure the test suite and provide shared fixtures."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

# Set before torch and transformers are imported; subprocesses of the tests inherit it. No test uses the network.
# One thread gives one order of summation, so that results of several processes are bit-identical.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import pytest
import torch
from checkpoints import empty_picture
from rates import set_rate_in_16_bits

from optimum_modegpt.decompositions.psd import row_type
from optimum_modegpt.hub import card
from optimum_modegpt.methods import input_refit

torch.set_num_threads(1)

# A shell that starts the suite in the background makes it and its subprocesses ignore Ctrl-C. Some tests send Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Exempt the imported modules from garbage collection. Some libraries collect after every small step."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def empty_pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave the pictures of model cards empty, except in test_card.py, because drawing takes most of a save."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name != "test_card.py":
            patch.setattr(card, "plot_kept", empty_picture)
        yield


@pytest.fixture(autouse=True)
def few_tokens_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let gate and up be refitted also with the few tokens of a test."""
    monkeypatch.setattr(input_refit, "TOKENS_PER_ROW", 0)


@pytest.fixture
def fast_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let 16-bit products be as fast as those of float32, as on an accelerator."""
    set_rate_in_16_bits(monkeypatch, 1.0)


@pytest.fixture
def slow_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let 16-bit products be slow, as on most CPUs."""
    set_rate_in_16_bits(monkeypatch, 7.0)


class Sums(list[torch.dtype]):
    """Record the dtypes of the multiplied rows. If `rounds` is set, the products are rounded to 16 bits."""

    rounds = False


@pytest.fixture
def sums_in_float32() -> Iterator[Sums]:
    """Give the CPU the accelerators' product of 16-bit rows with float32 sums, and record the dtypes of the rows."""
    calls = Sums()

    def product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        calls.append(left.dtype)
        exact = left.to(dtype) @ right.to(dtype)
        return exact.to(left.dtype).to(dtype) if calls.rounds else exact

    def product_into(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, *, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(product(left, right, dtype))

    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("mm.dtype", product, "CPU")
    kernels.impl("mm.dtype_out", product_into, "CPU")
    row_type.cache_clear()
    yield calls
    kernels._destroy()
    row_type.cache_clear()
