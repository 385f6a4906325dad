"""Build the configuration from the flags and the file of `--config`."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import InvalidConfig


def configuration(options: Namespace) -> ModeGPTConfig:
    """Return the configuration: flags override the file, which overrides the defaults.

    Raises:
        InvalidConfig: the file cannot be read, a field is unknown, or a value is out of range.
    """
    names = {field.name for field in dataclasses.fields(ModeGPTConfig)}
    flags = {name: value for name, value in vars(options).items() if name in names}
    return ModeGPTConfig.from_dict({**_read_fields(options.config), **flags})


def _read_fields(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    if file.is_dir():
        raise InvalidConfig(f"--config {file} is a folder; expected a JSON file with fields of the configuration.")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidConfig(f"--config {file} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidConfig(f"--config {file} contains a {type(fields).__name__}; expected an object of fields.")
    return fields
