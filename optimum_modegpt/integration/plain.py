"""What a model says of itself, or writes, reaches a terminal as text and never as a command to it."""

from __future__ import annotations

import re
from typing import Any, TextIO

COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and newline, escape sequences with them, and what reverses the direction of reading."""


def printable(text: str) -> str:
    """The text with every control character written out, as in `\\x1b`."""
    return COMMANDS.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def one_line(value: Any) -> str:
    """A value in one line, so that it cannot pass for a line of ours."""
    return printable(str(value).replace("\n", "\\n"))


class PlainOutput:
    """A stream of text that passes on what is `printable`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes the text; the number of its characters."""
        self._stream.write(printable(text))
        return len(text)

    def flush(self) -> None:
        """As the stream's."""
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
