"""Progress of long work: a bar on a terminal and in a notebook, a plain line a minute in a log."""

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
"""Seconds between two lines, and before the first: short work prints none."""

Style = Literal["bars", "lines", "nothing"]
_STYLE: ContextVar[Style] = ContextVar("style", default="bars")


def style() -> Style:
    """Returns how progress is shown: as bars, except where `shown_as` says otherwise."""
    return _STYLE.get()


@contextmanager
def shown_as(style: Style) -> Iterator[None]:
    """Inside, progress is shown in this style."""
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
    """Returns a progress bar, a `tqdm` or `Lines`, for a loop or for calls of `update`.

    Args:
        iterable: the items of the loop, if it is one.
        desc: the name of the work.
        unit: the name of a step.
        total: the number of steps; by default the length of `iterable`.
        initial: steps that an earlier run has done.
        shown: whether to show anything.
    """
    given: dict[str, Any] = {"desc": desc, "unit": unit, "total": total, "initial": initial}
    if shown and style() == "lines":
        return Lines(iterable, **given)
    return auto_tqdm(iterable, **given, disable=not shown or style() == "nothing")


class Lines:
    """Prints where the work is, once in `INTERVAL` seconds until it ends; it is used as a `tqdm`."""

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
        """Counts finished steps."""
        if steps:
            self.n, self._updated = self.n + steps, time.monotonic()

    def set_postfix(self, values: Mapping[str, str] | None = None, *, refresh: bool = True, **more: str) -> None:
        """Adds results to the line."""
        self.note = "".join(f", {name} {value}" for name, value in {**(values or {}), **more}.items())

    def close(self) -> None:
        """Ends the lines."""
        self._ended.set()

    def line(self, now: float) -> str:
        """Returns the line for this moment of `time.monotonic`; the time left is unknown before the first step ends."""
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
    """Returns a time for people, in its two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def bars_of_libraries(shown: bool) -> Iterator[None]:
    """Inside, the bars of libraries that make their own with tqdm are shown in the same style.

    Libraries such as lm-eval have no switch for their bars, so the arguments change when a bar is made.
    """
    if shown and style() == "bars":
        yield
        return
    arguments = _plain() if shown and style() == "lines" else {"disable": True}
    original, made = vars(tqdm)["__init__"], tqdm.__init__  # tqdm's own is no plain function

    def changed(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **{**kwargs, **arguments})

    tqdm.__init__ = changed
    try:
        yield
    finally:
        tqdm.__init__ = original


def _plain() -> dict[str, Any]:
    """Returns arguments with which a tqdm prints a line in `INTERVAL` seconds."""
    return {
        "file": _OwnLines(),
        "bar_format": "{desc}: {n_fmt}/{total_fmt}, {elapsed} elapsed, about {remaining} left",
        "delay": INTERVAL,
        "mininterval": INTERVAL,
        "miniters": 1,
        "leave": False,
    }


class _OwnLines:
    """A file for tqdm, which returns to the start of a line to overwrite it; here, each text is a line."""

    def write(self, text: str) -> None:
        if text := text.strip():
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass
