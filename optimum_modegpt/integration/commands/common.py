"""What several commands share: arguments, where models come from, files that they write."""

from __future__ import annotations

import argparse
import json
import re
import sys
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_modegpt.errors import CalibrationDataError, OutputError
from optimum_modegpt.evaluation.fidelity import check_tokenizers
from optimum_modegpt.integration.reading import load_model
from optimum_modegpt.integration.source import Source, check_tokenizer, tokenizer_named
from optimum_modegpt.stages import compute_device

DTYPES = ("auto", "float32", "bfloat16", "float16")
OTHER_TEXT = "OTHER_TEXT.txt"
"""Stands in an advised command for a text of the user's own that was not used yet."""


# --------------------------------------------------------------------------------------------------------- arguments


def verb(verbs: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    """The parser of a command that works on one model; `run` takes its options and returns an exit code or None."""
    parser = verbs.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="name on the Hub, folder, or demo for the embedded model")
    add_access(parser, "MODEL")
    return parser


def add_access(parser: argparse.ArgumentParser, model: str) -> None:
    """The flags that say how the argument `model` is read."""
    parser.add_argument("--revision", metavar="R", help=f"branch, tag or commit of {model}")
    parser.add_argument("--token", metavar="T", help="access token of the Hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add_debug(parser)


def add_debug(parser: argparse.ArgumentParser) -> None:
    """The flag that shows tracebacks."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_device(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that computes."""
    parser.add_argument("--device", default="auto", help="where to compute; auto takes an accelerator if there is one")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights; auto is that of the checkpoint"
    )


def add_tokenizer(parser: argparse.ArgumentParser, default: str) -> None:
    """The flags that choose a tokenizer; `default` says which one is taken without them."""
    parser.add_argument("--tokenizer", metavar="NAME", help=f"name or folder; by default {default}")
    parser.add_argument(
        "--allow-foreign-tokenizer",
        action="store_true",
        help="accept a --tokenizer that differs from the model's own, with a warning",
    )


def count(text: str) -> int:
    """An integer of at least 1."""
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, found {text!r}")
    return int(text)


def path(text: str) -> Path:
    """A path; an empty one would be the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found nothing")
    return Path(text)


# ------------------------------------------------------------------------------------------------- models and files


def source_of(options: Namespace) -> Source:
    """The model that the options name."""
    return Source.of_arguments(options.model, {**vars(options), "trust_remote_code": options.trust_remote_code or None})


def reference_of(options: Namespace) -> Source | None:
    """The model to compare with; None where none is named."""
    if options.reference is None:
        return None
    arguments = {"token": options.token, "trust_remote_code": options.trust_remote_code or None}
    return Source.of_arguments(options.reference, arguments)


def models_on(
    device: torch.device | None, dtype: str, source: Source, reference: Source | None
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """A model and its reference, loaded, on the device where they shall run."""
    device = compute_device(device, torch.device("cpu"))
    model = load_model(source, dtype).to(device)
    return model, None if reference is None else load_model(reference, dtype).to(device)


def shared_tokenizer(name: str | None, source: Source, reference: Source | None, *, allow_foreign: bool = False) -> Any:
    """The tokenizer of this name, else the model's own, else the reference's; all of them must agree.

    Raises:
        CalibrationDataError: there is none, or the named one is not the models' own, without `allow_foreign`.
        EvaluationError: those of model and reference disagree.
    """
    if name is not None:
        tokenizer = tokenizer_named(name, source)
        for model in filter(None, (source, reference)):
            check_tokenizer(tokenizer, model, allow_foreign=allow_foreign)
        return tokenizer
    try:
        own = source.tokenizer()
    except CalibrationDataError:
        if reference is None:
            raise
        return reference.tokenizer()
    if reference is not None:
        with suppress(CalibrationDataError):  # it has none
            check_tokenizers(own, reference.tokenizer())
    return own


def shows_progress() -> bool:
    """Whether there is someone to watch progress bars."""
    return sys.stderr.isatty()


def check_file(file: Path | None) -> None:
    """Refuses a file that cannot be written, before any work."""
    if file is None:
        return
    if file.is_dir():
        raise OutputError(f"{file} is a folder; name the file to write.")
    if not file.absolute().parent.is_dir():
        raise OutputError(f"{file} cannot be written: the folder {file.absolute().parent} does not exist.")


def write_json(file: Path | None, data: dict[str, Any]) -> None:
    """Writes a result where a file for it was named."""
    if file is not None:
        file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
