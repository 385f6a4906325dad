"""A flag for every field of `ModeGPTConfig`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import types
import typing
from typing import Any, Literal

from optimum_modegpt.cli.arguments.common import path
from optimum_modegpt.recipe import Recipe

COMMAND_LINE_TEXTS = {
    "dataset": "calibration text: wikitext2, c4, alpaca, a dataset id of the Hub, or a local .txt, .jsonl, .json or "
    ".parquet file, or a folder saved by datasets.",
    "tokenizer": "name or folder of a tokenizer; by default the model's own.",
    "allow_foreign_tokenizer": "accept a --tokenizer that differs from the model's own in vocabulary, special tokens "
    "or chat template, with a warning.",
}
"""Descriptions of the fields that accept more in Python than on the command line."""


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of `ModeGPTConfig`, with its name, type and description."""
    group = parser.add_argument_group("configuration", "Flags override --config, which overrides the defaults.")
    group.add_argument("--config", type=path, metavar="FILE", help="JSON file with any of these fields")
    texts, hints = field_texts(), typing.get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=(texts[field.name] + _default(field.default)).replace("%", "%%"),
            **_reading(hints[field.name]),
        )


def field_texts() -> dict[str, str]:
    """Return the description of each field in the docstring of `Recipe`, worded for the command line."""
    section = inspect.cleandoc(Recipe.__doc__ or "").partition("Args:\n")[2].partition("\nRaises:")[0]
    entries = re.split(r"^    (\w+): ", section, flags=re.MULTILINE)[1:]
    texts = {name: _plain(text) for name, text in zip(entries[::2], entries[1::2], strict=True)}
    return {**texts, **COMMAND_LINE_TEXTS}


def _plain(text: str) -> str:
    """Return the text without code marks; a field that is None is worded as a flag that is left out."""
    words = " ".join(re.sub('[`"]', "", text).split())
    return re.sub(r"\bNone (?=takes|chooses|finds)", "left out, it ", words)


def _default(value: Any) -> str:
    return "" if value is None or value is False else f" Default: {value}."


def _reading(hint: Any) -> dict[str, Any]:
    """Return the arguments with which argparse parses a field of this type; None means that the flag is left out."""
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
