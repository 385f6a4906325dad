"""Convert token ids from the caller: windows of equal length, or one text."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optimum_modegpt.config import IN_MEMORY
from optimum_modegpt.errors import CalibrationDataError

IDS, MASK = "input_ids", "attention_mask"
"""The keys of a tokenizer's output that are used. All others are ignored."""

IN_MEMORY_IDS = f"{IN_MEMORY}token ids"


def kind_of(item: Any) -> str:
    """Classify an item: text, conversation, message, encoding, number, numbers, or else the name of its type.

    An encoding is the output of a tokenizer, a mapping with `input_ids`.
    """
    if isinstance(item, str):
        return "text"
    if isinstance(item, numbers.Number):
        return "number"
    if isinstance(item, Tensor | np.ndarray):
        return "numbers"
    if isinstance(item, Mapping):
        return "encoding" if IDS in item else "message"
    inner = {kind_of(part) for part in item} if isinstance(item, Sequence) and not isinstance(item, bytes) else set()
    if inner == {"message"}:
        return "conversation"
    return "numbers" if inner == {"number"} else type(item).__name__


def as_ids(data: Any, name: str = IN_MEMORY_IDS) -> Tensor:
    """Convert tensors, arrays or lists to int64 on the CPU, of shape (windows, length), or (tokens,) for one text.

    Raises:
        CalibrationDataError: the numbers are not integers, or the shape is different.
    """
    ids = _as_tensor(data, name)
    shape = tuple(ids.shape)
    if ids.ndim not in (1, 2) or 0 in shape:
        raise CalibrationDataError(f"{name}: token ids must have shape (windows, length) or (tokens,), found {shape}.")
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise CalibrationDataError(f"{name}: token ids must be integers, found {ids.dtype} of shape {shape}.")
    return ids.detach().to("cpu", torch.int64)


def from_encodings(encodings: Iterable[Mapping[str, Any]], name: str = IN_MEMORY_IDS) -> Tensor:
    """Stack the rows of several encodings into windows (windows, length), without padding and empty rows.

    Raises:
        CalibrationDataError: the rows differ in length, all are empty, or a mask does more than mark padding.
    """
    rows = [row for encoding in encodings if not _is_empty(encoding[IDS]) for row in _rows(encoding, name)]
    return _stacked(_filled(rows, name), name)


def from_encoding(encoding: Mapping[str, Any], name: str = IN_MEMORY_IDS) -> Tensor:
    """Read one encoding, of a single text (tokens,) or of a batch (windows, length).

    Raises:
        CalibrationDataError: as `from_encodings`.
    """
    ids = as_ids(encoding[IDS], name)
    rows = _filled(_rows({**encoding, IDS: ids}, name), name)
    return rows[0] if ids.ndim == 1 else _stacked(rows, name)


def _filled(rows: Sequence[Tensor], name: str) -> list[Tensor]:
    """Return the rows that contain tokens. After padding is removed, some rows may be empty."""
    filled = [row for row in rows if len(row) > 0]
    if not filled:
        raise CalibrationDataError(f"{name}: all rows are empty, or all of their tokens are padding.")
    return filled


def _is_empty(ids: Any) -> bool:
    return isinstance(ids, Sequence | Tensor | np.ndarray) and len(ids) == 0


def _as_tensor(data: Any, name: str) -> Tensor:
    if isinstance(data, Tensor):
        return data
    if isinstance(data, np.ndarray):
        if data.dtype.kind not in "iu":
            raise CalibrationDataError(f"{name}: token ids must be integers, found {data.dtype} of shape {data.shape}.")
        return torch.from_numpy(data.astype(np.int64))
    if not isinstance(data, Sequence) or isinstance(data, str | bytes):
        raise CalibrationDataError(f"{name}: token ids must be integers, found {type(data).__name__}.")
    if not any(isinstance(item, Sequence | Tensor | np.ndarray) for item in data):
        return _numbers(data, name)
    return _stacked([_as_tensor(row, name) for row in data], name)


def _numbers(data: Sequence[Any], name: str) -> Tensor:
    if not all(isinstance(number, numbers.Number) for number in data):
        strange = next(type(item).__name__ for item in data if not isinstance(item, numbers.Number))
        raise CalibrationDataError(f"{name}: token ids must be integers, found {strange}.")
    return torch.tensor(list(data))


def _stacked(rows: Sequence[Tensor], name: str) -> Tensor:
    shapes = {tuple(row.shape) for row in rows}
    if len(shapes) > 1:
        lengths = sorted(len(row) for row in rows)
        raise CalibrationDataError(
            f"{name}: the rows must form windows of equal length without padding, found lengths from {lengths[0]} to "
            f"{lengths[-1]}. Tokenise without padding and cut the ids into rows of equal length, or join them into "
            "one list of ids, which is cut into windows. You can also pass the text itself."
        )
    return torch.stack(list(rows))


def _rows(encoding: Mapping[str, Any], name: str) -> list[Tensor]:
    """Return the rows of an encoding, each (tokens,), without the padding that its attention mask marks."""
    ids = as_ids(encoding[IDS], name)
    rows = list(ids.view(-1, ids.shape[-1]))
    if encoding.get(MASK) is None:
        return rows
    mask = _as_tensor(encoding[MASK], name)
    if mask.shape != ids.shape:
        raise CalibrationDataError(
            f"{name}: {MASK} has shape {tuple(mask.shape)}, {IDS} {tuple(ids.shape)}; they must be the same."
        )
    masks = mask.cpu().view(-1, ids.shape[-1])
    return [_unpadded(row, mask, name) for row, mask in zip(rows, masks, strict=True)]


def _unpadded(row: Tensor, mask: Tensor, name: str) -> Tensor:
    """Return one row without padding: from the first to the last position that the mask shows."""
    places = mask.nonzero().flatten()
    if len(places) == 0:
        return row[:0]
    first, last = int(places[0]), int(places[-1])
    if len(places) != last - first + 1:
        raise CalibrationDataError(
            f"{name}: {MASK} hides tokens inside a row, which calibration and evaluation do not support. It may only "
            f"mark padding at the ends; omit {MASK}, or remove the hidden tokens."
        )
    return row[first : last + 1]
