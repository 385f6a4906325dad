"""Read the files of a result folder that this package wrote and that are complete."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from optimum_modegpt.errors import EvaluationError, OutputError, UnsupportedModel
from optimum_modegpt.layouts.records import is_result, is_stock_result
from optimum_modegpt.loading.models import load_config
from optimum_modegpt.loading.safetensors_index import read_headers, weight_bytes, weight_files, weights_digest
from optimum_modegpt.loading.source import DEMO, Source, is_repo_id
from optimum_modegpt.report import Report

logger = logging.get_logger(__name__)

REPORT, EVALUATION = "report.json", "evaluation.json"
PIPELINES = {"ForCausalLM": "text-generation", "ForSequenceClassification": "text-classification"}
"""The Hub's names for tasks, by the ending of the name of a class."""
BREAKING = str.maketrans({"`": "'", "|": "¦", "<": "‹"})
"""Replacements for characters that would end a code span or a table cell, or begin HTML."""


@dataclass(frozen=True)
class Result:
    """The contents of a result folder, with all text as by `sanitized`. Any field of its files may be missing."""

    config: Any
    record: dict[str, Any]
    """The record of the compression in config.json. A hand-written one may have values of any type."""
    report: dict[str, Any]
    evaluation: dict[str, Any]
    weights_changed: bool | None
    """Whether the weights differ from those that the compression produced; None if that is unknown."""
    parameters: int | None
    """Number of parameters in the weight files; None without such files, or if they are packed."""
    weight_bytes: int | None
    has_tokenizer: bool

    @property
    def base(self) -> str | None:
        """Return the dense model: a name on the Hub, "demo", or the last part of a folder's path."""
        base = self.record.get("base_model", "")
        if base.startswith("/"):
            base = base.rpartition("/")[2]
        return base or None

    @property
    def base_is_on_hub(self) -> bool:
        """Return whether `base` is a name on the Hub; a folder is kept as its last part and has no revision."""
        if self.base is None or self.base == DEMO or not is_repo_id(self.base):
            return False
        return "/" in self.base or "base_revision" in self.record

    @property
    def sparsity(self) -> float | None:
        """Return the achieved sparsity."""
        return self.record.get("achieved", {}).get("sparsity")

    @property
    def compressed_name(self) -> str:
        """Return the card's name for the result of the compression; the folder may have a temporary name."""
        base = re.sub(r"[^\w.-]+", "-", (self.base or "model").rpartition("/")[2])
        if self.sparsity is None:
            return f"{base}-modegpt"
        return f"{base}-modegpt-{100 * self.sparsity:.0f}"

    @property
    def is_stock(self) -> bool:
        """Return whether the saved class is one of transformers."""
        return is_stock_result(self.config)

    @property
    def architecture(self) -> str:
        """Return the name of the saved class."""
        return (self.config.architectures or [""])[0]

    @property
    def task(self) -> str | None:
        """Return the Hub's name for the task of the saved class; None for a class without a known head."""
        for ending, name in PIPELINES.items():
            if self.architecture.endswith(ending):
                return name
        return None

    @property
    def quantization(self) -> str | None:
        """Return the method that quantised the model after the compression; None if it was not quantised."""
        found = getattr(self.config, "quantization_config", None)
        return sanitized(str(found.get("quant_method"))) if isinstance(found, dict) else None

    @property
    def name(self) -> str:
        """Return the card's name for the model."""
        if "recovered" in self.record:
            return f"{self.compressed_name}-recovered"
        return self.compressed_name


def sanitized(value: Any) -> Any:
    """Return untrusted JSON without nulls, and with every text on one line and free of Markdown and HTML syntax."""
    if isinstance(value, str):
        return " ".join(value.split()).translate(BREAKING)
    if isinstance(value, dict):
        return {sanitized(str(key)): sanitized(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [sanitized(item) for item in value]
    return value


def read(folder: Path) -> Result:
    """Read the folder of a compressed model. Raise `UnsupportedModel` if it does not contain one."""
    config = load_config(Source(str(folder)))
    if not is_result(config):
        raise UnsupportedModel(f"{folder} contains a dense model ({config.model_type}); expected a compressed one.")
    record = dict(config.modegpt or {})
    report, evaluation = read_report(folder, record), read_evaluation(folder)
    has_weights = next(folder.glob("*.safetensors"), None) is not None
    digest = weights_digest(folder) if report or evaluation else None  # reads all weights
    # An evaluation of other weights, as before a fine-tuning, is dropped. Without weight files, it is trusted.
    if has_weights and digest != evaluation.get("weights_sha256"):
        evaluation = {}
    changed = None
    if record.get("recovered") is not None:
        changed = True
    elif report and not has_weights:
        changed = False
    elif digest is not None and "weights_sha256" in report:
        changed = digest != report["weights_sha256"]
    parameters = None
    if weight_files(folder) and not getattr(config, "quantization_config", None):
        tensors = read_headers(Source(str(folder))).values()
        parameters = sum(tensor.size for tensor in tensors if tensor.dtype.startswith(("F", "BF")))
    size = weight_bytes(folder) or report.get("weight_bytes")
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    return Result(config, sanitized(record), report, evaluation, changed, parameters, size, has_tokenizer)


def read_report(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Load the report of the compression in `record`; empty if it is missing or belongs to another model."""
    if not (folder / REPORT).is_file():
        return {}
    try:
        report = Report.load(folder / REPORT)
        content = sanitized(report.to_dict())
    except (OSError, EvaluationError, RecursionError) as error:
        logger.warning("%s is not changed, and the card does not include it: %s", folder / REPORT, error)
        return {}
    if (report.config, report.calibration) != (record.get("recipe"), record.get("calibration")):
        return {}
    return content


def read_evaluation(folder: Path) -> dict[str, Any]:
    """Read the measurements, of any weights; empty if the file is missing or was not written by this package."""
    try:
        return check_evaluation(folder)
    except OutputError as error:
        logger.warning("%s The card does not include it.", error)
        return {}


def check_evaluation(folder: Path) -> dict[str, Any]:
    """Read the measurements, of any weights; empty if there is no file.

    Raise `OutputError` if `evaluation.json` was written by another program or is cut off.
    """
    path = folder / EVALUATION
    if not path.exists():
        return {}
    found: Any = None
    try:
        found = sanitized(json.loads(path.read_text(encoding="utf-8")))
        is_ours = bool({"texts", "tasks"} & found.keys()) and _has_numbers(found)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        is_ours = False
    if not is_ours:
        raise OutputError(f"{path} was not written by this package or is cut off. It was not changed; move it.")
    return found


def _has_numbers(evaluation: dict[str, Any]) -> bool:
    """Return whether all values that are formatted as numbers are numbers; add empty lists and mappings if missing."""
    numbers = []
    for entry in evaluation.setdefault("texts", []):
        entry.setdefault("settings", {})
        numbers += [entry["perplexity"], entry["text"]["windows"], entry["text"]["sequence_length"]]
        numbers += [entry.get("reference_perplexity", 0), entry.get("kl", 0), entry.get("top1_agreement", 0)]
    for kind in ("tasks", "reference_tasks"):
        for metrics in evaluation.setdefault(kind, {}).values():
            for score in metrics.values():
                numbers.append(score["value"])
    return all(isinstance(number, int | float) for number in numbers)
