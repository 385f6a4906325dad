"""The configuration that the flags and the file of `--config` give."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import InvalidConfig


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
