"""Text for terminals: control characters and characters that the stream cannot encode are escaped.

Text that a model wrote must not act as a command to the terminal, and printing must not fail after the work is done.
"""

from __future__ import annotations

import re
from io import TextIOWrapper
from typing import Any, TextIO

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters except tab and newline, which begin escape sequences, and those that change the text direction."""


def printable(text: str) -> str:
    """Return the text with every control character escaped, as in `\\x1b`."""
    return CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def one_line(value: Any) -> str:
    """Return a value in one line, so that it cannot imitate another line of the output."""
    return printable(str(value).replace("\n", "\\n"))


def replace_characters(*streams: TextIO) -> None:
    """Let these streams escape the characters that they cannot encode, as in `\\u51fa`, instead of raising an error.

    Logging and progress bars write to the same streams. Streams without an encoding, such as those of notebooks, accept
    any character.
    """
    for stream in streams:
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class PlainOutput:
    """A text stream that writes `printable` text."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
