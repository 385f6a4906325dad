"""A result folder appears whole or not at all."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import CONFIG_NAME

from optimum_modegpt.errors import OutputError


def check_output(folder: Path, *, overwrite: bool, model: str | None = None) -> None:
    """Refuses a folder that cannot or must not be written; `model` is the folder that is being read.

    Raises:
        OutputError: the folder is a file or not empty, or what stands there is no model, or is the one that is read.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; --output needs a folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{folder} exists and is not empty; choose another --output, or replace it with --overwrite.")
    if model is not None and Path(model).exists() and Path(model).resolve() == folder.resolve():
        raise OutputError(f"{folder} is the model that is to be compressed; choose another --output.")
    if not (folder / CONFIG_NAME).is_file():
        raise OutputError(
            f"{folder} has no {CONFIG_NAME}, so it does not look like a model; --overwrite will not delete it."
        )


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new empty folder beside `folder` that takes its place at the end.

    On any error it is gone, and what stood at `folder` is as before.

    Raises:
        OutputError: the place cannot be written.
    """
    folder = folder.resolve()
    mark = uuid.uuid4().hex[:8]
    partial, old = (folder.with_name(f".{folder.name}.{kind}-{mark}") for kind in ("partial", "old"))
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error}") from error
    try:
        yield partial
        _swap(partial, folder, old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(partial: Path, folder: Path, old: Path) -> None:
    if not folder.exists():
        partial.rename(folder)
        return
    folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old)
