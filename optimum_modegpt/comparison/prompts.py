"""Read prompts, texts or conversations, from a file or from the caller, and convert them to token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from optimum_modegpt.errors import EvaluationError

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or a conversation: messages with `role` and `content`."""
SUFFIXES = (".txt", ".jsonl", ".json")


@dataclass
class EncodedPrompt:
    """A prompt as the models read it: its text, after the chat template for a conversation, and its ids (tokens,)."""

    text: str
    ids: Tensor
    cut_tokens: int = 0
    """Number of tokens that were truncated at the beginning."""


def read_prompts(path: Path) -> list[Prompt]:
    """Read the prompts of a file.

    A .txt file has one prompt per line, a .jsonl file one string or one object with the key `prompt`, `text` or
    `messages` per line, and a .json file a list of such strings or objects.

    Raises:
        EvaluationError: the file cannot be read, is empty, or contains an item that is not a prompt. The message names
            the line or item.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise EvaluationError(f"{path}: expected a file of prompts that ends in {', '.join(SUFFIXES)}.")
    try:
        items = _items(path.read_text(encoding="utf-8-sig"), suffix)
    except (OSError, ValueError, RecursionError) as error:
        raise EvaluationError(f"{path} cannot be read as prompts: {error}") from error
    if not items:
        raise EvaluationError(f"{path} contains no prompt.")
    return [_prompt(item, f"{path}, {place}") for place, item in items.items()]


def _items(text: str, suffix: str) -> dict[str, Any]:
    """Return a mapping place -> item of a file. A place is the number of a line or of an item in a list."""
    if suffix == ".json":
        found = json.loads(text)
        if not isinstance(found, list):
            raise ValueError(f"expected a list, found {type(found).__name__}")
        return {f"item {number}": item for number, item in enumerate(found, 1)}
    items: dict[str, Any] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                items[f"line {number}"] = json.loads(line) if suffix == ".jsonl" else line
            except ValueError as error:
                raise ValueError(f"line {number} is not valid JSON ({error})") from error
    return items


def _prompt(item: Any, place: str) -> Prompt:
    found = item
    if isinstance(item, dict):
        found = item.get("prompt", item.get("text", item.get("messages")))
    if isinstance(found, str):
        return found
    if found and isinstance(found, list) and found is not item and all(isinstance(each, dict) for each in found):
        return found
    expected = '{"prompt": text}, {"text": text}, {"messages": [{"role": …, "content": …}, …]} or a string'
    raise EvaluationError(f"{place}: expected {expected}, found {json.dumps(item, ensure_ascii=False)[:80]}.")


def encode(prompt: Prompt, tokenizer: Any, place: str) -> EncodedPrompt:
    """Encode a prompt as a server would: with special tokens, and a conversation with the generation prompt.

    Raises:
        EvaluationError: the prompt is empty, or the tokenizer's chat template is missing or rejects the conversation.
            The message names `place`.
    """
    text = prompt
    if not isinstance(text, str):
        try:
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise EvaluationError(f"{place} cannot be formatted with the chat template: {error}") from error
    ids = tokenizer(text, add_special_tokens=text is prompt, verbose=False)["input_ids"]
    if not text.strip() or not ids:
        raise EvaluationError(f"{place} is empty; a prompt needs at least one token.")
    return EncodedPrompt(text, torch.tensor(ids, dtype=torch.int64))
