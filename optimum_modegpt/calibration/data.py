"""Text, conversations or token ids, from wherever they lie, as windows of token ids.

One rule for every text: it is tokenised as a whole without special tokens and cut into windows that do not overlap,
the tail is dropped. Documents are joined by a blank line first; conversations, which the chat template closes itself,
by nothing. Calibration takes the windows in the order of `torch.randperm` under its own seeded generator, evaluation
in the order of the text. What is streamed, or too large to be tokenised whole, is read only as far as needed.

Where the tokenizer opens every text with a special token (BOS), that token takes the place of each window's first, for
the prompts of users begin with it too, and what the model makes of it steers every position behind it. The token that
gives way is never a target, so the same tokens are scored with BOS and without. Token ids are taken as they are given.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import numbers
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import shorten
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from optimum_modegpt.config import IN_MEMORY, ModeGPTConfig
from optimum_modegpt.errors import CalibrationDataError, InvalidConfig

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, IterableDataset


@dataclass(frozen=True)
class TokenWindows:
    """Token ids, and where they came from.

    Attributes:
        tokens: int64 on the CPU, of shape (windows, length).
        record: safe for JSON, always with the same keys. `name`, `split`, `revision` (commit of a Hub dataset),
            `text_column` and `file_sha256` say what was read, None where there is no such thing; `windows`,
            `sequence_length` and `tokens` how much is here; `available_windows` how many there were to choose from in
            what was read; `first_token` is the special token that opens every window, None where the tokenizer adds
            none and of token ids; `sha256` is the digest of the shape and the token ids, both as little-endian int64.
    """

    tokens: Tensor
    record: dict[str, Any]


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hub: its id, the subset to take, and whether it is too large to be downloaded."""

    path: str
    subset: str | None = None
    streamed: bool = False


HUB_DATASETS = {
    "wikitext2": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": HubDataset("allenai/c4", "en", streamed=True),
    "alpaca": HubDataset("tatsu-lab/alpaca"),
}
"""Short names. A folder or file of the same name is reached as `./c4`."""

DEFAULT_SEQUENCE_LENGTH = 2048
CALIBRATION_SPLITS = ("train",)
EVALUATION_SPLITS = ("test", "validation", "train")
TEXT_COLUMNS = ("text", "content", "messages", "conversations")
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
OTHER_SUFFIXES = frozenset({".arrow", ".csv", ".gz", ".html", ".md", ".npy", ".pdf", ".pt", ".tsv", ".xml", ".zip"})
"""What looks like a file that cannot be read, rather than like the id of a Hub dataset."""
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
LARGE_BYTES = 64 * 2**20
"""A dataset with more than this is not tokenised whole: wikitext-2 and alpaca are below, wikitext-103 is above."""
SHUFFLE_BUFFER = 1000
WITHOUT_HUB = (
    "Without the Hub, name a text of your own as dataset, on the command line --dataset FILE: a local .txt, .jsonl, "
    ".json or .parquet file, or a folder; in Python also a list of strings or of conversations, a datasets.Dataset, or "
    "token ids."
)


@dataclass(frozen=True)
class _Request:
    """How to read: `split` or the first of `splits`; `seed` orders what is read in part; `tokens` are enough."""

    tokenizer: Any
    split: str | None
    text_column: str | None
    hub: Mapping[str, Any]
    splits: tuple[str, ...]
    seed: int | None
    tokens: int | None


@dataclass(frozen=True)
class _Source:
    """Either token ids, or documents (strings or conversations) in the order in which they are to be read."""

    name: str
    ids: Tensor | None = None
    documents: Iterable[Any] = ()
    in_part: bool = False
    origin: Mapping[str, Any] = field(default_factory=dict)


def resolve_sequence_length(requested: int | None, context: int | None) -> int:
    """Tokens per window: what is requested, else min(2048, context); `context` is None where the model has no limit.

    Raises:
        InvalidConfig: for fewer than two tokens, or more than the context.
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
    """The windows of `config.dataset` to calibrate on, of shape (num_samples, sequence_length).

    A text that gives fewer windows than `config.num_samples` is refused, or taken whole where `fewer` is true. Ready
    windows, token ids of shape (windows, length), were counted by whoever made them: up to `num_samples` of them are
    all taken, in their order, and the record says how many; of more, `num_samples` are drawn by the same seeded
    permutation.

    Args:
        config: its fields dataset, dataset_split, text_column, num_samples, sequence_length and seed are read.
        tokenizer: the model's; may be None for token ids.
        sequence_length: from `resolve_sequence_length`.
        vocab_size: of the model; token ids must lie below it. None takes the tokenizer's, if there is one.
        context: of the model; lets ready windows keep a length above `sequence_length` where the configuration does
            not name one.
        hub: `token`, `revision` (of the dataset), `cache_dir` (of datasets) and `local_files_only`.
        fewer: whether `config.num_samples` is only the most to take.

    Raises:
        CalibrationDataError: the data is missing, empty, too short, of the wrong form, or cannot be reached.
    """
    request = _Request(
        tokenizer=tokenizer,
        split=config.dataset_split,
        text_column=config.text_column,
        hub=hub,
        splits=CALIBRATION_SPLITS,
        seed=config.seed,
        tokens=config.num_samples * sequence_length,
    )
    source = _open(config.dataset, request)
    ready = source.ids is not None and source.ids.ndim == 2
    if ready:
        longest = sequence_length if context is None else context
        available = _fitting(source, exactly=config.sequence_length, at_most=config.sequence_length or longest)
    else:
        available = _cut(source, request, sequence_length)
        if len(available) < (1 if fewer else config.num_samples):
            raise CalibrationDataError(
                f"{source.name}: {len(available)} windows of {sequence_length} tokens are too few, "
                f"num_samples={config.num_samples} were asked for. Lower num_samples or sequence_length, "
                "or give more text."
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
    """The windows of `dataset` in their order, the first `max_windows` of them, of shape (windows, sequence_length).

    Without `split`, "test", else "validation", else "train" is read; the record says which. Ready windows keep their
    own length, which may be shorter than `sequence_length`. The other arguments are those of `calibration_windows`.

    Raises:
        CalibrationDataError: as `calibration_windows`; also for a streamed dataset without `max_windows`.
        InvalidConfig: `max_windows` or `sequence_length` is too small.
    """
    if max_windows is not None and max_windows < 1:
        raise InvalidConfig(f"max_windows must be at least 1 or None, found {max_windows}.")
    resolve_sequence_length(sequence_length, None)
    request = _Request(
        tokenizer=tokenizer,
        split=split,
        text_column=text_column,
        hub=hub,
        splits=EVALUATION_SPLITS,
        seed=None,
        tokens=None if max_windows is None else max_windows * sequence_length,
    )
    source = _open(dataset, request)
    if source.ids is not None and source.ids.ndim == 2:
        available = _fitting(source, exactly=None, at_most=sequence_length)
    else:
        available = _cut(source, request, sequence_length)
        if len(available) == 0:
            raise CalibrationDataError(
                f"{source.name}: the text is shorter than one window of {sequence_length} tokens. "
                "Lower sequence_length, or give more text."
            )
    _check_vocabulary(available, source.name, tokenizer, vocab_size)
    return _with_record(available[:max_windows], source, len(available), tokenizer)


# Windows


def _cut(source: _Source, request: _Request, length: int) -> Tensor:
    """All whole windows of the source's text, of shape (windows, length), opened by the tokenizer's BOS."""
    ids = source.ids
    if ids is None:
        if request.tokenizer is None:
            raise CalibrationDataError(f"{source.name}: text needs a tokenizer; pass tokenizer=..., or token ids.")
        ids = _encode(request.tokenizer, _text(source, request))
    if len(ids) == 0:
        raise CalibrationDataError(f"{source.name}: the text is empty.")
    windows = ids[: len(ids) // length * length].view(-1, length)  # (windows, length)
    bos = _bos(source, request.tokenizer)
    if bos is not None:
        windows[:, 0] = bos
    return windows


def _fitting(source: _Source, *, exactly: int | None, at_most: int) -> Tensor:
    """Ready windows, if their length is one the model and the configuration accept."""
    assert source.ids is not None
    length = source.ids.shape[1]
    if exactly is not None and length != exactly:
        raise CalibrationDataError(
            f"{source.name}: the windows have {length} tokens, sequence_length={exactly} was asked for. "
            f"Leave sequence_length out, set it to {length}, or pass the tokens as one text of shape (tokens,)."
        )
    if length > at_most:
        raise CalibrationDataError(
            f"{source.name}: windows of {length} tokens are longer than the {at_most} that are accepted. "
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


def _with_record(tokens: Tensor, source: _Source, available: int, tokenizer: Any) -> TokenWindows:
    tokens = tokens.contiguous()
    digest = hashlib.sha256(np.asarray(tokens.shape, dtype="<i8").tobytes())
    digest.update(tokens.numpy().astype("<i8").tobytes())
    bos = _bos(source, tokenizer)
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
    return TokenWindows(tokens, record)


# Text


def _encode(tokenizer: Any, text: str, *, special: bool = False) -> Tensor:
    # Not verbose: it would warn that the text is longer than the context, which is why it is cut.
    return torch.tensor(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"], dtype=torch.int64)


def _bos(source: _Source, tokenizer: Any) -> int | None:
    """The special token that the tokenizer puts before a text; None where it puts none, and for token ids."""
    if source.ids is not None:
        return None
    opened, plain = (_encode(tokenizer, "a", special=special).tolist() for special in (True, False))
    return opened[0] if plain and opened[0] != plain[0] else None


def _text(source: _Source, request: _Request) -> str:
    """The source's documents as one text; of a source read in part, enough of them for the requested tokens."""
    documents = iter(source.documents)
    first = next(documents, None)
    if first is None:
        raise CalibrationDataError(f"{source.name}: there is no text in it.")
    chat = _kind(first) == "conversation"
    if chat and not getattr(request.tokenizer, "chat_template", None):
        raise CalibrationDataError(
            f"{source.name}: conversations need a chat template, and the tokenizer has none. "
            "Use the tokenizer of a chat model, or pass the conversations as strings."
        )
    convert = _from_chat if chat else _plain
    texts = (convert(document, source.name, request.tokenizer) for document in itertools.chain([first], documents))
    if source.in_part and request.tokens is not None:
        texts = _until(texts, request.tokenizer, request.tokens)
    return ("" if chat else "\n\n").join(texts)


def _until(texts: Iterable[str], tokenizer: Any, tokens: int) -> Iterator[str]:
    """The first texts that hold `tokens` tokens one by one, and a tenth more: joined they may tokenise to fewer."""
    missing = tokens + tokens // 10 + 1
    for text in texts:
        yield text
        missing -= len(_encode(tokenizer, text))
        if missing <= 0:
            return


def _plain(document: Any, name: str, tokenizer: Any) -> str:
    if not isinstance(document, str):
        raise CalibrationDataError(
            f"{name}: expected strings or conversations (lists of {{'role': ..., 'content': ...}}), "
            f"found {type(document).__name__}."
        )
    return document


def _from_chat(conversation: Any, name: str, tokenizer: Any) -> str:
    from jinja2.exceptions import TemplateError

    if _kind(conversation) != "conversation":
        raise CalibrationDataError(f"{name}: expected conversations only, found {type(conversation).__name__}.")
    for message in conversation:
        if not {"role", "content"} <= message.keys():
            raise CalibrationDataError(f"{name}: a message needs 'role' and 'content', found {', '.join(message)}.")
    try:
        return tokenizer.apply_chat_template(conversation, tokenize=False)
    except TemplateError as error:
        roles = ", ".join(str(message["role"]) for message in conversation)
        raise CalibrationDataError(
            f"{name}: the chat template refuses a conversation with the roles {roles}: {error}"
        ) from error


def _kind(item: Any) -> str:
    """Text, conversation, message, number, numbers; the type's name for anything else."""
    if isinstance(item, str):
        return "text"
    if isinstance(item, numbers.Number):
        return "number"
    if isinstance(item, Tensor | np.ndarray):
        return "numbers"
    if isinstance(item, Mapping):
        return "message"
    inner = {_kind(part) for part in item} if isinstance(item, Sequence) and not isinstance(item, bytes) else set()
    if inner == {"message"}:
        return "conversation"
    return "numbers" if inner == {"number"} else type(item).__name__


# Sources


def _open(dataset: Any, request: _Request) -> _Source:
    if isinstance(dataset, os.PathLike):
        return _open_local(Path(dataset), request)
    if isinstance(dataset, str):
        return _open_name(dataset, request)
    if isinstance(dataset, Tensor | np.ndarray):
        return _ready(dataset, request)
    if isinstance(dataset, Sequence) and not isinstance(dataset, bytes):
        return _open_sequence(dataset, request)
    import datasets

    live = (datasets.Dataset, datasets.IterableDataset, datasets.DatasetDict, datasets.IterableDatasetDict)
    if isinstance(dataset, live):
        return _from_dataset(dataset, _Source(f"{IN_MEMORY}{type(dataset).__name__}"), request)
    raise CalibrationDataError(
        f"a dataset of type {type(dataset).__name__} cannot be read; expected a name, a file, a list of strings or of "
        "conversations, a datasets.Dataset, or token ids."
    )


def _open_name(name: str, request: _Request) -> _Source:
    if name in HUB_DATASETS:
        return _open_hub(name, request)
    path = Path(os.path.expanduser(name))
    suffix = path.suffix.lower()
    is_file_name = suffix == ".txt" or suffix in LOADERS or suffix in OTHER_SUFFIXES
    # os.path: a text passed by mistake is too long for a path, which Path.exists raises for.
    if os.path.exists(path) or is_file_name or not HUB_ID.fullmatch(name):
        return _open_local(path, request)
    return _open_hub(name, request)


def _open_sequence(items: Sequence[Any], request: _Request) -> _Source:
    kinds = sorted({_kind(item) for item in items})
    if len(kinds) != 1:
        found = f"found {' and '.join(kinds)}" if kinds else "found none"
        raise CalibrationDataError(f"a list as a dataset needs items of one kind, {found}.")
    kind = kinds[0]
    if kind in ("number", "numbers"):
        return _ready(items, request)
    _refuse_choices(request, "a list")
    if kind == "message":  # a single conversation
        items, kind = [items], "conversation"
    if kind not in ("text", "conversation"):
        raise CalibrationDataError(
            f"a list of {kind} cannot be read; expected strings, conversations (lists of "
            "{'role': ..., 'content': ...}), or token ids of equal lengths."
        )
    return _Source(f"{IN_MEMORY}{len(items)} {kind}{'s' if len(items) != 1 else ''}", documents=items)


def _ready(data: Any, request: _Request) -> _Source:
    """Token ids that are there already: (windows, length), or (tokens,) for one text."""
    _refuse_choices(request, "token ids")
    ids = _as_tensor(data)
    shape = tuple(ids.shape)
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise CalibrationDataError(f"token ids must be integers, found {ids.dtype} of shape {shape}.")
    if ids.ndim not in (1, 2) or 0 in shape:
        raise CalibrationDataError(f"token ids must have shape (windows, length) or (tokens,), found {shape}.")
    return _Source(f"{IN_MEMORY}token ids {shape}", ids=ids.detach().to("cpu", torch.int64))


def _as_tensor(data: Any) -> Tensor:
    if isinstance(data, Tensor):
        return data
    if isinstance(data, np.ndarray):
        if data.dtype.kind not in "iu":
            raise CalibrationDataError(f"token ids must be integers, found {data.dtype} of shape {data.shape}.")
        return torch.from_numpy(data.astype(np.int64))
    if _kind(data[0]) == "number":
        return torch.tensor(list(data))
    rows = [_as_tensor(row) for row in data]
    shapes = sorted({tuple(row.shape) for row in rows})
    if len(shapes) > 1:
        raise CalibrationDataError(
            f"token ids must form windows of equal length, found shapes {', '.join(map(str, shapes[:4]))}; "
            "join them into one text of shape (tokens,), which is cut into windows."
        )
    return torch.stack(rows)


def _refuse_choices(request: _Request, what: str) -> None:
    if request.split is not None:
        raise CalibrationDataError(f"split {request.split!r} was asked for, but {what} has no splits.")
    if request.text_column is not None:
        raise CalibrationDataError(f"text column {request.text_column!r} was asked for, but {what} has no columns.")


# Files and folders


def _open_local(path: Path, request: _Request) -> _Source:
    if os.path.isdir(path):
        return _open_folder(path, request)
    if not os.path.exists(path):
        raise CalibrationDataError(
            f"{shorten(str(path), 80)!r}: there is no such file or folder, and it cannot be the id of a Hub dataset. "
            "To use a text itself, pass it in a list."
        )
    suffix = path.suffix.lower()
    if suffix != ".txt" and suffix not in LOADERS:
        known = ", ".join((".txt", *LOADERS))
        raise CalibrationDataError(f"{path.name}: files of type {suffix or '(none)'} cannot be read, only {known}.")
    if path.stat().st_size == 0:
        raise CalibrationDataError(f"{path.name}: the file is empty.")
    with _reading(path.name):
        source = _Source(path.name, origin={"file_sha256": _file_sha256(path)})
    return _open_text(path, source, request) if suffix == ".txt" else _open_table(path, source, request)


def _open_text(path: Path, source: _Source, request: _Request) -> _Source:
    _refuse_choices(request, "a .txt file")
    with _reading(path.name, "A .txt file must be UTF-8 text."):
        text = path.read_text(encoding="utf-8-sig")
    return _Source(source.name, documents=[text], origin=source.origin)


def _open_table(path: Path, source: _Source, request: _Request) -> _Source:
    from datasets import load_dataset_builder

    if request.split is not None:
        raise CalibrationDataError(f"split {request.split!r} was asked for, but a file has no splits.")
    loader = LOADERS[path.suffix.lower()]
    # Read into memory through a folder of its own: the user's cache would keep a copy of their data.
    with tempfile.TemporaryDirectory() as cache, _reading(path.name, f"Expected a valid {path.suffix} file."):
        builder = load_dataset_builder(loader, data_files=glob.escape(str(path.absolute())), cache_dir=cache)
        builder.download_and_prepare()
        table = builder.as_dataset(split="train", in_memory=True)
    table = _from_dataset(table, source, request)
    return replace(table, origin={**table.origin, "split": None})


def _open_folder(path: Path, request: _Request) -> _Source:
    from datasets import load_dataset_builder, load_from_disk

    source = _Source(path.resolve().name)
    saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
    with _reading(f"the folder {source.name}", "Expected .jsonl, .json or .parquet files, or Dataset.save_to_disk."):
        if saved:
            data = load_from_disk(str(path))
        else:
            builder = load_dataset_builder(str(path.absolute()), cache_dir=request.hub.get("cache_dir"))
            data = _build(builder, request, streamed=False)
    return _from_dataset(data, source, request)


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def _reading(what: str, advice: str = "") -> Iterator[None]:
    """Turns a failure of a file, of the Hub or of `datasets` into ours; the original stays as its cause."""
    from datasets.exceptions import DatasetsError

    # That of whichever client huggingface_hub is built on; not every one of its failures is an OSError.
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    try:
        yield
    except (OSError, ValueError, RuntimeError, StopIteration, DatasetsError, HTTPError) as error:
        reason = f"{type(error).__name__}: {error}" + (f" ({error.__cause__})" if error.__cause__ else "")
        reason = shorten(reason, 300).rstrip(".")
        raise CalibrationDataError(f"{what} cannot be read: {reason}. {advice}".strip()) from error


# Datasets


def _open_hub(name: str, request: _Request) -> _Source:
    known = HUB_DATASETS.get(name, HubDataset(name))
    with _reading(_tried(known, request), WITHOUT_HUB):
        builder = _hub_builder(known, request.hub)
        data = _build(builder, request, streamed=known.streamed)
    return _from_dataset(data, _Source(name, origin={"revision": builder.hash}), request)


def _tried(known: HubDataset, request: _Request) -> str:
    parts = {"subset": known.subset, "split": request.split, "revision": request.hub.get("revision")}
    details = ", ".join(f"{key} {value}" for key, value in parts.items() if value is not None)
    place = "what the Hub left in the local cache" if request.hub.get("local_files_only") else "the Hub"
    return f"{known.path}{f' ({details})' if details else ''} on {place}"


def _hub_builder(known: HubDataset, hub: Mapping[str, Any]) -> DatasetBuilder:
    from datasets import load_dataset_builder
    from datasets.packaged_modules.cache.cache import Cache

    if hub.get("local_files_only"):
        # load_dataset has no argument for this, only an environment variable.
        return Cache(
            repo_id=known.path,
            dataset_name=known.path.split("/")[-1],
            config_name=known.subset,
            cache_dir=hub.get("cache_dir"),
            version="auto",
            hash="auto",
        )
    return load_dataset_builder(
        known.path,
        known.subset,
        cache_dir=hub.get("cache_dir"),
        revision=hub.get("revision"),
        token=hub.get("token"),
    )


def _build(builder: DatasetBuilder, request: _Request, *, streamed: bool) -> Any:
    """The requested split; all of them by name where none was requested."""
    if streamed:
        return builder.as_streaming_dataset(split=request.split)
    builder.download_and_prepare()
    return builder.as_dataset(split=request.split)


def _from_dataset(data: Any, source: _Source, request: _Request) -> _Source:
    """The documents of a Dataset, of an IterableDataset, or of a dict of them by split."""
    data, split = _pick_split(data, source.name, request)
    with _reading(source.name):
        first = next(iter(data), None)
    if first is None:
        raise CalibrationDataError(f"{source.name}: there are no rows in it.")
    column = _pick_column(_columns(data, first), source.name, request.text_column)
    rows, in_part = _rows(data, source.name, request)
    return _Source(
        source.name,
        documents=_documents(rows, column, source.name),
        in_part=in_part,
        origin={**source.origin, "split": split, "text_column": column},
    )


def _pick_split(data: Any, name: str, request: _Request) -> tuple[Dataset | IterableDataset, str | None]:
    if not isinstance(data, Mapping):
        own = None if data.split is None else str(data.split)
        if request.split not in (None, own):
            raise CalibrationDataError(f"{name}: split {request.split!r} was asked for, this is split {own!r}.")
        return data, own
    wanted = request.splits if request.split is None else (request.split,)
    choices = list(data) if request.split is None and len(data) == 1 else [split for split in wanted if split in data]
    if not choices:
        raise CalibrationDataError(
            f"{name}: there is no split {' or '.join(map(repr, wanted))}; splits: {', '.join(map(str, data))}."
        )
    return data[choices[0]], str(choices[0])


def _columns(data: Dataset | IterableDataset, first: Mapping[str, Any]) -> dict[str, bool]:
    """Every column, and whether it holds strings; a streamed dataset may know its columns by its first row only."""
    if data.features is None:
        return {column: isinstance(value, str) for column, value in first.items()}
    return {
        column: getattr(feature, "dtype", None) in ("string", "large_string")
        for column, feature in data.features.items()
    }


def _pick_column(columns: Mapping[str, bool], name: str, wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in columns:
            raise CalibrationDataError(f"{name}: there is no column {wanted!r}; columns: {', '.join(columns)}.")
        return wanted
    strings = [column for column, holds_strings in columns.items() if holds_strings]
    usual = [column for column in TEXT_COLUMNS if column in columns]
    if usual or len(strings) == 1:
        return (usual or strings)[0]
    candidates = f"columns of strings: {', '.join(strings)}" if strings else f"columns: {', '.join(columns)}"
    raise CalibrationDataError(f"{name}: which column holds the text? Name it with text_column; {candidates}.")


def _rows(data: Any, name: str, request: _Request) -> tuple[Iterable[Mapping[str, Any]], bool]:
    """The rows in the order in which they are to be read, and whether they are to be read in part."""
    from datasets import IterableDataset

    if isinstance(data, IterableDataset):
        if request.tokens is None:
            raise CalibrationDataError(f"{name} is streamed and not read to its end; say how much with max_windows.")
        shuffled = data if request.seed is None else data.shuffle(seed=request.seed, buffer_size=SHUFFLE_BUFFER)
        return _streamed(shuffled, name), True
    if request.tokens is None or data.data.nbytes * len(data) <= LARGE_BYTES * data.data.num_rows:
        return data, False
    if request.seed is None:
        return data, True
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(request.seed))
    return (data[index] for index in order.tolist()), True


def _streamed(data: IterableDataset, name: str) -> Iterator[Mapping[str, Any]]:
    rows = iter(data)
    while True:
        with _reading(f"{name}, as it was streamed,", WITHOUT_HUB):
            row = next(rows, None)
        if row is None:
            return
        yield row


def _documents(rows: Iterable[Mapping[str, Any]], column: str, name: str) -> Iterator[Any]:
    """The column's values but for None, which is how tables say that a row has no text."""
    for row in rows:
        value = row[column]
        if value is None:
            continue
        if _kind(value) not in ("text", "conversation"):
            raise CalibrationDataError(
                f"{name}: column {column!r} holds {type(value).__name__}, expected strings or conversations "
                "(lists of {'role': ..., 'content': ...})."
            )
        yield value
