"""Helpers that several commands share: sources of models, settings, progress bars, files and advice."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging

from optimum_modegpt import progress
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import CalibrationDataError, InvalidConfig, OutputError
from optimum_modegpt.evaluation.fidelity import check_tokenizers
from optimum_modegpt.hub.commands import flags
from optimum_modegpt.loading.calibration import check_tokenizer, tokenizer_named
from optimum_modegpt.loading.models import load_model
from optimum_modegpt.loading.source import Source
from optimum_modegpt.recipe import overridden
from optimum_modegpt.stages import compute_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

YOUR_TEXT = "<your-text.txt>"
YOUR_TOKEN = "<your-token>"
NEW_FOLDER = "<new-folder>"
"""Placeholders in advised commands. They are quoted there, because a shell would read them as redirections."""


def source_of(options: Namespace) -> Source:
    """Return the source of the model that the options name."""
    return Source.of_arguments(options.model, _hub_arguments(options, options.revision))


def reference_of(options: Namespace) -> Source | None:
    """Return the source of the dense model to compare with or to distill from; None if none is named."""
    if options.reference is not None:
        return Source.of_arguments(options.reference, _hub_arguments(options, options.reference_revision))
    if options.reference_revision is not None:
        raise InvalidConfig(
            f"found a revision of the dense model, {options.reference_revision!r}, but no dense model. Name it with "
            "--reference, or with --teacher for recover."
        )
    return None


def _hub_arguments(options: Namespace, revision: str | None) -> dict[str, Any]:
    return {"revision": revision, "token": options.token, "trust_remote_code": options.trust_remote_code or None}


def models_on(
    device: torch.device | None, dtype: str, source: Source, reference: Source | None
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """Load a model and its reference onto the device on which they run."""
    device = compute_device(device, torch.device("cpu"))
    model = load_model(source, dtype).to(device)
    if reference is None:
        return model, None
    return model, load_model(reference, dtype).to(device)


def shared_tokenizer(name: str | None, source: Source, reference: Source | None, *, allow_foreign: bool = False) -> Any:
    """Load the tokenizer of this name, else the model's own, else the reference's; all of them must agree.

    Raises:
        CalibrationDataError: none can be loaded, or the named one differs from the models' own without `allow_foreign`.
        EvaluationError: the tokenizers of model and reference disagree.
    """
    if name is not None:
        tokenizer = tokenizer_named(name, source)
        check_tokenizer(tokenizer, source, allow_foreign=allow_foreign)
        if reference is not None:
            check_tokenizer(tokenizer, reference, allow_foreign=allow_foreign)
        return tokenizer
    try:
        own = source.tokenizer()
    except CalibrationDataError:
        if reference is None:
            raise
        return reference.tokenizer()
    if reference is not None:
        with suppress(CalibrationDataError):  # the reference has no tokenizer
            check_tokenizers(own, reference.tokenizer())
    return own


def configuration(options: Namespace) -> ModeGPTConfig:
    """Return the configuration: flags override the file of `--config`, which overrides the defaults.

    Raises:
        InvalidConfig: the file cannot be read, a field is unknown, or a value is out of range.
    """
    fields = {}
    if file := options.config:
        if file.is_dir():
            raise InvalidConfig(f"--config {file} is a folder; expected a JSON file with fields of the configuration.")
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidConfig(f"--config {file} cannot be read as JSON: {error}") from error
        if not isinstance(fields, dict):
            raise InvalidConfig(f"--config {file} contains a {type(fields).__name__}; expected an object of fields.")
    names = [field.name for field in dataclasses.fields(ModeGPTConfig)]
    flagged = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return ModeGPTConfig.from_dict(overridden(fields, flagged))


def shows_progress() -> bool:
    """Return whether the running command shows its progress, as bars or as lines."""
    return progress.style() != "nothing"


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Hide transformers' progress bars; show ours and those of downloads on a terminal, and plain lines in a log.

    `HF_HUB_DISABLE_PROGRESS_BARS` disables all of them.
    """
    is_disabled, was_on = are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # disables the bars of the Hub too
    style: progress.Style = "nothing"
    if not is_disabled:
        style = "bars" if sys.stderr.isatty() else "lines"
    if style == "bars":
        enable_progress_bars()
    try:
        with progress.shown_as(style):
            yield
    finally:
        if was_on:
            logging.enable_progress_bar()
        if is_disabled:
            disable_progress_bars()


def check_file(file: Path | None) -> None:
    """Raise an error, before any work, if a file cannot be written."""
    if file is None:
        return
    if file.is_dir():
        raise OutputError(f"{file} is a folder; expected a file to write.")
    if not file.absolute().parent.is_dir():
        raise OutputError(f"{file} cannot be written: the folder {file.absolute().parent} does not exist.")


def write_json(file: Path | None, data: dict[str, Any]) -> None:
    """Write a result as JSON if a file is named."""
    if file is not None:
        file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def existing_paths(*names: Any) -> list[Path]:
    """Return those of the names that are files or folders."""
    return [Path(name) for name in names if isinstance(name, str | Path) and Path(name).exists()]


def advised_command(options: Namespace, *words: str, computes: bool = True, **more: Any) -> str:
    """Return a command to run next, quoted for a shell, with the flags for access and hardware of this run.

    Args:
        options: the options of this run.
        words: the command and its arguments.
        computes: whether the command has the flags for hardware.
        more: flags of the command by name; `None` leaves a flag out.
    """
    for name in ("device", "dtype"):
        if computes and getattr(options, name, "auto") != "auto":
            more[name] = getattr(options, name)
    if options.token is not None:
        more["token"] = YOUR_TOKEN  # the token itself is secret
    more["trust_remote_code"] = options.trust_remote_code
    return f"{options.program} {shlex.join([*words, *flags(more)])}"
