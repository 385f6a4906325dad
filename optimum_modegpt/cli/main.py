"""The command line: `optimum-cli modegpt` and `python -m optimum_modegpt`.

torch and transformers are imported only when a command runs, so help and argument errors are printed at once.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import signal
import sys
import threading
import traceback
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import Any, NoReturn

from optimum_modegpt.cli.arguments import COMMANDS
from optimum_modegpt.cli.terminal import PlainOutput, printable, replace_characters
from optimum_modegpt.errors import ModeGPTError

PROGRAM = "python -m optimum_modegpt"
FAILED, INTERRUPTED = 2, 130
BUG = "This looks like a bug. Please report it with the traceback above."


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations, which reports an error in one line and names the help to read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Print the error without the usage, which is longer than a screen."""
        if "required: MODEL" in message and "--dataset" in self._option_string_actions:
            message += " (write it before --dataset, which takes all names that follow)"
        self.exit(FAILED, f"error: {message}\nsee {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Parse the arguments of a command, and report unknown ones here instead of in the parser of all commands."""
        if self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        # An unknown option is reported before a missing one: a mistyped option causes both errors.
        known = self._option_string_actions
        for word in args:
            option = word.partition("=")[0]
            if word == "--":
                break
            if re.match("--?[a-zA-Z]", option) and option not in known:
                near = difflib.get_close_matches(option, known, n=1)
                self.error(f"unknown option {option}." + (f" Did you mean {near[0]}?" if near else ""))
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unexpected argument: {' '.join(unknown)}")
        return options, unknown


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run one command and return its exit code: 2 for any error, 130 for Ctrl-C or SIGTERM, else that of the command.

    No exception leaves this function, except Ctrl-C with --debug: Python would exit with 1, the code of a threshold
    that is not met.
    """
    replace_characters(sys.stdout, sys.stderr)
    options = build_parser(program).parse_args(arguments)
    try:
        return _run(options)
    except KeyboardInterrupt as interrupt:
        if options.debug:
            raise
        print(f"\nInterrupted. {str(interrupt) or 'No files were written.'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe. Keep Python from reporting that again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        _report(error, options.debug)
        return FAILED


def _run(options: Namespace) -> int:
    """Import a command and run it; the import takes seconds."""
    for library in ("torchao", "torch.utils._pytree"):  # transformers imports torchao, which logs missing kernels
        logging.getLogger(library).setLevel(logging.ERROR)
    command = import_module(f"optimum_modegpt.cli.commands.{options.command}")
    from optimum_modegpt.cli.commands.common import quiet_bars

    with quiet_bars(), interrupted_by_sigterm(), redirect_stdout(PlainOutput(sys.stdout)):
        return command.run(options) or 0


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """End a command on SIGTERM as on Ctrl-C, so that its unfinished files are removed.

    In a distributed run, SIGTERM ends each process at once: a process that waits for the others handles no signals.
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


def _report(error: Exception, debug: bool) -> None:
    """Print an error in one line, after its traceback if `debug` is set or if the error looks like a bug."""
    import torch

    message = str(error) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        message = f"out of device memory: {error}\nTry a smaller --batch-size, or another --device."
    is_bug = not isinstance(error, ModeGPTError | OSError | ImportError | torch.OutOfMemoryError)
    if is_bug or debug:
        traceback.print_exception(error)
    print(f"error: {printable(message)}" + (f"\n{BUG}" if is_bug else ""), file=sys.stderr)


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """Return the parser of all commands; it stores the name of the command to run as `command`."""
    parser = Parser(program, description="Compress, evaluate and compare language models with MoDeGPT.")
    parser.set_defaults(program=program)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add_command in COMMANDS:
        add_command(commands)
    return parser
