"""Format commands for the model card, the report and the advice that a command prints."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from optimum_modegpt.config import IN_MEMORY, ModeGPTConfig
from optimum_modegpt.report import Report

COLUMNS = 88
"""Maximum width of a line of a command on the card."""


def flags(values: Mapping[str, Any]) -> list[str]:
    """Return words of a command line; None and False are left out, and True is a flag without a value.

    The items of a list follow their flag, and those of a mapping, the weights of a mixture, are written NAME=WEIGHT.
    """
    words = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, Mapping):
            words += [f"{source}={weight:.10g}" for source, weight in value.items()]
        elif isinstance(value, list):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return words


def shell_command(*words: str) -> str:
    """Return a command of `optimum-cli` for a shell, wrapped to `COLUMNS`; a flag stays on the line of its value."""
    arguments = [["optimum-cli", "modegpt"]]
    for word in words:
        if word.startswith("--"):
            arguments.append([])
        arguments[-1].append(word)
    lines = [shlex.join(arguments[0])]
    for argument in map(shlex.join, arguments[1:]):
        if len(lines[-1]) + len(argument) > COLUMNS:
            lines.append("   ")
        lines[-1] += f" {argument}"
    return " \\\n".join(lines)


def recipe_fields(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration that reproduce a model: sparsity, dataset and all that are not default."""
    found = {}
    for field in dataclasses.fields(ModeGPTConfig):
        is_shown = field.name in ("sparsity", "dataset") or recipe.get(field.name) != field.default
        if field.name in recipe and is_shown:
            found[field.name] = recipe[field.name]
    return found


def compress_commands(report: Report, dtype: str) -> dict[str, list[str]]:
    """Return the command that repeats a compression, for `Report.commands`.

    It is empty if an input was an object in memory or the model has no name.
    """
    fields = recipe_fields(report.config)
    if report.base_model is None or any(IN_MEMORY in str(value) for value in fields.values()):
        return {}
    loading = {"revision": report.revision, "dtype": dtype}
    return {"compress": [report.base_model, *flags({**loading, **fields})]}
