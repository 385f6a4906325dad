"""Settings of the whole suite."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

# Before torch and transformers are imported, and for the processes that tests start too. No test touches the network.
# Bit-equality across processes needs one order of summation, and tiny models are fastest on one thread.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import pytest
import torch

from optimum_modegpt.decompositions.psd import row_type

torch.set_num_threads(1)

# A shell that runs the suite in the background has it ignore Ctrl-C, and the processes that tests interrupt with it.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Sums(list[torch.dtype]):
    """The types of the rows that were multiplied; `rounds` lets the sums lose their digits."""

    rounds = False


@pytest.fixture
def sums_in_float32() -> Iterator[Sums]:
    """A processor whose products of 16-bit rows have float32 sums, as accelerators have them; the rows' types."""
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
