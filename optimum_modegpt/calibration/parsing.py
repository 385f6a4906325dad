"""Convert documents to token ids: strings, conversations, and ids from the caller."""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from torch import Tensor

from optimum_modegpt.errors import CalibrationDataError

IDS, MASK = "input_ids", "attention_mask"
"""The keys of a tokenizer's output that are used. All others are ignored."""

WHOLE_TEXT = 2 * 2**20
"""Maximum characters of a text that is tokenised in one call, because time and memory grow faster than the text."""
PIECE = 2**16
"""Characters per piece of a longer text."""
BREAK = re.compile(r"(?<=[^\W_])\s")
"""White space after a letter or digit, before which tokenizers end a token."""
LEAD = "a"
"""A word that is added before a piece, and whose ids are removed again. Tokenizers may treat the beginning of a text in
a special way."""


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
    if isinstance(item, Sequence) and not isinstance(item, bytes):
        kinds = {kind_of(part) for part in item}
        if kinds == {"message"}:
            return "conversation"
        if kinds == {"number"}:
            return "numbers"
    return type(item).__name__


# Text


def join(documents: Iterable[Any], name: str, tokenizer: Any, *, blank_rows: bool, tokens: int | None = None) -> str:
    """Join documents into one text: strings by a blank line, conversations directly, because the template closes them.

    Args:
        documents: strings, or conversations (lists of messages), but not both.
        name: name of the source for messages.
        tokenizer: tokenizer of the model. Its chat template is applied to conversations.
        blank_rows: whether strings without text count as documents.
        tokens: number of tokens after which, plus 10 %, reading stops. None reads all documents.

    Raises:
        CalibrationDataError: the documents contain no text, or one of them cannot be used.
    """
    kind = None
    texts = []
    missing = None if tokens is None else tokens + tokens // 10 + 1
    for document in documents:
        if not blank_rows and _is_blank(document):
            continue
        kind = kind or kind_of(document)
        text = _text(document, kind, name, tokenizer)
        if missing is not None:
            text, count = _beginning(text, tokenizer, missing)
            missing -= count
        texts.append(text)
        if missing is not None and missing <= 0:
            break
    separator = "" if kind == "conversation" else "\n\n"
    joined = separator.join(texts)
    if _is_blank(joined):
        raise CalibrationDataError(f"{name} contains no text: it is empty, or all of its rows are blank.")
    return joined


def encode(tokenizer: Any, text: str) -> Tensor:
    """Return token ids without special tokens, (tokens,).

    Texts longer than `WHOLE_TEXT` are tokenised in pieces. This gives the same ids if the tokenizer ends a token before
    white space after a word, as those of the supported families do. Others may differ by one token per piece.
    """
    if len(text) <= WHOLE_TEXT:
        return _encode(tokenizer, text)
    first, *others = pieces(text)
    parts = [_encode(tokenizer, first)]
    lead = _encode(tokenizer, LEAD)
    for piece in others:
        ids = _encode(tokenizer, LEAD + piece)
        if torch.equal(ids[: len(lead)], lead):
            parts.append(ids[len(lead) :])
        else:
            parts.append(_encode(tokenizer, piece))
    return torch.cat(parts)


def opening_token(tokenizer: Any) -> int | None:
    """Return the special token that the tokenizer adds before every text, or None if it adds none."""
    plain = _encode(tokenizer, LEAD).tolist()
    opened = _encode(tokenizer, LEAD, special=True).tolist()
    if plain and opened[0] != plain[0]:
        return opened[0]
    return None


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """Cut a text into pieces of `size` characters, at most twice as many, at the end of a word if possible."""
    start = 0
    while len(text) - start > size:
        found = BREAK.search(text, start + size, start + 2 * size)
        end = found.start() if found else start + size
        yield text[start:end]
        start = end
    yield text[start:]


def _encode(tokenizer: Any, text: str, *, special: bool = False) -> Tensor:
    # Not verbose, because the tokenizer would warn that the text is longer than the context.
    return torch.tensor(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"], dtype=torch.int64)


def _beginning(text: str, tokenizer: Any, tokens: int) -> tuple[str, int]:
    """Return as many pieces of the text as contain `tokens` tokens, and their number of tokens."""
    end = count = 0
    for piece in pieces(text):
        end += len(piece)
        count += len(_encode(tokenizer, piece))
        if count >= tokens:
            break
    return text[:end], count


def _is_blank(document: Any) -> bool:
    return isinstance(document, str) and not document.strip()


def _text(document: Any, kind: str, name: str, tokenizer: Any) -> str:
    """Return a string unchanged, or a conversation after the chat template is applied."""
    if kind not in ("text", "conversation") or kind_of(document) != kind:
        raise CalibrationDataError(
            f"{name}: expected only strings, only conversations (lists of {{'role': ..., 'content': ...}}), or only "
            f"token ids, found {type(document).__name__}."
        )
    if kind == "text":
        return document
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationDataError(
            f"{name}: conversations require a chat template, but the tokenizer has none. "
            "Use the tokenizer of a chat model, or pass the conversations as strings."
        )
    for message in document:
        if not {"role", "content"} <= message.keys():
            raise CalibrationDataError(f"{name}: a message needs 'role' and 'content', found {', '.join(message)}.")
    try:
        return tokenizer.apply_chat_template(document, tokenize=False)
    except TemplateError as error:
        roles = ", ".join(str(message["role"]) for message in document)
        raise CalibrationDataError(
            f"{name}: the chat template rejects a conversation with the roles {roles}: {error}"
        ) from error


# Token ids


def as_ids(data: Any, name: str) -> Tensor:
    """Convert token ids to int64 on the CPU, (windows, length), or (tokens,) for one text.

    Args:
        data: a tensor, an array, a list of numbers, the output of a tokenizer, or a list of such rows.
        name: name of the source for messages.

    Raises:
        CalibrationDataError: the numbers are not integers, the shape is different, the rows differ in length, or an
            attention mask hides padding or other tokens.
    """
    if isinstance(data, Sequence) and len(data) > 0 and kind_of(data[0]) in ("numbers", "encoding"):
        return _stack([as_ids(row, name) for row in data], name)
    if isinstance(data, Mapping):
        mask = data.get(MASK)
        if mask is not None and not torch.as_tensor(mask).all():
            raise CalibrationDataError(
                f"{name}: {MASK} hides padding or other tokens, which calibration and evaluation would read. Tokenise "
                "without padding and cut the ids into rows of equal length, or pass the text itself."
            )
        data = data[IDS]
    if isinstance(data, Tensor):
        ids = data.detach().cpu()
    else:
        array = np.array(data, order="C")
        if array.dtype.kind not in "biuf":
            raise CalibrationDataError(f"{name}: token ids must be integers, found {array.dtype}.")
        ids = torch.from_numpy(array)
    shape = tuple(ids.shape)
    if ids.ndim not in (1, 2) or 0 in shape:
        raise CalibrationDataError(f"{name}: token ids must have shape (windows, length) or (tokens,), found {shape}.")
    if ids.dtype == torch.bool or ids.is_floating_point():
        raise CalibrationDataError(f"{name}: token ids must be integers, found {ids.dtype} of shape {shape}.")
    return ids.to(torch.int64)


def _stack(rows: Sequence[Tensor], name: str) -> Tensor:
    lengths = sorted(row.shape[-1] for row in rows)
    if lengths[0] != lengths[-1]:
        raise CalibrationDataError(
            f"{name}: the rows must form windows of equal length without padding, found lengths from {lengths[0]} to "
            f"{lengths[-1]}. Tokenise without padding and cut the ids into rows of equal length, or join them into "
            "one list of ids, which is cut into windows. You can also pass the text itself."
        )
    return torch.cat(torch.atleast_2d(*rows))
