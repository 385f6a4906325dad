"""The compression that the arguments of a running `from_pretrained` request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

# transformers imports this module during its own import.
if TYPE_CHECKING:
    from optimum_modegpt.config import ModeGPTConfig
    from optimum_modegpt.loading.source import Source
    from optimum_modegpt.walk.checkpoint import Checkpoint


@dataclass(frozen=True)
class Job:
    """The model to compress, the settings, and the folder for finished blocks, if any."""

    config: ModeGPTConfig
    source: Source
    checkpoint: Checkpoint | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Pass this job to the quantizer of a `from_pretrained` that is called inside the context."""
        token = _JOB.set(self)
        try:
            yield
        finally:
            _JOB.reset(token)


_JOB: ContextVar[Job | None] = ContextVar("modegpt_job", default=None)


def running_job() -> Job | None:
    """Return the job of the running `from_pretrained`; None if it has none."""
    return _JOB.get()
