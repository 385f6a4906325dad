"""Open sources of text and token ids: names, files, folders, the Hub, lists and in-memory datasets.

A single file and an unnamed `datasets.Dataset` are the split "train". The rows of a .txt file are its lines. Slices of
splits such as "train[:10%]" work for files, folders and the Hub.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from optimum_modegpt.calibration.hub_datasets import (
    HUB_DATASETS,
    WITHOUT_HUB,
    HubDataset,
    advise,
    describe,
    open_builder,
)
from optimum_modegpt.calibration.token_ids import (
    IDS,
    IN_MEMORY_IDS,
    MASK,
    as_ids,
    from_encoding,
    from_encodings,
    kind_of,
)
from optimum_modegpt.calibration.tokenization import pieces
from optimum_modegpt.config import IN_MEMORY
from optimum_modegpt.errors import CalibrationDataError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

TEXT_COLUMNS = ("text", "content", "messages", "conversations")
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
OTHER_SUFFIXES = frozenset({".arrow", ".csv", ".gz", ".html", ".md", ".npy", ".pdf", ".pt", ".tsv", ".xml", ".zip"})
"""Suffixes of files that are not supported. A name with such a suffix is not searched on the Hub."""
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
LARGE_BYTES = 16 * 2**20
"""Size from which a source is read only in part. wikitext-2 is smaller; alpaca and wikitext-103 are larger."""
BLANK_LINES = re.compile(r"(?:[^\S\n]*\n){8,}")
"""A longer run of blank lines than between paragraphs or chapters. Calibration replaces it by one blank line."""
PART = 2**14
"""Characters per part of a large text. Parts are drawn at random."""
SHUFFLE_BUFFER = 1000
WHOLE = "train"
"""The split of a source that has no splits."""


@dataclass(frozen=True)
class Request:
    """Options for reading a source.

    Attributes:
        tokenizer: tokenizer of the model. None for token ids.
        split: the split to read. None reads the first available one of `splits`.
        text_column: the column to read. None selects it automatically.
        hub: arguments for the Hub.
        splits: default splits in order of preference.
        seed: seed for the order of a source that is read in part. None keeps the source's own order.
        windows: number of windows after which reading may stop. None reads everything.
        length: tokens per window.
        blank_rows: whether rows without text count as documents, and long runs of blank lines are kept.
    """

    tokenizer: Any
    split: str | None
    text_column: str | None
    hub: Mapping[str, Any]
    splits: tuple[str, ...]
    seed: int | None
    windows: int | None
    length: int
    blank_rows: bool


@dataclass(frozen=True)
class Source:
    """Either token ids, or documents (strings or conversations) in reading order."""

    name: str
    ids: Tensor | None = None
    documents: Iterable[Any] = ()
    in_part: bool = False
    origin: Mapping[str, Any] = field(default_factory=dict)


def open_source(dataset: Any, request: Request) -> Source:
    """Open a dataset from a name, a path or an object.

    Raises:
        CalibrationDataError: the dataset is missing, empty, in the wrong format or unreachable.
    """
    if isinstance(dataset, os.PathLike):
        return _open_local(Path(dataset), request)
    if isinstance(dataset, str):
        return _open_name(dataset, request)
    if isinstance(dataset, Tensor | np.ndarray):
        return _from_ids(as_ids(dataset), request)
    if isinstance(dataset, Mapping) and IDS in dataset:
        return _from_ids(from_encoding(dataset), request)
    if isinstance(dataset, Sequence) and not isinstance(dataset, bytes):
        return _open_sequence(dataset, request)
    import datasets

    live = (datasets.Dataset, datasets.IterableDataset, datasets.DatasetDict, datasets.IterableDatasetDict)
    if isinstance(dataset, live):
        return _from_dataset(dataset, Source(f"{IN_MEMORY}{type(dataset).__name__}"), request)
    raise CalibrationDataError(
        f"a dataset of type {type(dataset).__name__} cannot be read; expected a name, a file, a list of strings or of "
        "conversations, a datasets.Dataset, or token ids."
    )


def _open_name(name: str, request: Request) -> Source:
    if name in HUB_DATASETS:
        return _open_hub(name, request)
    path = Path(os.path.expanduser(name))
    suffix = path.suffix.lower()
    is_file_name = suffix == ".txt" or suffix in LOADERS or suffix in OTHER_SUFFIXES
    # os.path, because Path.exists raises an error for a text that was passed by mistake and is too long for a path.
    if os.path.exists(path) or is_file_name or not HUB_ID.fullmatch(name):
        return _open_local(path, request)
    return _open_hub(name, request)


def _open_sequence(items: Sequence[Any], request: Request) -> Source:
    kinds = sorted({kind_of(item) for item in items})
    if len(kinds) != 1:
        found = f"found {' and '.join(kinds)}" if kinds else "found none"
        raise CalibrationDataError(f"a list as a dataset needs items of one kind, {found}.")
    kind = kinds[0]
    if kind in ("number", "numbers"):
        return _from_ids(as_ids(items), request)
    if kind == "encoding":
        return _from_ids(from_encodings(items), request)
    _refuse_choices(request, "a list")
    if kind == "message":  # a single conversation
        items, kind = [items], "conversation"
    if kind not in ("text", "conversation"):
        raise CalibrationDataError(
            f"a list of {kind} is not supported; expected strings, conversations (lists of "
            "{'role': ..., 'content': ...}), or token ids of equal lengths."
        )
    size = sum(len(item) for item in items) if kind == "text" else 0
    documents, in_part = _as_needed(items, size, request)
    name = f"{IN_MEMORY}{len(items)} {kind}{'s' if len(items) != 1 else ''}"
    return Source(name, documents=documents, in_part=in_part)


def _from_ids(ids: Tensor, request: Request) -> Source:
    _refuse_choices(request, "token ids")
    return Source(f"{IN_MEMORY_IDS} {tuple(ids.shape)}", ids=ids)


def _refuse_choices(request: Request, what: str) -> None:
    if request.split is not None:
        raise CalibrationDataError(f"split {request.split!r} was requested, but {what} has no splits.")
    if request.text_column is not None:
        raise CalibrationDataError(f"text column {request.text_column!r} was requested, but {what} has no columns.")


def _as_needed(rows: Sequence[Any], size: int, request: Request) -> tuple[Iterable[Any], bool]:
    """Return the rows in reading order, and whether to read only part of them.

    `size` is their size in bytes or characters.
    """
    if request.windows is None:
        return rows, False
    if request.seed is None:
        return rows, True
    if size <= LARGE_BYTES:
        return rows, False
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(request.seed))
    return (rows[index] for index in order.tolist()), True


# Files and folders


def _open_local(path: Path, request: Request) -> Source:
    if os.path.isdir(path):
        return _open_folder(path, request)
    if not os.path.exists(path):
        raise CalibrationDataError(
            f"{shorten(str(path), 80)!r}: no such file or folder, and not a valid id of a Hub dataset. "
            "To use a string as text, pass it in a list."
        )
    suffix = path.suffix.lower()
    if suffix != ".txt" and suffix not in LOADERS:
        known = ", ".join((".txt", *LOADERS))
        raise CalibrationDataError(f"{path.name}: files of type {suffix or '(none)'} are not supported; use {known}.")
    if path.stat().st_size == 0:
        raise CalibrationDataError(f"{path.name}: the file is empty.")
    with _reading(path.name):
        source = Source(path.name, origin={"file_sha256": _file_sha256(path), "split": request.split})
    return _open_text(path, source, request) if suffix == ".txt" else _open_table(path, source, request)


def _open_text(path: Path, source: Source, request: Request) -> Source:
    if request.text_column is not None:
        raise CalibrationDataError(
            f"text column {request.text_column!r} was requested, but a .txt file has no columns."
        )
    with _reading(path.name, "A .txt file must be UTF-8 text."):
        text = path.read_text(encoding="utf-8-sig")
    if request.split is not None:
        lines = text.splitlines(keepends=True)
        slices = _slices(request.split, {WHOLE: len(lines)}, path.name)
        text = "".join(line for _, first, end in slices for line in lines[first:end])
    if not request.blank_rows:
        text = BLANK_LINES.sub("\n\n", text)
    # Without a seed, a text is read from its beginning. With a seed, its parts are read in random order.
    parts = [text] if request.seed is None or len(text) <= LARGE_BYTES else list(pieces(text, PART))
    documents, in_part = _as_needed(parts, len(text), request)
    return replace(source, documents=documents, in_part=in_part)


def _open_table(path: Path, source: Source, request: Request) -> Source:
    with _reading(path.name, f"Expected a valid {path.suffix} file."):
        data = _in_memory(LOADERS[path.suffix.lower()], data_files=glob.escape(str(path.absolute())))
    table = _from_dataset(data, source, request)
    return replace(table, origin={**table.origin, "split": request.split})


def _open_folder(path: Path, request: Request) -> Source:
    from datasets import load_from_disk

    source = Source(path.resolve().name)
    saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
    with _reading(f"the folder {source.name}", "Expected .jsonl, .json or .parquet files, or Dataset.save_to_disk."):
        data = load_from_disk(str(path)) if saved else _in_memory(str(path.absolute()))
    return _from_dataset(data, source, request)


def _in_memory(path: str, **arguments: Any) -> Any:
    """Load all splits of local files through a temporary folder, because the cache would keep a copy of them."""
    from datasets import load_dataset_builder

    with tempfile.TemporaryDirectory() as cache:
        builder = load_dataset_builder(path, cache_dir=cache, **arguments)
        builder.download_and_prepare()
        return builder.as_dataset(in_memory=True)


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def _reading(what: str, advice: str = "") -> Iterator[None]:
    """Convert an error of a file, the Hub or `datasets` into a CalibrationDataError, with the original as its cause."""
    from datasets.exceptions import DatasetsError

    # The error class of the HTTP client of huggingface_hub. Not all of its errors are OSErrors.
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    try:
        yield
    except (OSError, ValueError, RuntimeError, StopIteration, DatasetsError, HTTPError) as error:
        reason = f"{type(error).__name__}: {error}" + (f" ({error.__cause__})" if error.__cause__ else "")
        reason = shorten(reason, 300).rstrip(".")
        raise CalibrationDataError(f"{what} cannot be read: {reason}. {advice}".strip()) from error


# Datasets


def _open_hub(name: str, request: Request) -> Source:
    dataset = HUB_DATASETS.get(name, HubDataset(name))
    with _reading(describe(dataset, request.split, request.hub), advise(dataset, request.hub)):
        builder = open_builder(dataset, request.hub)
        if dataset.streamed:
            data = builder.as_streaming_dataset(split=request.split)
        else:
            builder.download_and_prepare()
            data = builder.as_dataset(split=request.split)
    return _from_dataset(data, Source(name, origin={"revision": builder.hash}), request)


def _from_dataset(data: Any, source: Source, request: Request) -> Source:
    """Return the documents or token ids of a Dataset, of an IterableDataset, or of a dict of them by split."""
    data, split = _pick_split(data, source.name, request)
    with _reading(source.name):
        first = next(iter(data), None)
    if first is None:
        raise CalibrationDataError(f"{source.name}: the dataset has no rows.")
    column = _pick_column(_columns(data, first), source.name, request.text_column)
    rows, in_part = _rows(data, source.name, request)
    source = replace(source, in_part=in_part, origin={**source.origin, "split": split, "text_column": column})
    if column == IDS or kind_of(first[column]) == "numbers":
        return replace(source, ids=_ids(rows, column, source, request))
    return replace(source, documents=_documents(rows, column, source.name))


def _pick_split(data: Any, name: str, request: Request) -> tuple[Dataset | IterableDataset, str | None]:
    """Return the split to read, and its name."""
    if not isinstance(data, Mapping):
        own = None if data.split is None else str(data.split)
        if request.split in (None, own):
            return data, own
        data = {own or WHOLE: data}
    names = [str(split) for split in data]
    if request.split is not None:
        return (data[request.split] if request.split in names else _sliced(data, request.split, name)), request.split
    choices = names if len(names) == 1 else [split for split in request.splits if split in names]
    if not choices:
        raise CalibrationDataError(
            f"{name}: found no split {' or '.join(map(repr, request.splits))}; splits: {', '.join(names)}."
        )
    return data[choices[0]], choices[0]


def _sliced(data: Mapping[str, Any], spec: str, name: str) -> Dataset:
    from datasets import Dataset, concatenate_datasets

    if not all(isinstance(rows, Dataset) for rows in data.values()):
        raise CalibrationDataError(
            f"{name}: found no split {spec!r}; splits: {', '.join(map(str, data))}, which are streamed and cannot be "
            "sliced."
        )
    slices = _slices(spec, {str(split): len(rows) for split, rows in data.items()}, name)
    return concatenate_datasets([data[split].select(range(first, end)) for split, first, end in slices])


def _slices(spec: str, lengths: Mapping[str, int], name: str) -> list[tuple[str, int, int]]:
    """Return (split, first row, end row) for each split that `spec` names."""
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(spec).to_absolute(lengths)
    except ValueError as error:
        raise CalibrationDataError(
            f"{name}: found no split {spec!r}; splits: {', '.join(lengths)}, and slices of them such as "
            f"'{next(iter(lengths))}[:10%]'."
        ) from error
    return [(part.splitname, part.from_, part.to) for part in parts]


def _columns(data: Dataset | IterableDataset, first: Mapping[str, Any]) -> dict[str, bool]:
    """Return a mapping column -> whether it contains strings.

    A streamed dataset may not know its columns. They are then inferred from its first row.
    """
    if data.features is None:
        return {column: isinstance(value, str) for column, value in first.items()}
    return {
        column: getattr(feature, "dtype", None) in ("string", "large_string")
        for column, feature in data.features.items()
    }


def _pick_column(columns: Mapping[str, bool], name: str, wanted: str | None) -> str:
    """Return the requested column, else one with a usual name for text, else token ids, else the only string column."""
    if wanted is not None:
        if wanted not in columns:
            raise CalibrationDataError(f"{name}: found no column {wanted!r}; columns: {', '.join(columns)}.")
        return wanted
    strings = [column for column, holds_strings in columns.items() if holds_strings]
    usual = [column for column in (*TEXT_COLUMNS, IDS) if column in columns]
    if usual or len(strings) == 1:
        return (usual or strings)[0]
    candidates = f"columns of strings: {', '.join(strings)}" if strings else f"columns: {', '.join(columns)}"
    raise CalibrationDataError(f"{name}: cannot tell which column contains the text. Set text_column; {candidates}.")


def _rows(data: Any, name: str, request: Request) -> tuple[Iterable[Mapping[str, Any]], bool]:
    """Return the rows in reading order, and whether to read only part of them."""
    from datasets import IterableDataset

    if isinstance(data, IterableDataset):
        if request.windows is None:
            raise CalibrationDataError(f"{name} is streamed and cannot be read to its end; set max_windows.")
        shuffled = data if request.seed is None else data.shuffle(seed=request.seed, buffer_size=SHUFFLE_BUFFER)
        return _streamed(shuffled, name), True
    return _as_needed(data, data.data.nbytes * len(data) // data.data.num_rows, request)


def _streamed(data: IterableDataset, name: str) -> Iterator[Mapping[str, Any]]:
    rows = iter(data)
    while True:
        with _reading(f"{name}, as it was streamed,", WITHOUT_HUB):
            row = next(rows, None)
        if row is None:
            return
        yield row


def _documents(rows: Iterable[Mapping[str, Any]], column: str, name: str) -> Iterator[Any]:
    """Yield the values of the column, except None, which marks a row without text."""
    for row in rows:
        value = row[column]
        if value is None:
            continue
        if kind_of(value) not in ("text", "conversation"):
            raise CalibrationDataError(
                f"{name}: column {column!r} contains {type(value).__name__}, expected strings, conversations "
                "(lists of {'role': ..., 'content': ...}), or token ids."
            )
        yield value


def _ids(rows: Iterable[Mapping[str, Any]], column: str, source: Source, request: Request) -> Tensor:
    """Return the token ids of the column, one window per row. Read only as many rows as needed if `in_part`."""
    wanted = itertools.islice(rows, request.windows if source.in_part else None)
    name = f"{source.name}, column {column!r}"
    return from_encodings(({IDS: row[column], MASK: row.get(MASK)} for row in wanted), name)
