"""Cut text, conversations or token ids from any source into windows of token ids for calibration and evaluation.

Documents are joined by a blank line. Conversations are joined directly, because the chat template closes them. The
joined text is tokenised as a whole without special tokens, and cut into windows that do not overlap. The tail is
dropped.
Calibration skips blank rows and long runs of blank lines. It takes the windows in the order of `torch.randperm` with a
seeded generator.
Evaluation keeps blank rows, as in published perplexities of WikiText, and takes the windows in the order of the text.
Streamed and large sources, and texts of which only the first windows are needed, are read only as far as needed.

If the tokenizer begins every text with a special token (BOS), that token replaces the first one of each window, because
the prompts of users begin with it too, and it influences every later position. The replaced token is never a target, so
the same tokens are scored with and without BOS. Token ids from the caller are used unchanged.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optimum_modegpt.calibration.hub_datasets import HUB_DATASETS
from optimum_modegpt.calibration.sources import Request, Source, open_source
from optimum_modegpt.calibration.tokenization import encode, joined, opening_token
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import CalibrationDataError, InvalidConfig

__all__ = [
    "HUB_DATASETS",
    "TokenWindows",
    "calibration_windows",
    "describe_degenerate",
    "evaluation_windows",
    "resolve_sequence_length",
]

logger = logging.getLogger(__name__)

DEFAULT_SEQUENCE_LENGTH = 2048
CALIBRATION_SPLITS = ("train",)
EVALUATION_SPLITS = ("test", "validation", "train")
FEWEST_DISTINCT = 4
"""Minimum number of distinct tokens of a window that is not degenerate. A window shorter than 32 tokens needs at least
one eighth of its length, and at least two."""
MOST_DEGENERATE = 0.5
"""A larger share of degenerate windows is an error, a smaller one a warning."""


@dataclass(frozen=True)
class TokenWindows:
    """Token ids with a record of their source.

    Attributes:
        tokens: int64 on the CPU, of shape (windows, length).
        record: safe for JSON, always with the same keys. `name`, `split`, `revision` (commit of a Hub dataset),
            `text_column` and `file_sha256` describe the source, and are None if they do not apply. `windows`,
            `sequence_length` and `tokens` are the size of `tokens`. `available_windows` is the number of windows in the
            text that was read. `first_token` is the special token that begins every window, None if the tokenizer adds
            none and for token ids. `sha256` is the digest of the shape and the token ids, both as little-endian int64.
    """

    tokens: Tensor
    record: dict[str, Any]


def resolve_sequence_length(requested: int | None, context: int | None) -> int:
    """Return the tokens per window: `requested`, else min(2048, context). `context` is None if the model has no limit.

    Raises:
        InvalidConfig: `requested` is less than two, or more than the context.
    """
    if requested is None:
        return min(DEFAULT_SEQUENCE_LENGTH, context or DEFAULT_SEQUENCE_LENGTH)
    if requested < 2:
        raise InvalidConfig(f"sequence_length={requested}: a window needs at least 2 tokens, one to predict the other.")
    if context is not None and requested > context:
        raise InvalidConfig(
            f"sequence_length={requested} is longer than the model's context of {context} tokens; "
            f"lower it to {context} or less."
        )
    return requested


def calibration_windows(
    config: ModeGPTConfig,
    tokenizer: Any,
    *,
    sequence_length: int,
    vocab_size: int | None = None,
    context: int | None = None,
    hub: Mapping[str, Any] = MappingProxyType({}),
    fewer: bool = False,
) -> TokenWindows:
    """Read the calibration windows of `config.dataset`, of shape (num_samples, sequence_length).

    If a text has fewer windows than `config.num_samples`, raise, or use all of them if `fewer` is true. Ready windows,
    token ids of shape (windows, length), are all used in their order if they are at most `num_samples`, and the record
    contains their number. From more of them, `num_samples` are drawn by the same seeded permutation.

    Args:
        config: the fields dataset, dataset_split, text_column, num_samples, sequence_length and seed are used.
        tokenizer: tokenizer of the model. It may be None for token ids.
        sequence_length: tokens per window, from `resolve_sequence_length`.
        vocab_size: vocabulary size of the model, which token ids must not reach. None means the size of the tokenizer,
            if there is a tokenizer.
        context: context length of the model. If the configuration sets no sequence length, ready windows may be longer
            than `sequence_length`, up to `context`.
        hub: `token`, `revision` (of the dataset), `cache_dir` (of datasets) and `local_files_only`.
        fewer: whether `config.num_samples` is only an upper limit.

    Raises:
        CalibrationDataError: the data is missing, empty, too short, in the wrong format, not text, or unreachable.
    """
    request = Request(
        tokenizer=tokenizer,
        split=config.dataset_split,
        text_column=config.text_column,
        hub=hub,
        splits=CALIBRATION_SPLITS,
        seed=config.seed,
        windows=config.num_samples,
        length=sequence_length,
        blank_rows=False,
    )
    source = open_source(config.dataset, request)
    ready = source.ids is not None and source.ids.ndim == 2
    if ready:
        longest = sequence_length if context is None else context
        available = _fitting(source, exactly=config.sequence_length, at_most=config.sequence_length or longest)
    else:
        available = _cut(source, request)
        if len(available) < (1 if fewer else config.num_samples):
            raise CalibrationDataError(
                f"{source.name}: found {len(available)} windows of {sequence_length} tokens, which are too few for "
                f"num_samples={config.num_samples}. Lower num_samples or sequence_length, "
                "or provide more text."
            )
    _check_vocabulary(available, source.name, tokenizer, vocab_size)
    chosen = available
    if not ready or len(available) > config.num_samples:
        order = torch.randperm(len(available), generator=torch.Generator().manual_seed(config.seed))
        chosen = available[order[: config.num_samples]]
    return _with_record(chosen, source, len(available), tokenizer)


def evaluation_windows(
    dataset: Any,
    tokenizer: Any,
    *,
    sequence_length: int,
    max_windows: int | None = None,
    split: str | None = None,
    text_column: str | None = None,
    vocab_size: int | None = None,
    hub: Mapping[str, Any] = MappingProxyType({}),
) -> TokenWindows:
    """Read the first `max_windows` windows of `dataset` in their order, of shape (windows, sequence_length).

    `split` defaults to "test", else "validation", else "train", and the record contains the choice. Ready windows keep
    their own length, which may be shorter than `sequence_length`. The other arguments are those of
    `calibration_windows`.

    Raises:
        CalibrationDataError: as `calibration_windows`, or a streamed dataset is used without `max_windows`.
        InvalidConfig: `max_windows` or `sequence_length` is too small.
    """
    if max_windows is not None and max_windows < 1:
        raise InvalidConfig(f"max_windows must be at least 1 or None, found {max_windows}.")
    resolve_sequence_length(sequence_length, None)
    request = Request(
        tokenizer=tokenizer,
        split=split,
        text_column=text_column,
        hub=hub,
        splits=EVALUATION_SPLITS,
        seed=None,
        windows=max_windows,
        length=sequence_length,
        blank_rows=True,
    )
    source = open_source(dataset, request)
    if source.ids is not None and source.ids.ndim == 2:
        available = _fitting(source, exactly=None, at_most=sequence_length)
    else:
        available = _cut(source, request)
        if len(available) == 0:
            raise CalibrationDataError(
                f"{source.name}: the text is shorter than one window of {sequence_length} tokens. "
                "Lower sequence_length, or provide more text."
            )
    _check_vocabulary(available, source.name, tokenizer, vocab_size)
    windows = _with_record(available[:max_windows], source, len(available), tokenizer)
    if warning := describe_degenerate(windows):
        logger.warning(warning)
    return windows


def describe_degenerate(windows: TokenWindows) -> str | None:
    """Describe the windows with too few distinct tokens to be text. Return None if all windows have enough.

    The special token that begins a window does not count.
    """
    found, fewest = _count_degenerate(windows)
    if not found:
        return None
    return (
        f"{found} of the {len(windows.tokens)} windows contain fewer than {fewest} distinct tokens, for example blank "
        "lines, padding or repeated characters. Remove these parts from the dataset, because they are not text."
    )


def _count_degenerate(windows: TokenWindows) -> tuple[int, int]:
    """Return the number of windows with too few distinct tokens, and the number of distinct tokens that is enough."""
    tokens = windows.tokens if windows.record.get("first_token") is None else windows.tokens[:, 1:]
    fewest = min(tokens.shape[1], max(2, min(FEWEST_DISTINCT, windows.tokens.shape[1] // 8)))
    distinct = (tokens.sort(dim=1).values.diff(dim=1) != 0).sum(dim=1) + 1  # (windows,)
    return int((distinct < fewest).sum()), fewest


def _cut(source: Source, request: Request) -> Tensor:
    """Return all complete windows of the source's text, (windows, length). They begin with the tokenizer's BOS."""
    ids = source.ids
    if ids is None:
        if request.tokenizer is None:
            raise CalibrationDataError(f"{source.name}: text requires a tokenizer; pass tokenizer=..., or token ids.")
        # One more window than requested, because the record must show if the source has more.
        enough = (request.windows + 1) * request.length if source.in_part and request.windows else None
        text = joined(source.documents, source.name, request.tokenizer, blank_rows=request.blank_rows, tokens=enough)
        ids = encode(request.tokenizer, text)
    windows = ids[: len(ids) // request.length * request.length].view(-1, request.length)
    bos = _opening(source, request.tokenizer)
    if bos is not None:
        windows[:, 0] = bos
    return windows


def _opening(source: Source, tokenizer: Any) -> int | None:
    return opening_token(tokenizer) if source.ids is None else None


def _fitting(source: Source, *, exactly: int | None, at_most: int) -> Tensor:
    """Return ready windows, if the model and the configuration accept their length."""
    assert source.ids is not None
    length = source.ids.shape[1]
    if exactly is not None and length != exactly:
        raise CalibrationDataError(
            f"{source.name}: the windows have {length} tokens, expected sequence_length={exactly}. "
            f"Omit sequence_length, set it to {length}, or pass the tokens as one text of shape (tokens,)."
        )
    if length > at_most:
        raise CalibrationDataError(
            f"{source.name}: windows of {length} tokens are longer than the {at_most} tokens allowed. "
            f"Set sequence_length={length} if the model's context allows it, or pass shorter windows."
        )
    return source.ids


def _check_vocabulary(ids: Tensor, name: str, tokenizer: Any, vocab_size: int | None) -> None:
    if vocab_size is None and tokenizer is not None:
        vocab_size = len(tokenizer)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        limit = "a vocabulary" if vocab_size is None else f"the vocabulary of {vocab_size}"
        raise CalibrationDataError(
            f"{name}: token ids from {low} to {high} do not fit {limit}; use the tokenizer that belongs to the model."
        )


def _with_record(tokens: Tensor, source: Source, available: int, tokenizer: Any) -> TokenWindows:
    """Add the record to windows. Raise if most of them are degenerate."""
    tokens = tokens.contiguous()
    digest = hashlib.sha256(np.asarray(tokens.shape, dtype="<i8").tobytes())
    digest.update(tokens.numpy().astype("<i8").tobytes())
    bos = _opening(source, tokenizer)
    record = {
        "name": source.name,
        **{key: source.origin.get(key) for key in ("split", "revision", "text_column", "file_sha256")},
        "windows": tokens.shape[0],
        "sequence_length": tokens.shape[1],
        "tokens": tokens.numel(),
        "available_windows": available,
        "first_token": None if bos is None else tokenizer.convert_ids_to_tokens(bos),
        "sha256": digest.hexdigest(),
    }
    windows = TokenWindows(tokens, record)
    if _count_degenerate(windows)[0] > MOST_DEGENERATE * len(tokens):
        raise CalibrationDataError(f"{source.name}: {describe_degenerate(windows)}")
    return windows
