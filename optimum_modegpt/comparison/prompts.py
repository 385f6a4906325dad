"""Read prompts, texts or conversations, from a file or from the caller, and convert them to token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimum_modegpt.errors import EvaluationError

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or a conversation: messages with `role` and `content`."""
KEYS = ("prompt", "text", "messages")
"""Keys under which an object of a JSON file may contain its prompt."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the models read it: its text, after the chat template for a conversation, and its ids (tokens,)."""

    text: str
    ids: Tensor


def read_prompts(path: Path) -> list[Prompt]:
    """Read the prompts of a file.

    A .txt file has one prompt per line, a .jsonl file one object with one of `KEYS` per line, and a .json file a list
    of strings or such objects.

    Raises:
        EvaluationError: the file cannot be read, is empty, or contains an item that is not a prompt. The message names
            the line or item.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise EvaluationError(f"{path}: expected a file of prompts that ends in {', '.join(READERS)}.")
    try:
        found = reader(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} cannot be read as prompts: {error}") from error
    except RecursionError as error:
        raise EvaluationError(
            f"{path} cannot be read as prompts: its lists and objects are nested too deeply."
        ) from error
    if not found:
        raise EvaluationError(f"{path} contains no prompt.")
    return [_prompt(item, f"{path}, {place}") for place, item in found]


def encode(prompt: Prompt, tokenizer: Any, place: str) -> EncodedPrompt:
    """Encode a prompt as a server would: with special tokens, and a conversation with the generation prompt.

    Raises:
        EvaluationError: the prompt is empty, or the tokenizer's chat template rejects the conversation. The message
            names `place`.
    """
    is_text = isinstance(prompt, str)
    text = prompt if is_text else _conversation(prompt, tokenizer, place)
    ids = torch.tensor(tokenizer(text, add_special_tokens=is_text, verbose=False)["input_ids"], dtype=torch.int64)
    if not text.strip() or len(ids) == 0:
        raise EvaluationError(f"{place} is empty; a prompt needs at least one token.")
    return EncodedPrompt(text, ids)


def _conversation(messages: Any, tokenizer: Any, place: str) -> str:
    from jinja2.exceptions import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise EvaluationError(
            f"{place} is a conversation, but the tokenizer has no chat template. Use the tokenizer of a chat model, or "
            "pass the prompt as text."
        )
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except (TemplateError, TypeError, KeyError) as error:
        raise EvaluationError(f"{place}: the chat template rejects the conversation: {error}") from error


Found = list[tuple[str, Any]]


def _lines(text: str) -> Found:
    return [(f"line {number}", line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _objects(text: str) -> Found:
    return [(place, _object(place, line)) for place, line in _lines(text)]


def _object(place: str, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is not valid JSON ({error})") from error


def _items(text: str) -> Found:
    items = json.loads(text)
    if not isinstance(items, list):
        raise ValueError(f"expected a list, found {type(items).__name__}")
    return [(f"item {number}", item) for number, item in enumerate(items, 1)]


READERS: dict[str, Callable[[str], Found]] = {".txt": _lines, ".jsonl": _objects, ".json": _items}


def _prompt(item: Any, place: str) -> Prompt:
    key = next((key for key in KEYS if key in item), None) if isinstance(item, dict) else None
    prompt = item[key] if isinstance(item, dict) and key else item
    if isinstance(prompt, str):
        return prompt
    if key == "messages" and isinstance(prompt, list) and prompt and all(isinstance(one, dict) for one in prompt):
        return prompt
    expected = '{"prompt": text}, {"text": text}, {"messages": [{"role": …, "content": …}, …]} or a string'
    raise EvaluationError(f"{place}: expected {expected}, found {json.dumps(item, ensure_ascii=False)[:80]}.")
