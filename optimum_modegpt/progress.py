"""Show the progress of long work: a bar on a terminal or in a notebook, one plain line per minute in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

from tqdm import tqdm
from tqdm.auto import tqdm as auto_tqdm

INTERVAL = 60.0
"""Seconds between two lines, and before the first one. Work that takes less time prints no line."""

Style = Literal["bars", "lines", "nothing"]
_STYLE: ContextVar[Style] = ContextVar("style", default="bars")


def style() -> Style:
    """Return the current progress style: bars, unless `shown_as` selects another one."""
    return _STYLE.get()


@contextmanager
def shown_as(style: Style) -> Iterator[None]:
    """Show progress in this style within the context."""
    token = _STYLE.set(style)
    try:
        yield
    finally:
        _STYLE.reset(token)


def bar(
    iterable: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    shown: bool = True,
) -> Any:
    """Return a progress bar, a `tqdm` or `Lines`, for a loop or for calls of `update`.

    Args:
        iterable: the items of the loop, if the bar wraps a loop.
        desc: the name of the work.
        unit: the name of a step.
        total: the number of steps. Defaults to the length of `iterable`.
        initial: the number of steps that an earlier run finished.
        shown: whether to show anything.
    """
    given: dict[str, Any] = {"desc": desc, "unit": unit, "total": total, "initial": initial}
    if shown and style() == "lines":
        return Lines(iterable, **given)
    return auto_tqdm(iterable, **given, disable=not shown or style() == "nothing")


class Lines:
    """Prints the progress every `INTERVAL` seconds until the work ends. It has the interface of a `tqdm`."""

    def __init__(self, iterable: Any, *, desc: str, unit: str, total: int | None, initial: int) -> None:
        self.iterable, self.desc, self.unit = iterable, desc, unit
        self.total = len(iterable) if total is None else total
        self.n = self.initial = initial
        self.note = ""
        self._began = self._updated = time.monotonic()
        self._ended = threading.Event()
        threading.Thread(target=self._print, name="modegpt-progress", daemon=True).start()

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self.iterable:
                yield item
                self.update()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, steps: int = 1) -> None:
        """Add `steps` to the number of finished steps."""
        if steps:
            self.n, self._updated = self.n + steps, time.monotonic()

    def set_postfix(self, values: Mapping[str, str] | None = None, *, refresh: bool = True, **more: str) -> None:
        """Add results to the line."""
        self.note = "".join(f", {name} {value}" for name, value in {**(values or {}), **more}.items())

    def close(self) -> None:
        """Stop printing lines."""
        self._ended.set()

    def line(self, now: float) -> str:
        """Return the line for the time `now` of `time.monotonic`.

        The remaining time is unknown until the first step ends.
        """
        text = f"{self.desc}: {self.unit} {self.n}/{self.total}, {duration(now - self._began)} elapsed"
        if self.n == self.initial:
            return text
        pace = (self._updated - self._began) / (self.n - self.initial)
        left = pace * (self.total - self.n) - (now - self._updated)
        return f"{text}, about {duration(max(0.0, left))} left{self.note}"

    def _print(self) -> None:
        while not self._ended.wait(INTERVAL):
            print(self.line(time.monotonic()), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Format a duration in its two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def bars_of_libraries(shown: bool) -> Iterator[None]:
    """Show the tqdm bars of other libraries in the same style within the context.

    Libraries such as lm-eval have no option for their bars, so this changes the arguments of each bar when it is made.
    """
    if shown and style() == "bars":
        yield
        return
    arguments = _plain() if shown and style() == "lines" else {"disable": True}
    original, made = vars(tqdm)["__init__"], tqdm.__init__  # `__init__` of tqdm is not a plain function

    def changed(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **{**kwargs, **arguments})

    tqdm.__init__ = changed
    try:
        yield
    finally:
        tqdm.__init__ = original


def _plain() -> dict[str, Any]:
    """Return arguments with which a tqdm prints a line every `INTERVAL` seconds."""
    return {
        "file": _OwnLines(),
        "bar_format": "{desc}: {n_fmt}/{total_fmt}, {elapsed} elapsed, about {remaining} left",
        "delay": INTERVAL,
        "mininterval": INTERVAL,
        "miniters": 1,
        "leave": False,
    }


class _OwnLines:
    """A file for tqdm that prints each text as a separate line. On a terminal, tqdm overwrites its line instead."""

    def write(self, text: str) -> None:
        if text := text.strip():
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass
