"""Cut text, conversations or token ids from any source into windows of token ids for calibration and evaluation.

The joined text is tokenised as a whole without special tokens, and cut into windows that do not overlap. Calibration
skips blank rows and long runs of blank lines, and draws the windows with a seeded generator. Evaluation keeps blank
rows, as in published perplexities of WikiText, and takes the windows in the order of the text.

If the tokenizer begins every text with a special token (BOS), that token replaces the first one of each window, because
the prompts of users begin with it too, and it influences every later position. The replaced token is never a target, so
the same tokens are scored with and without BOS.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from optimum_modegpt.calibration.parsing import encode, join, opening_token
from optimum_modegpt.config import IN_MEMORY, ModeGPTConfig
from optimum_modegpt.errors import CalibrationDataError, InvalidConfig
from optimum_modegpt.mixture import SELF, divide, interleave, mixture_of

if TYPE_CHECKING:
    from optimum_modegpt.calibration.sources import Request, Source

logger = logging.getLogger(__name__)

DEFAULT_SEQUENCE_LENGTH = 2048
FEWEST_DISTINCT = 4
"""Minimum number of distinct tokens of a window that is not degenerate. A window shorter than 32 tokens needs at least
one eighth of its length, and at least two."""
MOST_DEGENERATE = 0.5
"""A larger share of degenerate windows is an error, a smaller one a warning."""
RECORD_KEYS = (
    *("name", "split", "revision", "text_column", "file_sha256", "windows", "sequence_length", "tokens"),
    *("available_windows", "first_token", "sha256"),
)
"""The keys that every record of token windows has."""


@dataclass(frozen=True)
class TokenWindows:
    """Token ids with a record of their source.

    Attributes:
        tokens: int64 on the CPU, of shape (windows, length).
        record: safe for JSON, always with the same keys; those that are not given are added. `name`, `split`,
            `revision` (commit of a Hub dataset), `text_column` and `file_sha256` describe the source, and are None if
            they do not apply. `windows`, `sequence_length` and `tokens` are the size of `tokens`. `available_windows`
            is the number of windows in the text that was read. `first_token` is the special token that begins every
            window, None if the tokenizer adds none and for token ids. `sha256` is the digest of the shape and the token
            ids, both as little-endian int64. The record of a mixture also has `sources`, the records of its sources.
            Its `name` joins their names, and keys that describe a single source are None.
    """

    tokens: Tensor
    record: dict[str, Any]

    def __post_init__(self) -> None:
        windows, length = self.tokens.shape
        sizes = {"windows": windows, "sequence_length": length, "tokens": self.tokens.numel()}
        record = dict.fromkeys(RECORD_KEYS) | {"name": f"{IN_MEMORY}token ids", "available_windows": windows}
        record |= self.record | sizes
        record["sha256"] = record["sha256"] or digest_of(self.tokens)
        object.__setattr__(self, "record", record)


@dataclass(frozen=True)
class Part:
    """A source of the calibration text, its number of windows, and the windows unless the model has to write them."""

    source: Any
    windows: int
    read: TokenWindows | None


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


def calibration_windows(config: ModeGPTConfig, tokenizer: Any, **options: Any) -> TokenWindows:
    """Read the calibration windows of `config.dataset`, of shape (num_samples, sequence_length).

    Arguments and errors are those of `read_parts`. The model is not known here, so "self" is an error.
    """
    return mix(read_parts(config, tokenizer, **options))


def read_parts(
    config: ModeGPTConfig,
    tokenizer: Any,
    *,
    sequence_length: int,
    vocab_size: int | None = None,
    context: int | None = None,
    hub: Mapping[str, Any] = MappingProxyType({}),
    fewer: bool = False,
    embedded: Mapping[str, str] = MappingProxyType({}),
) -> list[Part]:
    """Read the calibration windows of each source of `config.dataset` except "self".

    `config.num_samples` windows are divided by weight. Ready windows, token ids of shape (windows, length), are all
    used in their order if they are at most the share of their source. From more of them, the share is drawn by the same
    seeded permutation.

    Args:
        config: the fields dataset, dataset_split, text_column, num_samples, sequence_length and seed are used.
        tokenizer: tokenizer of the model. It may be None for token ids.
        sequence_length: tokens per window, from `resolve_sequence_length`.
        vocab_size: vocabulary size of the model, which token ids must not reach. None means the size of the tokenizer,
            if there is a tokenizer.
        context: context length of the model. If the configuration sets no sequence length, ready windows may be longer
            than `sequence_length`, up to `context`.
        hub: `token`, `revision` (of the dataset), `cache_dir` (of datasets) and `local_files_only`.
        fewer: whether to use all windows of a source that has fewer than its share, instead of raising.
        embedded: the files of short names that are not on the Hub.

    Raises:
        CalibrationDataError: the data is missing, empty, too short, in the wrong format, not text, or unreachable.
    """
    from optimum_modegpt.calibration.sources import Request, open_source  # slow, because it imports datasets

    sources = mixture_of(config.dataset)
    limit = config.sequence_length or context or sequence_length
    parts = []
    for weighted, share in zip(sources, divide([each.weight for each in sources], config.num_samples), strict=True):
        if isinstance(weighted.source, str) and weighted.source == SELF:
            parts.append(Part(SELF, share, None))
            continue
        request = Request(config.dataset_split, config.text_column, share, config.seed, hub)
        if isinstance(weighted.source, str) and weighted.source in embedded:
            source = replace(open_source(embedded[weighted.source], request), name=weighted.source)
        else:
            source = open_source(weighted.source, request)
        available, first_token = _available(source, request, tokenizer, sequence_length, limit)
        _check_vocabulary(available, source.name, vocab_size, tokenizer)
        chosen = _choose(available, source, share, config, fewer)
        parts.append(Part(weighted.source, share, with_record(chosen, source, len(available), first_token)))
    return parts


def mix(parts: Sequence[Part]) -> TokenWindows:
    """Join the windows of all sources so that the first ones, with which costs are measured, contain every source.

    Raises:
        CalibrationDataError: the windows of a source are missing, or have another length than those of the others.
    """
    found = []
    for part in parts:
        if part.read is None:
            raise CalibrationDataError(
                f"dataset={part.source!r} is text that the dense model writes, and no model was given."
            )
        found.append(part.read)
    if len(found) == 1:
        return found[0]
    records = [windows.record for windows in found]
    lengths = {record["name"]: record["sequence_length"] for record in records}
    if len(set(lengths.values())) > 1:
        described = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise CalibrationDataError(
            f"the sources of a mixture need windows of the same length, found tokens per window: {described}."
        )
    remaining = [iter(windows.tokens) for windows in found]
    tokens = torch.stack([next(remaining[source]) for source in interleave([len(each.tokens) for each in found])])
    first_tokens = {record["first_token"] for record in records}
    record = {
        "name": " + ".join(record["name"] for record in records),
        "available_windows": sum(record["available_windows"] for record in records),
        "first_token": first_tokens.pop() if len(first_tokens) == 1 else None,
        "sources": records,
    }
    return TokenWindows(tokens, record)


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

    `split` defaults to "test", else "validation", else "train". Ready windows keep their own length, which may be
    shorter than `sequence_length`. The other arguments are those of `calibration_windows`.

    Raises:
        CalibrationDataError: as `calibration_windows`, or a streamed dataset is used without `max_windows`.
        InvalidConfig: `max_windows` or `sequence_length` is too small.
    """
    if max_windows is not None and max_windows < 1:
        raise InvalidConfig(f"max_windows must be at least 1 or None, found {max_windows}.")
    resolve_sequence_length(sequence_length, None)
    from optimum_modegpt.calibration.sources import Request, open_source  # slow, because it imports datasets

    request = Request(split, text_column, max_windows, None, hub)
    source = open_source(dataset, request)
    available, first_token = _available(source, request, tokenizer, sequence_length, limit=sequence_length)
    _check_vocabulary(available, source.name, vocab_size, tokenizer)
    windows = with_record(available[:max_windows], source, len(available), first_token)
    if warning := describe_degenerate(windows):
        logger.warning(warning)
    return windows


def describe_degenerate(windows: TokenWindows, share: float = 0.0) -> str | None:
    """Describe the windows with too few distinct tokens to be text. Return None if at most this share of them has.

    The special token that begins a window does not count.
    """
    tokens = windows.tokens
    if windows.record.get("first_token") is not None:
        tokens = tokens[:, 1:]
    fewest = min(tokens.shape[1], max(2, min(FEWEST_DISTINCT, windows.tokens.shape[1] // 8)))
    distinct = (tokens.sort(dim=1).values.diff(dim=1) != 0).sum(dim=1) + 1  # (windows,)
    found = int((distinct < fewest).sum())
    if found <= share * len(tokens):
        return None
    return (
        f"{found} of the {len(tokens)} windows contain fewer than {fewest} distinct tokens, for example blank lines, "
        "padding or repeated characters. Remove these parts from the dataset, because they are not text."
    )


def _available(source: Source, request: Request, tokenizer: Any, length: int, limit: int) -> tuple[Tensor, str | None]:
    """Return all windows of a source, and the special token that begins them.

    Ready windows are returned unchanged. They have at most `limit` tokens. A text is cut into windows of `length`.
    """
    ids, opening = source.ids, None
    if ids is not None and ids.ndim == 2:
        if ids.shape[1] > limit:
            raise CalibrationDataError(
                f"{source.name}: the windows have {ids.shape[1]} tokens, expected at most {limit}. Raise "
                "sequence_length if the model's context allows it, or pass shorter windows."
            )
        return ids, None
    if ids is None:
        if tokenizer is None:
            raise CalibrationDataError(f"{source.name}: text requires a tokenizer; pass tokenizer=..., or token ids.")
        enough = None
        if source.in_part and request.windows:
            enough = (request.windows + 1) * length  # one more window, because the record shows if the source has more
        text = join(source.documents, source.name, tokenizer, blank_rows=request.seed is None, tokens=enough)
        ids, opening = encode(tokenizer, text), opening_token(tokenizer)
    windows = ids[: len(ids) // length * length].view(-1, length)
    if len(windows) == 0:
        raise CalibrationDataError(
            f"{source.name}: the text is shorter than one window of {length} tokens. Lower sequence_length, or provide "
            "more text."
        )
    if opening is None:
        return windows, None
    windows[:, 0] = opening
    return windows, tokenizer.convert_ids_to_tokens(opening)


def _check_vocabulary(ids: Tensor, name: str, vocab_size: int | None, tokenizer: Any) -> None:
    if vocab_size is None and tokenizer is not None:
        vocab_size = len(tokenizer)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise CalibrationDataError(
            f"{name}: token ids from {low} to {high} do not fit a vocabulary of {vocab_size or 'unknown'} tokens; use "
            "the tokenizer that belongs to the model."
        )


def _choose(available: Tensor, source: Source, windows: int, config: ModeGPTConfig, fewer: bool) -> Tensor:
    """Draw windows with a seeded permutation. Ready windows that are not too many are all used, in their order."""
    ready = available is source.ids  # windows that were not cut here
    if not ready and len(available) < windows and not fewer:
        length = available.shape[1]
        raise CalibrationDataError(
            f"{source.name}: found {len(available)} windows of {length} tokens, expected {windows} for "
            f"num_samples={config.num_samples}. Lower num_samples or sequence_length, or provide more text."
        )
    if ready and len(available) <= windows:
        return available
    order = torch.randperm(len(available), generator=torch.Generator().manual_seed(config.seed))
    return available[order[:windows]]


def with_record(tokens: Tensor, source: Source, available: int, first_token: str | None) -> TokenWindows:
    """Add the record to the windows of a source. Raise if most of them are degenerate."""
    tokens = tokens.contiguous()
    record = {
        "name": source.name,
        "split": source.split,
        "revision": source.revision,
        "text_column": source.text_column,
        "file_sha256": source.file_sha256,
        "available_windows": available,
        "first_token": first_token,
    }
    windows = TokenWindows(tokens, record)
    if problem := describe_degenerate(windows, MOST_DEGENERATE):
        raise CalibrationDataError(f"{source.name}: {problem}")
    return windows


def digest_of(tokens: Tensor) -> str:
    """Return the sha256 of the shape and the token ids, both as little-endian int64."""
    digest = hashlib.sha256(np.asarray(tokens.shape, dtype="<i8").tobytes())
    digest.update(tokens.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
