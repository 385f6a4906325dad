"""Filter untrusted files for the card: only values of the expected types are kept, each in one line."""

from __future__ import annotations

import dataclasses
from typing import Any

from optimum_modegpt.config import ModeGPTConfig

LARGEST = 2**63
ANY = "*"
"""A key of a shape that matches every key of a mapping."""
BREAKING = str.maketrans({"`": "'", "|": "¦", "<": "‹"})
"""Replacements for characters that would end a code span or a table cell, or begin HTML."""


def fitted(value: Any, shape: Any) -> Any:
    """Return the parts of `value` that match a shape, without the others; None if no part matches.

    Args:
        value: any value, as read from JSON.
        shape: a dict of shapes by key, `ANY` for every key; a list of one shape; or a function that returns the value,
            or None if it is of another type.
    """
    if isinstance(shape, dict):
        return _mapping(value, shape) if isinstance(value, dict) else None
    if isinstance(shape, list):
        found = [fitted(each, shape[0]) for each in value] if isinstance(value, list | tuple) else []
        return [each for each in found if each is not None] or None
    return shape(value)


def _mapping(value: dict[Any, Any], shape: dict[str, Any]) -> dict[str, Any]:
    shapes = dict.fromkeys(value, shape[ANY]) if ANY in shape else shape
    found = {text(str(key)): fitted(value.get(key), one) for key, one in shapes.items()}
    return {key: one for key, one in found.items() if key is not None and one is not None}


def text(value: Any) -> str | None:
    """Return a string in one line, with characters of Markdown syntax replaced; None for another type."""
    return (" ".join(value.split()).translate(BREAKING) or None) if isinstance(value, str) else None


def texts(value: Any) -> Any:
    """Return a string or a list of strings; None for another type."""
    return fitted(value, [text]) if isinstance(value, list) else text(value)


def number(value: Any) -> float | None:
    """Return a number; None for another type."""
    return value if type(value) is float or (type(value) is int and abs(value) < LARGEST) else None


def natural(value: Any) -> int | None:
    """Return an integer of at least 1; None for another value."""
    return value if type(value) is int and 0 < value < LARGEST else None


def whole(value: Any) -> int | None:
    """Return an integer of at least 0; None for another value."""
    return value if value == 0 and type(value) is int else natural(value)


def flag(value: Any) -> bool | None:
    """Return True or False; None for another type."""
    return value if isinstance(value, bool) else None


def scalar(value: Any) -> Any:
    """Return a string, a number or a boolean; None for another type."""
    return next((one for one in (text(value), number(value), flag(value)) if one is not None), None)


TEXT = {
    **dict.fromkeys(("name", "split", "revision", "text_column", "file_sha256", "first_token", "sha256"), text),
    **dict.fromkeys(("tokenizer", "vocabulary_sha256", "chat_template_sha256", "foreign_tokenizer"), text),
    **dict.fromkeys(("windows", "sequence_length", "tokens", "available_windows"), natural),
}
"""The record of token windows."""
RECORD = {
    **dict.fromkeys(("base_model", "base_revision", "dtype"), text),
    "base_card": {"license": texts, "license_name": text, "license_link": text, "language": texts},
    "recipe": dict.fromkeys((field.name for field in dataclasses.fields(ModeGPTConfig)), scalar)
    | {"sparsity": number, "seed": whole, "method": text, "allocation": text},
    "calibration": TEXT,
    "achieved": {
        "sparsity": number,
        "parameters": dict.fromkeys(("blocks_before", "blocks_after", "total_before", "total_after"), natural),
    },
    "recovered": {
        **dict.fromkeys(("dataset", "split", "revision", "teacher"), text),
        **dict.fromkeys(("steps", "batch_size", "lora_rank", "tokens", "windows", "sequence_length"), natural),
        "learning_rate": number,
        "seed": whole,
        "distilled": flag,
    },
}
"""The record of the compression in config.json."""
REPORT = {
    "versions": {ANY: text},
    "device": text,
    "stages": [{"seconds": number}],
    "warnings": [text],
    "weight_bytes": natural,
    "weights_sha256": text,
    "blocks": [{"index": whole, "parts": {ANY: {"relative_error": number}}}],
}
SETTINGS = {
    **dict.fromkeys(("reference", "tokenizer", "dtype", "dataset", "dataset_split", "text_column"), text),
    **dict.fromkeys(("include_path", "reference_revision"), text),
    "allow_foreign_tokenizer": flag,
    "batch_size": natural,
    "paths": [text],
}
"""The settings of a measurement: flags of `evaluate`, and which of them named local files or folders."""
SCORE = {
    **dict.fromkeys(("value", "stderr"), number),
    **dict.fromkeys(("num_fewshot", "samples"), whole),
    "higher_is_better": flag,
    "batch_size": natural,
    "version": scalar,
    "lm_eval": text,
}
EVALUATION = {
    "weights_sha256": text,
    "texts": [
        {
            **dict.fromkeys(("perplexity", "reference_perplexity", "kl", "top1_agreement"), number),
            **dict.fromkeys(("tokens", "parameters", "reference_parameters"), natural),
            "text": TEXT,
            "settings": SETTINGS,
        }
    ],
    "tasks": {ANY: {ANY: SCORE}},
    "reference_tasks": {ANY: {ANY: SCORE}},
    "task_settings": {ANY: SETTINGS},
}
