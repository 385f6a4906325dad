"""Convert documents to token ids: apply the chat template, join the texts, and tokenise them in pieces."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from optimum_modegpt.calibration.token_ids import kind_of
from optimum_modegpt.errors import CalibrationDataError

WHOLE_TEXT = 2 * 2**20
"""Maximum characters of a text that is tokenised in one call, because time and memory grow faster than the text."""
PIECE = 2**16
"""Characters per piece of a longer text."""
BREAK = re.compile(r"(?<=[^\W_])\s")
"""White space after a letter or digit, before which tokenizers end a token."""
LEAD = "a"
"""A word that is added before a piece, and whose ids are removed again. Tokenizers may treat the beginning of a text in
a special way."""


def encode(tokenizer: Any, text: str) -> Tensor:
    """Return token ids without special tokens, (tokens,).

    Texts longer than `WHOLE_TEXT` are tokenised in pieces. This gives the same ids if the tokenizer ends a token before
    white space after a word, as those of the supported families do. Others may differ by one token per piece.
    """
    if len(text) <= WHOLE_TEXT:
        return _encode(tokenizer, text)
    first, *others = pieces(text)
    lead = _encode(tokenizer, LEAD)
    return torch.cat([_encode(tokenizer, first), *(_encode_behind(lead, tokenizer, piece) for piece in others)])


def opening_token(tokenizer: Any) -> int | None:
    """Return the special token that the tokenizer adds before every text, or None if it adds none."""
    opened, plain = (_encode(tokenizer, LEAD, special=special).tolist() for special in (True, False))
    return opened[0] if plain and opened[0] != plain[0] else None


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """Cut a text into pieces of `size` characters, at most twice as many, at the end of a word if possible."""
    start = 0
    while len(text) - start > size:
        found = BREAK.search(text, start + size, start + 2 * size)
        end = found.start() if found else start + size
        yield text[start:end]
        start = end
    yield text[start:]


def joined(documents: Iterable[Any], name: str, tokenizer: Any, *, blank_rows: bool, tokens: int | None = None) -> str:
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
    rows = iter(documents) if blank_rows else (row for row in documents if not _is_blank(row))
    first = next(rows, "")
    chat = kind_of(first) == "conversation"
    if chat and not getattr(tokenizer, "chat_template", None):
        raise CalibrationDataError(
            f"{name}: conversations require a chat template, but the tokenizer has none. "
            "Use the tokenizer of a chat model, or pass the conversations as strings."
        )
    convert = _from_chat if chat else _plain
    texts = (convert(row, name, tokenizer) for row in itertools.chain([first], rows))
    if tokens is not None:
        texts = _first_texts(texts, tokenizer, tokens + tokens // 10 + 1)
    text = ("" if chat else "\n\n").join(texts)
    if _is_blank(text):
        raise CalibrationDataError(f"{name} contains no text: it is empty, or all of its rows are blank.")
    return text


def _encode(tokenizer: Any, text: str, *, special: bool = False) -> Tensor:
    # Not verbose, because the tokenizer would warn that the text is longer than the context.
    return torch.tensor(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"], dtype=torch.int64)


def _encode_behind(lead: Tensor, tokenizer: Any, piece: str) -> Tensor:
    """Return the ids of `piece` as they are after a word with the ids `lead`."""
    ids = _encode(tokenizer, LEAD + piece)
    return ids[len(lead) :] if torch.equal(ids[: len(lead)], lead) else _encode(tokenizer, piece)


def _first_texts(texts: Iterable[str], tokenizer: Any, missing: int) -> Iterator[str]:
    """Yield texts until they contain `missing` tokens, if tokenised separately. The last text may be truncated."""
    for text in texts:
        taken = 0
        for piece in pieces(text):
            taken += len(piece)
            missing -= len(_encode(tokenizer, piece))
            if missing <= 0:
                yield text[:taken]
                return
        yield text


def _is_blank(document: Any) -> bool:
    return isinstance(document, str) and not document.strip()


def _plain(document: Any, name: str, tokenizer: Any) -> str:
    if not isinstance(document, str):
        raise CalibrationDataError(
            f"{name}: expected strings or conversations (lists of {{'role': ..., 'content': ...}}), "
            f"found {type(document).__name__}."
        )
    return document


def _from_chat(conversation: Any, name: str, tokenizer: Any) -> str:
    from jinja2.exceptions import TemplateError

    if kind_of(conversation) != "conversation":
        raise CalibrationDataError(f"{name}: expected conversations only, found {type(conversation).__name__}.")
    for message in conversation:
        if not {"role", "content"} <= message.keys():
            raise CalibrationDataError(f"{name}: a message needs 'role' and 'content', found {', '.join(message)}.")
    try:
        return tokenizer.apply_chat_template(conversation, tokenize=False)
    except TemplateError as error:
        roles = ", ".join(str(message["role"]) for message in conversation)
        raise CalibrationDataError(
            f"{name}: the chat template rejects a conversation with the roles {roles}: {error}"
        ) from error
