"""Every exception of this package.

ModeGPTError
├── InvalidConfig            a field of the configuration, or a combination of them, cannot be used
├── CalibrationDataError     no usable calibration text: missing, empty, wrong column, too short, not reachable
├── UnsupportedModel         the architecture, or this model's variant of it, is not known
│   └── AlreadyCompressed    the model is a result of this package
├── NumericalError           a moment or an activation cannot be decomposed
├── NotEnoughRoom            memory or disk that are there do not hold what the work needs
├── OutputError              the place where the result should go cannot be used
│   ├── UploadError          the Hub did not take the result, which is complete on this machine
│   └── CheckpointError      unfinished work of a compression that cannot be taken over or written
├── ProcessError             processes that were started to compress together cannot, or one of them ended
└── EvaluationError          the text or the models given to an evaluation cannot be compared
"""

from collections.abc import Iterator
from contextlib import contextmanager


class ModeGPTError(Exception):
    """Root of all errors raised by optimum_modegpt; the message says what was found, what was expected, what to do."""


class InvalidConfig(ModeGPTError, ValueError):
    """A field of the configuration, or a combination of fields, cannot be used."""


class CalibrationDataError(ModeGPTError, ValueError):
    """The calibration data is missing, empty, too short, of the wrong form, or cannot be reached."""


class UnsupportedModel(ModeGPTError, ValueError):
    """The architecture, or this variant of it, is not known."""


class AlreadyCompressed(UnsupportedModel):
    """The model is already a result of this package."""


class NumericalError(ModeGPTError, ArithmeticError):
    """A moment or an activation is not finite, or cannot be decomposed."""


class NotEnoughRoom(ModeGPTError, MemoryError):
    """The memory or the disk that is there does not hold what the work needs."""


class OutputError(ModeGPTError, OSError):
    """The place where the result should go, a folder or a repository, cannot be used."""


class UploadError(OutputError):
    """The Hub refused an upload or could not be reached; the folder is complete, and the message says how to go on."""


class CheckpointError(OutputError):
    """The unfinished work of a compression cannot be taken over or written."""


class ProcessError(ModeGPTError, RuntimeError):
    """Processes that were started to compress a model together cannot, or one of them has ended."""


class EvaluationError(ModeGPTError, ValueError):
    """The text or the models given to an evaluation cannot be scored or compared."""


class IllConditionedWarning(UserWarning):
    """A moment was too ill-conditioned for the usual factorisation; what was done instead stands in the message."""


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Puts `place`, a block or a part, before the message of a NumericalError that comes from inside."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{place}: {error}") from error
