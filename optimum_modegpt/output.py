"""Atomic writes of output folders and files. Only folders that hold nothing but a compressed model are overwritten."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from optimum_modegpt.errors import OutputError
from optimum_modegpt.layouts.records import is_result
from optimum_modegpt.walk.checkpoint import REPLACED, RESULT, Checkpoint, parents_made

logger = logging.getLogger(__name__)

OWN_SUFFIXES = (".json", ".safetensors", ".py", ".model", ".tiktoken", ".txt", ".jinja")
OWN_NAMES = ("README.md", "ranks.png", ".gitattributes")
EXPORTED = ("*.onnx", "*.onnx.data", "openvino_*.xml", "openvino_*.bin")
"""Name patterns of exported programs and their weights."""
RECORD = "modegpt"
"""The key of config.json that a result of this package has, also if it is of a class of transformers."""


def check_output(folder: Path, *, overwrite: bool, used: Iterable[Path] = ()) -> None:
    """Raise an error if a folder cannot or must not be written; `used` are the other paths that the run uses.

    Raises:
        OutputError: the folder is a file, the working folder or a folder in use, or it is not empty and may not be
            overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; expected a folder as --output.")
    place = folder.resolve()
    if place == Path.cwd():
        raise OutputError(f"{folder} is the working folder; choose another --output.")
    for path in used:
        if place == path.resolve():
            raise OutputError(f"{folder} is an input of this run (model, text or tokenizer); choose another --output.")
        if place in path.resolve().parents:
            raise OutputError(f"{folder} contains {path}, which this run uses; choose another --output.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise OutputError(
            f"{folder} exists and is not empty; choose another --output, or overwrite it with --overwrite."
        )
    _check_ours(folder, folder)


def _check_ours(folder: Path, name: Path) -> None:
    """Raise an error if a folder to delete is not only a compressed model; `name` is its path in the message."""
    try:
        values = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        found = f"is a model of type {values['model_type']!r}"
    except (OSError, ValueError, KeyError, TypeError):
        values, found = {}, f"has no readable {CONFIG_NAME}"
    if not is_result(values) and RECORD not in values:
        raise OutputError(f"{name} {found}; --overwrite deletes compressed models only. Choose another --output.")
    if foreign := sorted(path.name for path in folder.iterdir() if not is_own(path)):
        raise OutputError(
            f"{name} contains files that are not part of a compressed model: {', '.join(foreign)}. Move them, or "
            "choose another --output."
        )


def is_own(path: Path) -> bool:
    """Return whether a path can belong to a saved model: a file, or the folder of a tokenizer's chat templates."""
    if path.is_symlink():
        return False
    if path.is_dir():
        return path.name == CHAT_TEMPLATE_DIR and all(one.suffix == ".jinja" and is_own(one) for one in path.iterdir())
    if any(path.match(pattern) for pattern in EXPORTED):
        return True
    return path.suffix in OWN_SUFFIXES or path.name in OWN_NAMES or path.stem == "vocab"


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Convert an error while writing `folder` into an `OutputError` that quotes the operating system."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors raises its own error for a failed write
        raise OutputError(
            f"{folder} cannot be written: {error}\nFree disk space and run the same command again."
        ) from error


def checkpoint_of(folder: Path) -> Checkpoint:
    """Return the hidden folder next to `folder`, with its lock, in which a command builds its result."""
    return Checkpoint(folder.with_name(f".{folder.name}.checkpoint"))


@contextmanager
def replacing(folder: Path, *, overwrite: bool, work_folder: Path) -> Iterator[Path]:
    """Yield a new empty folder in `work_folder`, on the same disk, that replaces `folder` at the end.

    On an error, the new folder is deleted and `folder` is unchanged; `restore_output` cleans up after a killed run.

    Raises:
        OutputError: `folder` cannot be written, or it changed in the meantime and must not be deleted; then the
            finished result is kept next to it.
    """
    folder, partial = folder.resolve(), work_folder / RESULT
    with parents_made(work_folder):
        try:
            with saving(folder):
                partial.mkdir(parents=True)
            yield partial
            _place(partial, folder, overwrite)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def replacing_file(path: Path, still_allowed: Callable[[], None]) -> Iterator[Path]:
    """Yield an empty file in the folder of `path` that replaces `path` at the end. On an error it is deleted.

    `still_allowed` is called before that: it raises an error if `path` must not be replaced, because another program
    wrote it in the meantime.
    """
    with parents_made(path):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(descriptor)
        partial = Path(name)
        try:
            yield partial
            still_allowed()
            partial.chmod(0o666 & ~_umask())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def restore_output(work_folder: Path, folder: Path) -> None:
    """Clean up after a killed run, so that `folder` is the old result or the complete new one."""
    shutil.rmtree(work_folder / RESULT, ignore_errors=True)
    if (old := work_folder / REPLACED).exists() and not folder.exists():
        old.rename(folder)


def _place(partial: Path, folder: Path, overwrite: bool) -> None:
    """Move the finished result to `folder`, or next to it if `folder` may not be replaced."""
    try:
        _swap(partial, folder, overwrite)
    except OSError as error:
        kept = folder.with_name(f"{folder.name}.finished-{uuid.uuid4().hex[:8]}")
        partial.rename(kept)
        reason = str(error)
        if not isinstance(error, OutputError):
            reason = f"{folder} was written by another run in the meantime ({error})."
        raise OutputError(f"{reason}\nThe finished model is kept in {kept}") from error


def _swap(partial: Path, folder: Path, overwrite: bool) -> None:
    """Move the result to `folder`; a rename never replaces a folder that is not empty."""
    old = partial.with_name(REPLACED)
    with suppress(OSError):
        folder.rmdir()  # only if it is empty
    if not overwrite or not folder.exists():
        partial.rename(folder)
        return
    folder.rename(old)
    try:
        _check_ours(old, folder)
        partial.rename(folder)
    except BaseException:
        if not folder.exists():  # else another run has written its result meanwhile
            old.rename(folder)
        raise
    try:
        shutil.rmtree(old)
    except OSError as error:  # a file is still open, as on a network disk
        logger.warning("the old version of %s could not be deleted completely: %s", folder, error)
