"""Open sources of text and token ids: files, folders, Hub datasets, lists and in-memory datasets.

A single file and an unnamed `datasets.Dataset` are the split "train". The rows of a .txt file are its lines.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, IterableDataset, config
from datasets.exceptions import DatasetsError
from datasets.naming import camelcase_to_snakecase
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
from huggingface_hub.utils.sha import sha_fileobj
from torch import Tensor

from optimum_modegpt.calibration.parsing import IDS, MASK, as_ids, kind_of, pieces
from optimum_modegpt.config import IN_MEMORY
from optimum_modegpt.errors import CalibrationDataError
from optimum_modegpt.mixture import FILES, SELF

CALIBRATION_SPLITS = ("train",)
EVALUATION_SPLITS = ("test", "validation", "train")
TEXT_COLUMNS = ("text", "content", "messages", "conversations")
OTHER_SUFFIXES = (".arrow", ".csv", ".gz", ".html", ".md", ".npy", ".pdf", ".pt", ".tsv", ".xml", ".zip")
"""Suffixes of files that are not supported. A name with such a suffix is not searched on the Hub."""
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
LARGE_BYTES = 16 * 2**20
"""Size from which a source is read only in part. wikitext-2 is smaller; alpaca and wikitext-103 are larger."""
BLANK_LINES = re.compile(r"(?:[^\S\n]*\n){8,}")
"""A longer run of blank lines than between paragraphs or chapters. Calibration replaces it by one blank line."""
PART = 2**14
"""Characters per part of a large text. Parts are drawn at random."""
SHUFFLE_BUFFER = 1000
WITHOUT_HUB = (
    "Without the Hub, pass your own text as dataset (--dataset FILE on the command line): a local .txt, .jsonl, "
    ".json or .parquet file, or a folder. In Python, you can also pass a list of strings or of conversations, a "
    "datasets.Dataset, or token ids."
)


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the Hub: its id, the subset to read, and whether to stream it, if it is too large to download."""

    path: str
    subset: str | None = None
    streamed: bool = False


HUB_DATASETS = {
    "wikitext2": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": HubDataset("allenai/c4", "en", streamed=True),
    "alpaca": HubDataset("tatsu-lab/alpaca"),
}
"""Short names. To use a folder or file of the same name, pass for example `./c4`."""


@dataclass(frozen=True)
class Request:
    """Options for reading a source."""

    split: str | None
    """None reads the first available one of the default splits."""
    text_column: str | None
    """None selects it automatically."""
    windows: int | None
    """Number of windows after which reading may stop. None reads everything."""
    seed: int | None
    """For calibration, the seed for the order of a source that is read in part. None for evaluation, which reads every
    source in its own order, with all blank lines."""
    hub: Mapping[str, Any]
    """`token`, `revision`, `cache_dir` and `local_files_only`."""


@dataclass(frozen=True)
class Source:
    """Documents (strings or conversations) in reading order, or token ids; and their origin for the record."""

    name: str
    documents: Iterable[Any] = ()
    ids: Tensor | None = None
    in_part: bool = False
    split: str | None = None
    revision: str | None = None
    text_column: str | None = None
    file_sha256: str | None = None


def open_source(dataset: Any, request: Request) -> Source:
    """Open a dataset from a name, a path or an object. Raise `CalibrationDataError` if it cannot be read."""
    if isinstance(dataset, os.PathLike):
        return _open_path(Path(dataset), request)
    if isinstance(dataset, str):
        return _open_name(dataset, request)
    if isinstance(dataset, Dataset | IterableDataset | datasets.DatasetDict | datasets.IterableDatasetDict):
        return _from_dataset(dataset, Source(f"{IN_MEMORY}{type(dataset).__name__}"), request)
    if isinstance(dataset, Tensor | np.ndarray | Mapping | Sequence) and not isinstance(dataset, bytes):
        return _from_memory(dataset, request)
    raise CalibrationDataError(
        f"a dataset of type {type(dataset).__name__} cannot be read; expected a name, a file, a list of strings or of "
        "conversations, a datasets.Dataset, or token ids."
    )


def _open_name(name: str, request: Request) -> Source:
    if name == SELF:
        raise CalibrationDataError(
            f"{SELF!r} is text that the dense model writes, and only a compression or a distillation can read it. For "
            f"a file or folder of this name, write ./{SELF}."
        )
    path = Path(os.path.expanduser(name))
    is_file_name = path.suffix.lower() in (*FILES, *OTHER_SUFFIXES)
    # os.path, because Path.exists raises an error for a text that was passed by mistake and is too long for a path.
    is_path = os.path.exists(path) or is_file_name or not HUB_ID.fullmatch(name)
    if is_path and name not in HUB_DATASETS:
        return _open_path(path, request)
    return _open_hub(name, request)


def _from_memory(data: Any, request: Request) -> Source:
    """Return a list of texts or of conversations, one conversation, or token ids."""
    if request.split is not None or request.text_column is not None:
        raise CalibrationDataError(
            f"lists and token ids have no splits and no columns, found split {request.split!r} and text column "
            f"{request.text_column!r}; omit them."
        )
    kinds = [kind_of(data)]
    if isinstance(data, Sequence):
        kinds = sorted(set(map(kind_of, data)))
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none"
        raise CalibrationDataError(f"a list as a dataset needs items of one kind, found {found}.")
    kind = kinds[0]
    if kind == "message" and isinstance(data, Mapping):
        raise CalibrationDataError(
            "a dict as a dataset needs input_ids, or a number for each source as its weight, found the keys "
            f"{', '.join(map(repr, data))}."
        )
    if kind in ("number", "numbers", "encoding"):
        ids = as_ids(data, f"{IN_MEMORY}token ids")
        return Source(f"{IN_MEMORY}token ids {tuple(ids.shape)}", ids=ids)
    if kind == "message":
        data, kind = [data], "conversation"
    size = sum(map(len, data)) if kind == "text" else 0
    documents, in_part = _as_needed(data, size, request)
    plural = "" if len(data) == 1 else "s"
    return Source(f"{IN_MEMORY}{len(data)} {kind}{plural}", documents, in_part=in_part)


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
    return map(rows.__getitem__, order.tolist()), True


# Files and folders


def _open_path(path: Path, request: Request) -> Source:
    if os.path.isdir(path):
        return _open_folder(path, request)
    if not os.path.exists(path):
        raise CalibrationDataError(
            f"{shorten(str(path), 80)!r}: no such file or folder, and not a valid id of a Hub dataset. "
            "To use a string as text, pass it in a list."
        )
    suffix = path.suffix.lower()
    if suffix not in FILES:
        raise CalibrationDataError(
            f"{path.name}: files of type {suffix or '(none)'} are not supported; use {', '.join(FILES)}."
        )
    if path.stat().st_size == 0:
        raise CalibrationDataError(f"{path.name}: the file is empty.")
    with _reading(path.name), path.open("rb") as file:
        source = Source(path.name, split=request.split, file_sha256=sha_fileobj(file).hex())
    if suffix == ".txt":
        return _open_text(path, source, request)
    with _reading(path.name, f"Expected a valid {suffix} file."):
        loader = "parquet" if suffix == ".parquet" else "json"
        data = _load(loader, data_files=glob.escape(str(path.absolute())))
    return replace(_from_dataset(data, source, request), split=request.split)


def _open_text(path: Path, source: Source, request: Request) -> Source:
    if request.text_column is not None:
        raise CalibrationDataError(
            f"text column {request.text_column!r} was requested, but a .txt file has no columns."
        )
    with _reading(path.name, "A .txt file must be UTF-8 text."):
        text = path.read_text(encoding="utf-8-sig")
    if request.split is not None:
        lines = text.splitlines(keepends=True)
        text = ""
        for part in _slices(request.split, {"train": lines}, path.name):
            text += "".join(lines[part.from_ : part.to])
    if request.seed is not None:
        text = BLANK_LINES.sub("\n\n", text)
    parts = [text]
    if request.seed is not None and len(text) > LARGE_BYTES:
        parts = list(pieces(text, PART))
    documents, in_part = _as_needed(parts, len(text), request)
    return replace(source, documents=documents, in_part=in_part)


def _open_folder(path: Path, request: Request) -> Source:
    source = Source(path.resolve().name)
    with _reading(f"the folder {source.name}", "Expected .jsonl, .json or .parquet files, or Dataset.save_to_disk."):
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            data = datasets.load_from_disk(str(path))
        else:
            data = _load(str(path.absolute()))
    return _from_dataset(data, source, request)


def _load(path: str, **arguments: Any) -> Any:
    """Load all splits of local files through a temporary folder, because the cache would keep a copy of them."""
    with tempfile.TemporaryDirectory() as cache:
        builder = datasets.load_dataset_builder(path, cache_dir=cache, **arguments)
        builder.download_and_prepare()
        return builder.as_dataset(in_memory=True)


@contextmanager
def _reading(name: str, advice: str = "") -> Iterator[None]:
    """Convert an error of a file, the Hub or `datasets` into a CalibrationDataError, with the original as its cause."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, StopIteration, DatasetsError, HTTPError) as error:
        reason = f"{type(error).__name__}: {error}"
        if error.__cause__:
            reason += f" ({error.__cause__})"
        reason = shorten(reason, 300).rstrip(".")
        raise CalibrationDataError(f"{name} cannot be read: {reason}. {advice}".strip()) from error


# Hub datasets


def _open_hub(name: str, request: Request) -> Source:
    dataset = HUB_DATASETS.get(name, HubDataset(name))
    parts = [dataset.path]
    options = {"subset": dataset.subset, "split": request.split, "revision": request.hub.get("revision")}
    for option, value in options.items():
        if value is not None:
            parts.append(f"{option} {value}")
    advice = (
        f"To use another cache than {_cache(request.hub)}, set HF_DATASETS_CACHE, or HF_HOME for all caches. "
        "If HF_HUB_OFFLINE is set, unset it to download."
    )
    with _reading(", ".join(parts), f"{advice} {WITHOUT_HUB}"):
        builder = _open_builder(dataset, request.hub)
        if dataset.streamed:
            data = builder.as_streaming_dataset(split=request.split)
        else:
            builder.download_and_prepare()
            data = builder.as_dataset(split=request.split)
    return _from_dataset(data, Source(name, revision=builder.hash), request)


def _open_builder(dataset: HubDataset, hub: Mapping[str, Any]) -> datasets.DatasetBuilder:
    """Return the builder of a dataset from the Hub, or of the requested or newest copy in the cache."""
    subset, revision = dataset.subset, hub.get("revision")
    if not hub.get("local_files_only"):
        builder = datasets.load_dataset_builder(
            dataset.path, subset, cache_dir=hub.get("cache_dir"), revision=revision, token=hub.get("token")
        )
        # Without a connection, datasets falls back to its newest copy, regardless of the requested revision.
        if revision is None or not isinstance(builder, Cache):
            return builder
    *owner, name = dataset.path.split("/")
    version = found = "auto"
    if revision is not None:
        folder = _cache(hub) / "___".join((*owner, camelcase_to_snakecase(name)))
        copies = {copy.name: copy for copy in folder.glob(f"{subset or '*'}/*/*")}
        if revision not in copies:
            raise FileNotFoundError(f"revision {revision} is not in the cache, which has {', '.join(copies) or 'none'}")
        subset, version, found = copies[revision].parts[-3:]
    return Cache(hub.get("cache_dir"), name, subset, version=version, hash=found, repo_id=dataset.path)


def _cache(hub: Mapping[str, Any]) -> Path:
    return Path(os.path.expanduser(hub.get("cache_dir") or config.HF_DATASETS_CACHE))


# Datasets


def _from_dataset(data: Any, source: Source, request: Request) -> Source:
    """Return the documents or token ids of a Dataset, of an IterableDataset, or of a dict of them by split."""
    data, split = _pick_split(data, source.name, request)
    with _reading(source.name):
        first = next(iter(data), None)
    if first is None:
        raise CalibrationDataError(f"{source.name}: the dataset has no rows.")
    column = _pick_column(data, first, source.name, request.text_column)
    if isinstance(data, IterableDataset):
        rows, in_part = _stream(data, source.name, request), True
    else:
        rows, in_part = _as_needed(data, data.data.nbytes * len(data) // data.data.num_rows, request)
    source = replace(source, in_part=in_part, split=split, text_column=column)
    if column != IDS and kind_of(first[column]) != "numbers":
        # None marks a row without text.
        return replace(source, documents=(row[column] for row in rows if row[column] is not None))
    rows = itertools.islice(rows, request.windows if in_part else None)  # one window per row
    name = f"{source.name}, column {column!r}"
    windows = [as_ids({IDS: row[column], MASK: row.get(MASK)}, name) for row in rows]
    return replace(source, ids=as_ids(windows, name))


def _pick_split(data: Any, name: str, request: Request) -> tuple[Dataset | IterableDataset, str | None]:
    """Return the split to read, and its name."""
    if not isinstance(data, Mapping):
        own = None if data.split is None else str(data.split)
        if request.split in (None, own):
            return data, own
        data = {own or "train": data}
    names = list(map(str, data))
    if request.split in names:
        return data[request.split], request.split
    if request.split is not None:
        parts = _slices(request.split, data, name)
        rows = [data[part.splitname].select(range(part.from_, part.to)) for part in parts]
        return datasets.concatenate_datasets(rows), request.split
    wanted = EVALUATION_SPLITS if request.seed is None else CALIBRATION_SPLITS
    if len(names) == 1:
        wanted = names
    for split in wanted:
        if split in names:
            return data[split], split
    raise CalibrationDataError(f"{name}: found no split {' or '.join(wanted)}; splits: {', '.join(names)}.")


def _slices(spec: str, splits: Mapping[str, Any], name: str) -> list[Any]:
    """Return `splitname`, `from_` and `to` for each slice that `spec` names."""
    try:
        lengths = {str(split): len(rows) for split, rows in splits.items()}  # a TypeError if they are streamed
        return datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
    except (TypeError, ValueError) as error:
        raise CalibrationDataError(
            f"{name}: found no split {spec!r}; splits: {', '.join(map(str, splits))}, and slices of them such as "
            "'train[:10%]', unless they are streamed."
        ) from error


def _pick_column(data: Any, first: Mapping[str, Any], name: str, wanted: str | None) -> str:
    """Return the requested column, else one with a usual name for text, else token ids, else the only string column."""
    if wanted is not None and wanted not in first:
        raise CalibrationDataError(f"{name}: found no column {wanted!r}; columns: {', '.join(first)}.")
    if wanted is not None:
        return wanted
    for usual in (*TEXT_COLUMNS, IDS):
        if usual in first:
            return usual
    strings = []
    for column, value in first.items():
        # A streamed dataset may not know the types of its columns.
        feature = data.features[column] if data.features else None
        if isinstance(value, str) or getattr(feature, "dtype", None) in ("string", "large_string"):
            strings.append(column)
    if len(strings) == 1:
        return strings[0]
    raise CalibrationDataError(
        f"{name}: cannot tell which column contains the text. Set text_column to one of {', '.join(strings or first)}."
    )


def _stream(data: IterableDataset, name: str, request: Request) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a streamed dataset, for calibration in random order."""
    if request.windows is None:
        raise CalibrationDataError(f"{name} is streamed and cannot be read to its end; set max_windows.")
    if request.seed is not None:
        data = data.shuffle(seed=request.seed, buffer_size=SHUFFLE_BUFFER)
    with _reading(f"{name}, as it was streamed,", WITHOUT_HUB):
        yield from data
