"""Build the commands and the Python code of the card that compressed, fine-tuned and evaluated the model."""

from __future__ import annotations

import dataclasses
import json
import shlex
from typing import Any

from optimum_modegpt import demo
from optimum_modegpt.config import IN_MEMORY, ModeGPTConfig
from optimum_modegpt.hub.card.contents import Contents
from optimum_modegpt.loading.source import DEMO

COLUMNS = 88
"""Maximum width of a line of a command on the card."""
COMMAND = ("optimum-cli", "modegpt")
RECOVERY = {
    "teacher": "teacher",
    "dataset": "dataset",
    "split": "dataset_split",
    "sequence_length": "sequence_length",
    "windows": "num_samples",
    "learning_rate": "learning_rate",
    "steps": "steps",
    "batch_size": "batch_size",
    "lora_rank": "lora_rank",
    "seed": "seed",
}
"""Flags of `recover`, by the keys of its record."""
MODEL_FLAGS = ("reference", "reference_revision", "tokenizer", "allow_foreign_tokenizer", "batch_size", "dtype")
TEXT_FLAGS = ("dataset_split", "text_column")
KINDS = {"dataset": "file", "tokenizer": "folder", "reference": "folder", "include_path": "folder"}


# ------------------------------------------------------------------------------------------------------- compression


def choices(found: Contents) -> dict[str, Any]:
    """Return the fields that reproduce the model: sparsity and dataset, and all that differ from the defaults."""
    recipe = found.record.get("recipe", {})
    return {
        field.name: recipe[field.name]
        for field in dataclasses.fields(ModeGPTConfig)
        if field.name in recipe and (field.name in ("sparsity", "dataset") or recipe[field.name] != field.default)
    }


def compress_command(found: Contents) -> str | None:
    """Return the command that reproduces the model; None if an input was an object in memory or is unknown."""
    fields = choices(found)
    if not fields or found.base is None or any(str(value).startswith(IN_MEMORY) for value in fields.values()):
        return None
    words = [*COMMAND, "compress", found.base, *flags(dense_choices(found) | fields)]
    return shell([*words, "--output", found.compressed_name])


def compress_call(found: Contents) -> str | None:
    """Return Python code that reproduces the model; a variable replaces a dataset or tokenizer that was in memory."""
    fields = choices(found)
    if not fields or found.base is None or not found.is_causal:
        return None
    shown = [f"{name}={name if str(value).startswith(IN_MEMORY) else literal(value)}" for name, value in fields.items()]
    loading = [f", {name}={literal(value)}" for name, value in dense_choices(found).items()]
    return (
        "from optimum_modegpt import ModeGPTConfig, ModeGPTModelForCausalLM\n\n"
        f"config = ModeGPTConfig({', '.join(shown)})\n"
        "model = ModeGPTModelForCausalLM.from_pretrained(\n"
        f"    {literal(found.base)}{''.join(loading)}, compression_config=config\n)\n"
        f"model.save_pretrained({literal(found.compressed_name)})"
    )


def dense_choices(found: Contents) -> dict[str, Any]:
    """Return the known arguments with which the dense model was loaded."""
    loading = {"revision": found.record.get("base_revision"), "dtype": found.record.get("dtype")}
    return {name: value for name, value in loading.items() if value is not None}


def notes(found: Contents) -> list[str]:
    """Return which inputs the reader must replace, because the record only describes them."""
    fields, lines = choices(found), []
    if found.base != DEMO and not found.base_is_on_hub:
        lines.append(f"`{found.base}` was a folder: give its path.")
    if found.record.get("calibration", {}).get("file_sha256") and fields.get("dataset") not in (DEMO, None):
        lines.append(f"`{fields['dataset']}` was a file: give its path.")
    in_memory = [(name, value) for name, value in fields.items() if str(value).startswith(IN_MEMORY)]
    lines += [f"`{name}` was an object: {value.removeprefix(IN_MEMORY)}." for name, value in in_memory]
    return lines


def recover_command(found: Contents) -> str | None:
    """Return the command that fine-tuned the model; None if there was none or an input cannot be named."""
    recovered = found.record.get("recovered", {})
    if not {"dataset", "steps"} <= recovered.keys() or recovered["dataset"].startswith(IN_MEMORY):
        return None
    if recovered.get("distilled") and "teacher" not in recovered:
        return None
    given = {flag: recovered[key] for key, flag in RECOVERY.items() if key in recovered}
    return shell([*COMMAND, "recover", found.compressed_name, *flags(given), "--output", found.name])


# -------------------------------------------------------------------------------------------------------- evaluation


def evaluate_commands(found: Contents) -> list[str]:
    """Return the commands that made the measurements of the card."""
    commands = []
    for entry in found.evaluation.get("texts", []):
        if not entry["text"]["name"].startswith(IN_MEMORY):
            settings = entry.get("settings", {})
            words = [*_measured(settings), *_text_flags(found, entry["text"], settings)]
            commands.append(shell([*COMMAND, "evaluate", found.name, *words]))
    by_words: dict[tuple[str, ...], list[str]] = {}
    for task, metrics in found.evaluation.get("tasks", {}).items():
        settings = found.evaluation.get("task_settings", {}).get(task, {})
        examples = next((score.get("num_fewshot") for score in metrics.values()), None)
        words = flags({"num_fewshot": examples, "include_path": settings.get("include_path")})
        by_words.setdefault((*_measured(settings), *words), []).append(task)
    commands += [
        shell([*COMMAND, "evaluate", found.name, "--tasks", ",".join(tasks), *words])
        for words, tasks in by_words.items()
    ]
    return commands


def _measured(settings: dict[str, Any]) -> list[str]:
    return flags({name: settings.get(name) for name in MODEL_FLAGS})


def _text_flags(found: Contents, text: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    limited = text["windows"] < text.get("available_windows", text["windows"])
    return flags(
        {
            "dataset": None if _is_embedded(found, text, settings) else text["name"],
            **{name: settings.get(name) for name in TEXT_FLAGS},
            "sequence_length": text["sequence_length"],
            "max_windows": text["windows"] if limited else None,
        }
    )


def _is_embedded(found: Contents, text: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Return whether a text is the default text of the command for the embedded model."""
    return found.base == DEMO and text["name"] == demo.EVALUATION_TEXT.name and "dataset" not in settings


def evaluate_notes(found: Contents) -> list[str]:
    """Return which paths the reader must replace, because only their last part is kept."""
    every = [entry.get("settings", {}) for entry in found.evaluation.get("texts", [])]
    every += found.evaluation.get("task_settings", {}).values()
    named = {
        (settings[flag], KINDS[flag])
        for settings in every
        for flag in settings.get("paths", [])
        if flag in KINDS and flag in settings
    }
    return [f"`{name}` was a {kind}: give its path." for name, kind in sorted(named)]


# -------------------------------------------------------------------------------------------------------------- words


def flags(values: dict[str, Any]) -> list[str]:
    """Return words of a command line; None and False are left out, and True is a flag without a value."""
    words = []
    for name, value in values.items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def shell(words: list[str]) -> str:
    """Return a command for a shell, wrapped to the width of the card; a flag stays on the line of its value."""
    groups: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    lines = [""]
    for argument in map(shlex.join, groups):
        if len(lines[-1]) + len(argument) > COLUMNS:
            lines.append("   ")
        lines[-1] += f" {argument}"
    return " \\\n".join(lines).strip()


def literal(value: Any) -> str:
    """Return a value as Python source."""
    return json.dumps(value) if isinstance(value, str) else repr(value)
