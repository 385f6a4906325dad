"""All exceptions of this package.

ModeGPTError
├── InvalidConfig            a field of the configuration, or a combination of them, cannot be used
├── CalibrationDataError     the calibration text is missing, empty, too short, unreachable or in a wrong column
├── UnsupportedModel         the architecture, or this variant of it, is not supported
│   └── AlreadyCompressed    the model was already compressed by this package
├── NumericalError           a moment or an activation is not finite or cannot be decomposed
├── InsufficientResources    not enough memory or disk space for this compression
├── OutputError              the output directory or repository cannot be used
│   ├── UploadError          the upload to the Hub failed; the local result is complete
│   └── CheckpointError      a checkpoint cannot be resumed or written
├── ProcessError             the processes of a distributed run cannot work together, or one of them exited
└── EvaluationError          the text or the models of an evaluation cannot be scored or compared
"""

from collections.abc import Iterator
from contextlib import contextmanager


class ModeGPTError(Exception):
    """Base class of all errors raised by optimum_modegpt.

    The message names the value found, the value expected and the remedy.
    """


class InvalidConfig(ModeGPTError, ValueError):
    """A field of the configuration, or a combination of fields, cannot be used."""


class CalibrationDataError(ModeGPTError, ValueError):
    """The calibration data is missing, empty, too short, in the wrong format or unreachable."""


class UnsupportedModel(ModeGPTError, ValueError):
    """The architecture, or this variant of it, is not supported."""


class AlreadyCompressed(UnsupportedModel):
    """The model was already compressed by this package."""


class NumericalError(ModeGPTError, ArithmeticError):
    """A moment or an activation is not finite or cannot be decomposed."""


class InsufficientResources(ModeGPTError, MemoryError):
    """Not enough memory or disk space for this compression."""


NotEnoughRoom = InsufficientResources
"""The earlier name."""


class OutputError(ModeGPTError, OSError):
    """The output directory or repository cannot be used."""


class UploadError(OutputError):
    """The Hub refused an upload or could not be reached.

    The local folder is complete, and the message says how to continue.
    """


class CheckpointError(OutputError):
    """The checkpoint of a compression cannot be resumed or written."""


class ProcessError(ModeGPTError, RuntimeError):
    """The processes of a distributed run cannot work together, or one of them exited."""


class EvaluationError(ModeGPTError, ValueError):
    """The text or the models given to an evaluation cannot be scored or compared."""


class IllConditionedWarning(UserWarning):
    """A moment was too ill-conditioned for the usual factorisation. The message names the fallback that was used."""


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Prefix the message of a NumericalError raised in the body with `place`, the name of a block or a part."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{place}: {error}") from error
