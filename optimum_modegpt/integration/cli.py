"""The command line: `optimum-cli modegpt` and `python -m optimum_modegpt`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, NoReturn

import torch
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging

from optimum_modegpt.errors import ModeGPTError
from optimum_modegpt.integration.commands import COMMANDS
from optimum_modegpt.integration.plain import PlainOutput, printable
from optimum_modegpt.progress import shown_as

PROGRAM = "python -m optimum_modegpt"
FAILED, INTERRUPTED = 2, 130
A_DEFECT = "This is a defect of the program or of a library that it calls; please report it with the lines above."


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations, and says what is wrong in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """The error alone: a page of usage would bury it."""
        self.exit(FAILED, f"error: {message}\nsee {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs one command and returns its exit code: 0, or the command's own; 2 is any error, 130 is Ctrl-C or SIGTERM.

    No exception but Ctrl-C leaves it: Python would exit with 1, which is the code of a broken threshold.
    """
    options = build_parser(program).parse_args(arguments)
    try:
        with quiet_bars(), interrupted_by_sigterm(), redirect_stdout(PlainOutput(sys.stdout)):
            return options.run(options) or 0
    except KeyboardInterrupt as interrupt:
        if options.debug:
            raise
        print(f"\ninterrupted; {str(interrupt) or 'nothing was left behind.'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, `head` for one, has had enough; Python must not complain of it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ModeGPTError, OSError, ImportError, torch.OutOfMemoryError) as error:
        if options.debug:
            traceback.print_exc()
        print(f"error: {printable(_advice(error))}", file=sys.stderr)
        return FAILED
    except Exception as error:
        traceback.print_exc()
        print(f"error: {printable(_advice(error))}\n{A_DEFECT}", file=sys.stderr)
        return FAILED


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Inside, transformers draws no bars. Ours and those of downloads are shown on a terminal; a log has lines instead.

    `HF_HUB_DISABLE_PROGRESS_BARS` switches all of them off.
    """
    style = "nothing" if are_progress_bars_disabled() else "bars" if sys.stderr.isatty() else "lines"
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    if style == "bars":
        enable_progress_bars()
    try:
        with shown_as(style):
            yield
    finally:
        if was_on:
            logging.enable_progress_bar()


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends a command as Ctrl-C does, which removes the command's unfinished files.

    Processes that work together end at once instead: one that waits for the others does not handle signals.
    """
    is_main = threading.current_thread() is threading.main_thread()
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if not is_main or not is_alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _advice(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of device memory: {error}\nTry a smaller --batch-size, or another --device."
    return str(error) or type(error).__name__


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """The parser of all commands; `run` of what it returns is the function to call with it."""
    parser = Parser(program, description="Compress, evaluate and compare language models with MoDeGPT.")
    parser.set_defaults(program=program)
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(verbs)
    return parser
