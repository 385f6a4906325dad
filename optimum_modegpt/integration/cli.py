"""The command line: `optimum-cli modegpt` and `python -m optimum_modegpt`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging

from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import ModeGPTError
from optimum_modegpt.integration import commands

PROGRAM = "python -m optimum_modegpt"
DTYPES = ("auto", "float32", "bfloat16", "float16")
FAILED, INTERRUPTED = 2, 130
COMMAND_LINE_TEXTS = {
    "dataset": "calibration text: wikitext2, c4, alpaca, a dataset id of the Hub, or a local .txt, .jsonl, .json or "
    ".parquet file, or a folder saved by datasets.",
    "tokenizer": "name or folder of a tokenizer; by default the model's own.",
}
"""Texts of fields for which Python takes more than a command line can say."""


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations, and says what is wrong in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """The error alone: a page of usage would bury it."""
        self.exit(FAILED, f"error: {message}\nsee {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Runs one command and returns the exit code: 0, 2 for an error that is told in one message, 130 for Ctrl-C."""
    options = build_parser(program).parse_args(arguments)
    try:
        with quiet_bars():
            options.run(options)
    except KeyboardInterrupt:
        if options.debug:
            raise
        print("\ninterrupted; nothing was left behind.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, `head` for one, has had enough; Python must not complain of it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ModeGPTError, OSError, ImportError, torch.OutOfMemoryError) as error:
        if options.debug:
            raise
        print(f"error: {_advice(error)}", file=sys.stderr)
        return FAILED
    return 0


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Inside, transformers draws no bars of its own; those of downloads stay where someone watches."""
    watched = commands.shows_progress() and not are_progress_bars_disabled()
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    if watched:
        enable_progress_bars()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _advice(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of device memory: {error}\nTry a smaller --batch-size, or another --device."
    return str(error) or type(error).__name__


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """The parser of all commands; `run` of what it returns is the function to call with it."""
    parser = Parser(program, description="Compress, evaluate and inspect language models with MoDeGPT.")
    parser.set_defaults(program=program)
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_compress(verbs)
    _add_evaluate(verbs)
    _add_inspect(verbs)
    _add_estimate(verbs)
    _add_demo(verbs)
    return parser


def _add_compress(verbs: Any) -> None:
    verb = _verb(verbs, "compress", commands.compress, "Compress MODEL and save it.")
    verb.add_argument("--output", type=_path, required=True, metavar="DIR", help="folder to write; it appears whole")
    verb.add_argument("--overwrite", action="store_true", help="replace the result that stands there, after success")
    verb.add_argument("--report", type=_path, metavar="FILE.json", help="also write the report there")
    _add_configuration(verb)
    _add_device(verb)


def _add_evaluate(verbs: Any) -> None:
    verb = _verb(verbs, "evaluate", commands.evaluate, "Perplexity of MODEL, and how far it is from a reference.")
    verb.add_argument("--reference", metavar="DENSE", help="model to compare with, usually the dense one")
    verb.add_argument("--dataset", metavar="NAME_OR_FILE", help="text; by default wikitext2, or the demo's own")
    verb.add_argument("--dataset-split", metavar="NAME", help="split to read; by default test, validation or train")
    verb.add_argument("--text-column", metavar="NAME", help="column that holds the text")
    verb.add_argument("--sequence-length", type=int, metavar="N", help="tokens per window; default min(2048, context)")
    verb.add_argument("--max-windows", type=_count, metavar="N", help="score the first N windows only")
    verb.add_argument("--batch-size", type=_count, metavar="N", help="windows per forward pass; chosen by size")
    verb.add_argument("--tokenizer", metavar="NAME", help="name or folder; by default MODEL's own, else DENSE's")
    verb.add_argument("--json", type=_path, metavar="FILE", help="also write the result there")
    _add_device(verb)


def _add_inspect(verbs: Any) -> None:
    verb = _verb(verbs, "inspect", commands.inspect, "Ranks, parameters and record of MODEL; loads no weights.")
    verb.add_argument("--json", type=_path, metavar="FILE", help="also write the result there")


def _add_estimate(verbs: Any) -> None:
    verb = _verb(
        verbs, "estimate", commands.estimate, "Memory and work that compressing MODEL needs; loads no weights."
    )
    verb.add_argument("--json", type=_path, metavar="FILE", help="also write the result there")
    _add_configuration(verb)


def _add_demo(verbs: Any) -> None:
    verb = verbs.add_parser("demo", help="The whole job on the embedded model: compress, evaluate, reload, generate.")
    verb.set_defaults(run=commands.demonstrate, model="demo", revision=None, token=None, trust_remote_code=False)
    verb.set_defaults(dtype="auto", config=None, report=None)
    verb.add_argument("--output", type=_path, metavar="DIR", help="keep the compressed model there")
    verb.add_argument("--overwrite", action="store_true", help="replace the result that stands there, after success")
    verb.add_argument("--sparsity", type=float, default=argparse.SUPPRESS, help="as in compress")
    verb.add_argument("--method", default=argparse.SUPPRESS, help="as in compress")
    verb.add_argument("--device", default="auto", help="where to compute; auto takes an accelerator if there is one")
    _add_debug(verb)


def _verb(verbs: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=text)
    verb.set_defaults(run=run)
    verb.add_argument("model", metavar="MODEL", help="name on the Hub, folder, or demo for the embedded model")
    verb.add_argument("--revision", metavar="R", help="branch, tag or commit of MODEL")
    verb.add_argument("--token", metavar="T", help="access token of the Hub")
    verb.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    _add_debug(verb)
    return verb


def _add_debug(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_device(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--device", default="auto", help="where to compute; auto takes an accelerator if there is one")
    verb.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto is that of the checkpoint")


# ------------------------------------------------------------------------------------- flags from the configuration


def _add_configuration(verb: argparse.ArgumentParser) -> None:
    """A flag for every field of `ModeGPTConfig`: name, type and text are the field's own."""
    group = verb.add_argument_group("configuration", "Flags win over --config, which wins over the defaults.")
    group.add_argument("--config", type=_path, metavar="FILE", help="JSON file with any of these fields")
    texts, hints = field_texts(), typing.get_type_hints(ModeGPTConfig)
    for field in dataclasses.fields(ModeGPTConfig):
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=(texts[field.name] + _default(field.default)).replace("%", "%%"),
            **_reading(hints[field.name]),
        )


def field_texts() -> dict[str, str]:
    """What the docstring of `ModeGPTConfig` says of each field, in words for the command line."""
    section = inspect.cleandoc(ModeGPTConfig.__doc__ or "").partition("Args:\n")[2].partition("\nRaises:")[0]
    entries = re.split(r"^    (\w+): ", section, flags=re.MULTILINE)[1:]
    texts = {name: _plain(text) for name, text in zip(entries[::2], entries[1::2], strict=True)}
    return {**texts, **COMMAND_LINE_TEXTS}


def _plain(text: str) -> str:
    """Without the marks of code; a field that is None is a flag that is left out."""
    words = " ".join(re.sub('[`"]', "", text).split())
    return re.sub(r"\bNone (?=takes|chooses|finds)", "left out, it ", words)


def _default(value: Any) -> str:
    return "" if value is None else f" Default: {value}."


def _reading(hint: Any) -> dict[str, Any]:
    """How argparse reads a field of this type; None in a type means that the flag is left out."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [kind for kind in (typing.get_args(hint) if is_union else (hint,)) if kind is not type(None)]
    literals = [value for kind in kinds if typing.get_origin(kind) is Literal for value in typing.get_args(kind)]
    if len(kinds) == 1 and literals:
        return {"choices": literals}
    if literals:
        return {"type": _integer_or_word, "metavar": "|".join(("N", *literals))}
    kind = kinds[0]
    return {"type": kind if kind in (int, float) else str, "metavar": {int: "N", float: "X"}.get(kind, "NAME")}


def _integer_or_word(text: str) -> int | str:
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def _count(text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, found {text!r}")
    return int(text)


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found nothing")
    return Path(text)
