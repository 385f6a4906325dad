"""Helpers that several commands share: sources of models, progress bars, output files."""

from __future__ import annotations

import json
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
from optimum_modegpt.errors import CalibrationDataError, InvalidConfig, OutputError
from optimum_modegpt.evaluation.fidelity import check_tokenizers
from optimum_modegpt.loading.models import load_model
from optimum_modegpt.loading.source import Source, check_tokenizer, tokenizer_named
from optimum_modegpt.stages import compute_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def source_of(options: Namespace) -> Source:
    """Return the source of the model that the options name."""
    return Source.of_arguments(options.model, {**vars(options), "trust_remote_code": options.trust_remote_code or None})


def reference_of(options: Namespace) -> Source | None:
    """Return the source of the dense model to compare with or to distill from; None if none is named.

    Raises:
        InvalidConfig: a revision is given without a model.
    """
    if options.reference is None and options.reference_revision is not None:
        raise InvalidConfig(
            f"found a revision of the dense model, {options.reference_revision!r}, but no dense model. Name it with "
            "--reference, or with --teacher for recover."
        )
    if options.reference is None:
        return None
    arguments = {
        "revision": options.reference_revision,
        "token": options.token,
        "trust_remote_code": options.trust_remote_code or None,
    }
    return Source.of_arguments(options.reference, arguments)


def models_on(
    device: torch.device | None, dtype: str, source: Source, reference: Source | None
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """Load a model and its reference onto the device on which they run."""
    device = compute_device(device, torch.device("cpu"))
    model = load_model(source, dtype).to(device)
    return model, None if reference is None else load_model(reference, dtype).to(device)


def shared_tokenizer(name: str | None, source: Source, reference: Source | None, *, allow_foreign: bool = False) -> Any:
    """Load the tokenizer of this name, else the model's own, else the reference's; all of them must agree.

    Raises:
        CalibrationDataError: none can be loaded, or the named one differs from the models' own without `allow_foreign`.
        EvaluationError: the tokenizers of model and reference disagree.
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
        with suppress(CalibrationDataError):  # the reference has no tokenizer
            check_tokenizers(own, reference.tokenizer())
    return own


def shows_progress() -> bool:
    """Return whether the running command shows its progress, as bars or as lines."""
    return progress.style() != "nothing"


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Hide transformers' progress bars; show ours and those of downloads on a terminal, and plain lines in a log.

    `HF_HUB_DISABLE_PROGRESS_BARS` disables all of them.
    """
    switched_off = are_progress_bars_disabled()
    style = "nothing" if switched_off else "bars" if sys.stderr.isatty() else "lines"
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    if style == "bars":
        enable_progress_bars()
    try:
        with progress.shown_as(style):
            yield
    finally:
        if was_on:
            logging.enable_progress_bar()
        if switched_off:  # enabling the bars of transformers also enables those of the Hub
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
