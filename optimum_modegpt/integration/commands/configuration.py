"""A flag for every field of `ModeGPTConfig`, and the configuration that the flags give."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import types
import typing
from argparse import Namespace
from pathlib import Path
from typing import Any, Literal

from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import InvalidConfig
from optimum_modegpt.integration.commands.common import path

COMMAND_LINE_TEXTS = {
    "dataset": "calibration text: wikitext2, c4, alpaca, a dataset id of the Hub, or a local .txt, .jsonl, .json or "
    ".parquet file, or a folder saved by datasets.",
    "tokenizer": "name or folder of a tokenizer; by default the model's own.",
    "allow_foreign_tokenizer": "accept a --tokenizer that differs from the model's own in vocabulary, special tokens "
    "or chat template, with a warning.",
}
"""Texts of fields for which Python takes more than a command line can say."""


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of `ModeGPTConfig`: name, type and text are the field's own."""
    group = parser.add_argument_group("configuration", "Flags win over --config, which wins over the defaults.")
    group.add_argument("--config", type=path, metavar="FILE", help="JSON file with any of these fields")
    texts, hints = field_texts(), typing.get_type_hints(ModeGPTConfig)
    for field in dataclasses.fields(ModeGPTConfig):
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=(texts[field.name] + _default(field.default)).replace("%", "%%"),
            **_reading(hints[field.name]),
        )


def configuration(options: Namespace) -> ModeGPTConfig:
    """The configuration: flags over the file over the defaults.

    Raises:
        InvalidConfig: a file that cannot be read, an unknown field, a value that is out of range.
    """
    names = {field.name for field in dataclasses.fields(ModeGPTConfig)}
    flags = {name: value for name, value in vars(options).items() if name in names}
    return ModeGPTConfig.from_dict({**_read_fields(options.config), **flags})


def _read_fields(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    if file.is_dir():
        raise InvalidConfig(f"--config {file} is a folder; name a JSON file with fields of the configuration.")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidConfig(f"--config {file} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidConfig(f"--config {file} holds a {type(fields).__name__}; expected an object of fields.")
    return fields


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
    return "" if value is None or value is False else f" Default: {value}."


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
    if kind is bool:
        return {"action": "store_true"}
    return {"type": kind if kind in (int, float) else str, "metavar": {int: "N", float: "X"}.get(kind, "NAME")}


def _integer_or_word(text: str) -> int | str:
    return int(text) if re.fullmatch(r"-?\d+", text) else text
