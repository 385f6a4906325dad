"""A result folder appears whole or not at all, and takes the place of nothing but a result of ours."""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from optimum_modegpt.checkpoint import REPLACED, RESULT, Checkpoint, parents_made
from optimum_modegpt.errors import OutputError
from optimum_modegpt.modeling.modegpt_family import is_compressed

logger = logging.getLogger(__name__)

OWN_SUFFIXES = (".json", ".safetensors", ".py", ".model", ".tiktoken", ".txt", ".jinja")
OWN_NAMES = ("README.md", "ranks.png", ".gitattributes")
ATTEMPTS = 5
"""How often a run with --overwrite tries to take a place that another run takes at the same moment."""


def check_output(folder: Path, *, overwrite: bool, used: Iterable[Path] = ()) -> None:
    """Refuses a folder that cannot or must not be written; `used` is what the run reads or writes besides.

    Raises:
        OutputError: the folder is a file, holds what is in use, or is not empty and no result to be overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; --output needs a folder.")
    place = folder.resolve()
    if place == Path.cwd():
        raise OutputError(f"{folder} is the folder that this runs in; choose another --output.")
    for path in used:
        if place == path.resolve():
            raise OutputError(f"{folder} is what this run reads (model, text or tokenizer); choose another --output.")
        if place in path.resolve().parents:
            raise OutputError(f"{folder} holds {path}, which this run uses; choose another --output.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{folder} exists and is not empty; choose another --output, or replace it with --overwrite.")
    _check_ours(folder, folder)


def _check_ours(folder: Path, name: Path) -> None:
    """Refuses to delete a folder that is anything but a compressed model; `name` is what the user calls it."""
    try:
        model_type = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        model_type = None
    if not is_compressed(model_type):
        found = f"has no readable {CONFIG_NAME}" if model_type is None else f"is a model of type {model_type!r}"
        raise OutputError(f"{name} {found}; --overwrite deletes compressed models only. Choose another --output.")
    if foreign := sorted(path.name for path in folder.iterdir() if not is_own(path)):
        more = ", …" if len(foreign) > 5 else ""
        raise OutputError(
            f"{name} holds what no compressed model has: {', '.join(foreign[:5])}{more}. --overwrite will not delete "
            "it; move it away, or choose another --output."
        )


def is_own(path: Path) -> bool:
    """Whether this is what a saved model has: a file of one, or the folder of a tokenizer's chat templates."""
    if path.is_symlink():
        return False
    if path.is_dir():
        return path.name == CHAT_TEMPLATE_DIR and all(one.suffix == ".jinja" and is_own(one) for one in path.iterdir())
    return path.suffix in OWN_SUFFIXES or path.name in OWN_NAMES or path.stem == "vocab"


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """What the system refuses while a result is written into `folder` is an error of the disk, not of the program.

    Raises:
        OutputError: with what the system said.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for it
        raise OutputError(f"{folder} cannot be written: {error}\nMake room and run the same again.") from error


def workshop_of(folder: Path) -> Checkpoint:
    """Returns the hidden folder next to `folder` where a command works until its result is complete, with its lock."""
    return Checkpoint(folder.with_name(f".{folder.name}.checkpoint"))


@contextmanager
def replacing(folder: Path, *, overwrite: bool, workshop: Path) -> Iterator[Path]:
    """Yields a new empty folder that takes the place of `folder` at the end.

    It is made in `workshop`, a folder on the same disk. The next run finds what a killed run left there (see
    `taken_back`). On an error the new folder is deleted, and `folder` is as it was before. If another run has taken the
    place of `folder` meanwhile, the finished result is kept next to it.

    Raises:
        OutputError: the place cannot be written, or was taken meanwhile.
    """
    folder = folder.resolve()
    partial = workshop / RESULT
    with parents_made(workshop):
        try:
            _make(partial, folder)
            yield partial
            _place(partial, folder, uuid.uuid4().hex[:8], overwrite=overwrite)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def taken_back(workshop: Path, folder: Path) -> None:
    """Puts right what a run that was killed left: `folder` is what it was before, or the new result."""
    shutil.rmtree(workshop / RESULT, ignore_errors=True)
    if (old := workshop / REPLACED).exists() and not folder.exists():
        old.rename(folder)


def _make(partial: Path, folder: Path) -> None:
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error}") from error


def _place(partial: Path, folder: Path, mark: str, *, overwrite: bool) -> None:
    """Moves the finished result to its place, or beside it where the place may not be taken."""
    error: OSError | None = None
    for _ in range(ATTEMPTS if overwrite else 1):
        try:
            return _swap(partial, folder, overwrite)
        except OutputError as refusal:
            error = refusal
            break
        except OSError as lost:
            error = lost
    kept = folder.with_name(f"{folder.name}.finished-{mark}")
    partial.rename(kept)
    reason = error if isinstance(error, OutputError) else f"{folder} was taken while this run was at work ({error})."
    raise OutputError(f"{reason}\nThe finished model is kept in {kept}") from error


def _swap(partial: Path, folder: Path, overwrite: bool) -> None:
    """One try; a rename never takes the place of a folder that is not empty."""
    old = partial.with_name(REPLACED)
    with suppress(OSError):
        folder.rmdir()  # only where it is empty
    if not overwrite or not folder.exists():
        partial.rename(folder)
        return
    folder.rename(old)
    try:
        _check_ours(old, folder)
    except BaseException:
        old.rename(folder)
        raise
    try:
        partial.rename(folder)
    except BaseException:
        # Another run's result may stand there by now.
        shutil.rmtree(old) if folder.exists() else old.rename(folder)
        raise
    try:
        shutil.rmtree(old)
    except OSError as error:  # it is still open somewhere, on a disk of the network
        logger.warning("what %s was before could not be deleted, all of it: %s", folder, error)
