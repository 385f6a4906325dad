"""Guards around the stages of a compression: memory, evaluation mode, warnings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from optimum_modegpt import distributed
from optimum_modegpt.errors import IllConditionedWarning
from optimum_modegpt.walk.request import Request
from optimum_modegpt.walk.state import State

Result = TypeVar("Result")


def retrying_on_oom(name: str, work: Callable[[Request, State], Result], request: Request, state: State) -> Result:
    """Run a stage. If memory runs out, repeat it once with half the batch size, which later stages keep.

    A distributed run does not retry, because the other ranks would wait for this rank's sums.
    """
    with state.clock.stage(name):
        try:
            return work(request, state)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error) or state.batch_size == 1 or distributed.world_size() > 1:
                raise
        # The memory is free only here: while an error is handled, its traceback holds the tensors.
        halved = state.batch_size // 2
        state.warn(f"{name}: out of memory with batch_size={state.batch_size}; started again with {halved}.")
        state.halve_batch_size(request)
        return work(request, state)


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether an accelerator or the host ran out of memory. torch has no error class for the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Disable dropout. Restore the modes of all modules on exit."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def collected_warnings(state: State) -> Iterator[None]:
    """Record every numerical fallback for the report. Other warnings are shown as usual."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", IllConditionedWarning)
        show = warnings.showwarning

        def record(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, IllConditionedWarning):
                state.warn(str(message))
            else:
                show(message, category, *place, **more)

        warnings.showwarning = record
        yield
