"""Writes the card, and the files beside it that it is written from."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers.utils import logging

from optimum_modegpt.evaluation.inspection import BlockRanks, block_ranks
from optimum_modegpt.integration.card.commands import (
    compress_call,
    compress_command,
    evaluate_commands,
    evaluate_notes,
    notes,
    recover_command,
)
from optimum_modegpt.integration.card.contents import (
    EVALUATION,
    REPORT,
    Contents,
    check_evaluation,
    read,
    read_evaluation,
    read_report,
    weights_digest,
)
from optimum_modegpt.integration.card.header import metadata
from optimum_modegpt.integration.card.shapes import TEXT, fitted
from optimum_modegpt.integration.headers import weight_bytes
from optimum_modegpt.integration.reading import load_config
from optimum_modegpt.integration.readme import TRAINER
from optimum_modegpt.integration.source import DEMO, Source
from optimum_modegpt.plot import plot_kept
from optimum_modegpt.report import PARTS, Report

logger = logging.get_logger(__name__)

CARD, PICTURE = "README.md", "ranks.png"
TEMPLATE = Path(__file__).with_name("card.md.jinja")
MARK = (
    "<!-- Written by optimum_modegpt, and written again when there is news; to keep words of your own, delete this. -->"
)
MEASURED_ON = ("name", "split", "text_column", "file_sha256", "first_token", "windows", "sequence_length")
"""What makes two measurements the same one, so that the newer replaces the older: the text and how much of it."""


def write_card(folder: Path, repo_id: str | None = None) -> Path:
    """Writes README.md into the folder of a compressed model, and `ranks.png` where matplotlib is installed.

    The card says what config.json, report.json, evaluation.json and the weight files say. A README.md that a person
    wrote is left alone. Where `repo_id` is known, its code names it. Returns the path of README.md.

    Raises:
        UnsupportedModel: the folder holds no compressed model.
        EvaluationError: its configuration was edited and cannot be read.
    """
    path = folder / CARD
    if path.exists() and not may_be_replaced(path):
        return path
    found = read(folder, repo_id)
    blocks = block_ranks(found.config)
    picture = folder / PICTURE
    if importlib.util.find_spec("matplotlib") is not None and not picture.is_dir():
        draw(found, blocks, picture)
    card = ModelCard.from_template(
        metadata(found), template_path=str(TEMPLATE), **page(found, blocks), has_picture=picture.is_file()
    )
    path.write_text(f"{card}\n", encoding="utf-8", newline="\n")
    return path


def may_be_replaced(path: Path) -> bool:
    """Whether a README.md is ours or the Trainer's, and no person's; it may be in any encoding."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return is_ours(text) or TRAINER in text


def is_ours(text: str) -> bool:
    """Whether a card was written by `write_card` and not taken over by a person since."""
    return MARK in text


def save_report(folder: Path, report: Report) -> Report:
    """Writes the report of a compression beside its weights, and returns it as written.

    The first time it keeps the digest of the weights, by which a later card knows whether they were changed since.
    """
    digest = report.weights_sha256 or weights_digest(folder)
    report = dataclasses.replace(report, weight_bytes=weight_bytes(folder), weights_sha256=digest)
    report.save(folder / REPORT)
    return report


def take_along(source: Path, folder: Path) -> None:
    """Copies report and evaluation of the folder that a model was loaded from to where it was saved unchanged.

    Unchanged are weights whose digest the report or the evaluation has. What stands there already is left alone.
    """
    told = {
        REPORT: read_report(source, load_config(Source(str(folder))).modegpt),
        EVALUATION: read_evaluation(source),
    }
    digests = {each["weights_sha256"] for each in told.values() if each and "weights_sha256" in each}
    if digests and weights_digest(folder) in digests:
        for name, found in told.items():
            if found and not (folder / name).exists():
                shutil.copyfile(source / name, folder / name)


def add_evaluation(folder: Path, result: dict[str, Any]) -> None:
    """Puts a result of the command `evaluate` into `evaluation.json` of a folder, and renews the card.

    One entry a task, and one for every text, number and length of windows: a newer one replaces an older one, but not
    one without a reference one with it. What was measured of other weights goes. The log tells of both.

    Raises:
        UnsupportedModel: the folder holds no compressed model.
        OutputError: its `evaluation.json` is none of ours.
    """
    check_evaluation(folder)
    found = read(folder).evaluation
    if dropped := measurements(read_evaluation(folder)) - measurements(found):
        logger.warning("%d earlier measurements in %s are of other weights and were dropped.", dropped, EVALUATION)
    evaluation = {**found, "weights_sha256": weights_digest(folder)}
    if "perplexity" in result:
        entry = {key: value for key, value in result.items() if key not in ("model", "tasks", "reference_tasks")}
        evaluation["texts"] = with_entry(evaluation.get("texts", []), entry)
    reference = result.get("reference_tasks", {})
    for task, scores in result.get("tasks", {}).items():
        # All three, so that nothing of an older measurement stands beside the newer one.
        for key, value in (
            ("tasks", scores),
            ("reference_tasks", reference.get(task, {})),
            ("task_settings", result.get("settings", {})),
        ):
            evaluation.setdefault(key, {})[task] = value
    (folder / EVALUATION).write_text(json.dumps(evaluation, indent=2) + "\n", encoding="utf-8")
    write_card(folder)


def measurements(evaluation: dict[str, Any]) -> int:
    """How many texts and tasks were measured."""
    return len(evaluation.get("texts", [])) + len(evaluation.get("tasks", {}))


def with_entry(entries: list[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The measurements on texts with a new one."""
    same = [each for each in entries if measured_on(each) == measured_on(entry)]
    if "kl" not in entry and any("kl" in each for each in same):
        logger.warning("%s was measured with a reference before, which is kept.", entry["text"]["name"])
        return entries
    return [*(each for each in entries if each not in same), entry]


def measured_on(entry: dict[str, Any]) -> tuple[Any, ...]:
    """What a perplexity was measured on, alike for a new entry and one that was read from a file."""
    text = fitted(entry["text"], TEXT)
    return tuple(text.get(key) for key in MEASURED_ON)


def draw(found: Contents, blocks: tuple[BlockRanks, ...], path: Path) -> None:
    """The picture of the kept widths."""
    kept = {part: [block.ranks[part] / block.dense_ranks[part] for block in blocks] for part in PARTS}
    plot_kept(kept, found.name, path)


# -------------------------------------------------------------------------------------------------------------- page


def page(found: Contents, blocks: tuple[BlockRanks, ...]) -> dict[str, Any]:
    """What the template shows."""
    dtype = found.config.dtype or torch.float32
    fresh = found.report if found.weights_changed is False else None
    return {
        "mark": MARK,
        "found": found,
        "record": found.record,
        "recipe": found.record.get("recipe", {}),
        "parameters": found.parameters,
        **totals(found, dtype),
        "dtype": str(dtype).removeprefix("torch."),
        "embedded": found.base == DEMO,
        "auto_class": auto_class(found),
        "blocks": blocks,
        "fresh": fresh,
        "errors": relative_errors(fresh),
        "seconds": sum(stage["seconds"] for stage in fresh.get("stages", []) if stage) if fresh else None,
        "command": compress_command(found),
        "call": compress_call(found),
        "recover_command": recover_command(found),
        "notes": notes(found),
        "evaluate_commands": evaluate_commands(found),
        "evaluate_notes": evaluate_notes(found),
        "texts": found.evaluation.get("texts", []),
        "tasks": found.evaluation.get("tasks", {}),
        "reference_tasks": found.evaluation.get("reference_tasks", {}),
        "task_settings": found.evaluation.get("task_settings", {}),
        **references(found),
    }


def totals(found: Contents, dtype: torch.dtype) -> dict[str, int | None]:
    """Parameters before and now, and bytes before; what was before is that of a language model."""
    record, unknown = found.parameters, found.quantization is not None
    before = record["total_before"] if record and found.is_causal and not unknown else None
    now = found.stored_parameters or (record["total_after"] if record and before else None)
    return {"before": before, "now": now, "bytes_before": before and before * dtype.itemsize}


def references(found: Contents) -> dict[str, Any]:
    """What the measured models were compared with: a title for each of the two tables."""
    settings = found.evaluation.get("task_settings", {})
    tasks = [
        settings.get(task, {}).get("reference")
        for task, metrics in found.evaluation.get("reference_tasks", {}).items()
        if metrics
    ]
    texts = [entry.get("settings", {}).get("reference") for entry in found.evaluation.get("texts", []) if "kl" in entry]
    return {"text_reference": reference_title(found, texts), "task_reference": reference_title(found, tasks)}


def reference_title(found: Contents, names: list[str | None]) -> str:
    """How to call what was compared with."""
    if set(names) <= {found.base}:
        return "dense model"
    return f"`{names[0]}`" if names[0] is not None and len(set(names)) == 1 else "reference"


def auto_class(found: Contents) -> str:
    """The Auto class that loads the saved class."""
    classes = getattr(found.config, "auto_map", None) or {}
    return next((auto for auto, name in classes.items() if name.endswith(f".{found.architecture}")), "AutoModel")


def relative_errors(report: dict[str, Any] | None) -> dict[int, dict[str, float]]:
    """Relative errors by block and part, where a report has them."""
    return {
        block["index"]: {
            name: part["relative_error"] for name, part in block.get("parts", {}).items() if "relative_error" in part
        }
        for block in (report or {}).get("blocks", [])
        if "index" in block
    }
