"""Show the progress of long work: bars on a terminal or in a notebook, at most one plain line per minute in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
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
) -> tqdm[Any]:
    """Return a `tqdm` in the current style, for a loop over `iterable` or for calls of `update`.

    Args:
        iterable: the items of the loop, if the bar wraps a loop.
        desc: the name of the work.
        unit: the name of a step.
        total: the number of steps. Defaults to the length of `iterable`.
        initial: the number of steps that an earlier run finished.
        shown: whether to show anything.
    """
    return auto_tqdm(iterable, desc=desc, unit=unit, total=total, initial=initial, **_arguments(shown))


@contextmanager
def bars_of_libraries(shown: bool) -> Iterator[None]:
    """Show the tqdm bars of other libraries in the same style within the context.

    Libraries such as lm-eval have no option for their bars, so this changes the arguments of each bar when it is made.
    """
    original, made, arguments = vars(tqdm)["__init__"], tqdm.__init__, _arguments(shown)

    def changed(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **{**kwargs, **arguments})

    tqdm.__init__ = changed
    try:
        yield
    finally:
        tqdm.__init__ = original  # which is not a plain function


def _arguments(shown: bool) -> dict[str, Any]:
    """Return the arguments of a `tqdm` in the current style."""
    if not shown or style() == "nothing":
        return {"disable": True}
    if style() == "bars":
        return {}
    return {
        "file": _OwnLines(),
        "bar_format": "{desc}: {n_fmt}/{total_fmt}, {elapsed} elapsed, about {remaining} left{postfix}",
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
