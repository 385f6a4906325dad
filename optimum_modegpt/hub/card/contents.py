"""Read the files of a result folder that this package wrote and that are complete."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from transformers.utils import logging

from optimum_modegpt.errors import EvaluationError, OutputError, UnsupportedModel
from optimum_modegpt.hub.card import schema
from optimum_modegpt.loading.models import load_config
from optimum_modegpt.loading.safetensors_index import read_headers, weight_bytes, weight_files
from optimum_modegpt.loading.source import DEMO, Source
from optimum_modegpt.modeling.modegpt_family import is_compressed
from optimum_modegpt.report import Report

logger = logging.get_logger(__name__)

REPORT, EVALUATION = "report.json", "evaluation.json"
PIPELINES = {"ForCausalLM": "text-generation", "ForSequenceClassification": "text-classification"}


@dataclass(frozen=True)
class Contents:
    """The contents of a result folder."""

    config: Any
    record: dict[str, Any]
    """The record of the compression in config.json; old or hand-written records may lack keys."""
    report: dict[str, Any] | None
    evaluation: dict[str, Any]
    weights_changed: bool | None
    """Whether the weights differ from those that the compression produced; None if that is unknown."""
    stored_parameters: int | None
    """Number of parameters in the weight files; None without such files, or if they are packed."""
    weight_bytes: int | None
    has_tokenizer: bool
    repo_id: str | None = None

    @property
    def base(self) -> str | None:
        """Return the dense model: a name on the Hub, "demo", or the last part of a folder's path."""
        base = self.record.get("base_model")
        return base.rpartition("/")[2] or None if base is not None and base.startswith("/") else base

    @property
    def base_is_on_hub(self) -> bool:
        """Return whether `base` is a name on the Hub; a folder is kept as its last part and has no revision."""
        return (
            self.base is not None
            and self.base != DEMO
            and ("/" in self.base or "base_revision" in self.record)
            and is_repo_id(self.base)
        )

    @property
    def sparsity(self) -> float | None:
        """Return the achieved sparsity."""
        return self.record.get("achieved", {}).get("sparsity")

    @property
    def parameters(self) -> dict[str, int] | None:
        """Return the numbers of parameters before and after the compression."""
        found = self.record.get("achieved", {}).get("parameters", {})
        return found if len(found) == len(schema.RECORD["achieved"]["parameters"]) else None

    @property
    def compressed_name(self) -> str:
        """Return the card's name for the result of the compression; the folder may have a temporary name."""
        base = re.sub(r"[^\w.-]+", "-", (self.base or "model").rpartition("/")[2])
        return f"{base}-modegpt" + ("" if self.sparsity is None else f"-{self.sparsity:.0%}".rstrip("%"))

    @property
    def name(self) -> str:
        """Return the card's name for the model."""
        return self.compressed_name + ("-recovered" if "recovered" in self.record else "")

    @property
    def architecture(self) -> str:
        """Return the name of the saved class."""
        return (self.config.architectures or [""])[0]

    @property
    def pipeline(self) -> str | None:
        """Return the Hub's name for the task of the saved class."""
        return next((tag for ending, tag in PIPELINES.items() if self.architecture.endswith(ending)), None)

    @property
    def is_causal(self) -> bool:
        """Return whether the model has the language-model head, not another one."""
        return self.pipeline == "text-generation"

    @property
    def quantization(self) -> str | None:
        """Return the method that quantised the model after the compression; None if it was not quantised."""
        found = getattr(self.config, "quantization_config", None)
        return schema.text(str(found.get("quant_method"))) if isinstance(found, dict) else None


def is_repo_id(name: str) -> bool:
    """Return whether a model on the Hub can have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def read(folder: Path, repo_id: str | None = None) -> Contents:
    """Read the folder of a compressed model.

    Raises:
        UnsupportedModel: the folder does not contain a compressed model.
    """
    config = load_config(Source(str(folder)))
    if not is_compressed(config.model_type):
        raise UnsupportedModel(f"{folder} contains a dense model ({config.model_type}); expected a compressed one.")
    record = schema.fitted(config.modegpt, schema.RECORD) or {}
    report, evaluation = read_report(folder, config.modegpt), read_evaluation(folder)
    digest = weights_digest(folder) if report or evaluation else None  # reads all weights
    bare = next(folder.glob("*.safetensors"), None) is None
    return Contents(
        config=config,
        record=record,
        report=report,
        # An evaluation of other weights, as before a fine-tuning, is dropped. Without weight files, it is trusted.
        evaluation=evaluation if bare or digest == evaluation.get("weights_sha256") else {},
        weights_changed="recovered" in record or _changed(report, digest, bare),
        stored_parameters=stored_parameters(folder, config),
        weight_bytes=weight_bytes(folder) or (report or {}).get("weight_bytes"),
        has_tokenizer=(folder / "tokenizer_config.json").is_file(),
        repo_id=repo_id,
    )


def _changed(report: dict[str, Any] | None, digest: str | None, bare: bool) -> bool | None:
    """Return whether weights with this digest differ from those of the report; a report without weights is trusted."""
    if report is None:
        return None
    if bare:
        return False
    known = None not in (digest, report.get("weights_sha256"))
    return digest != report["weights_sha256"] if known else None


def read_report(folder: Path, record: Any) -> dict[str, Any] | None:
    """Load the report of the compression in `record`; None if it is missing or belongs to another model."""
    if not (folder / REPORT).is_file():
        return None
    try:
        report = Report.load(folder / REPORT)
    except (OSError, EvaluationError, RecursionError) as error:
        logger.warning("%s is not changed, and the card does not include it: %s", folder / REPORT, error)
        return None
    told = (record.get("recipe"), record.get("calibration")) if isinstance(record, dict) else None
    return schema.fitted(report.to_dict(), schema.REPORT) if (report.config, report.calibration) == told else None


def read_evaluation(folder: Path) -> dict[str, Any]:
    """Read the measurements, of any weights; empty if the file is missing or was not written by this package."""
    try:
        check_evaluation(folder)
    except OutputError as error:
        logger.warning("%s The card does not include it.", error)
        return {}
    if not (folder / EVALUATION).is_file():
        return {}
    found = schema.fitted(json.loads((folder / EVALUATION).read_text(encoding="utf-8")), schema.EVALUATION)
    needed = {"name", "windows", "sequence_length"}
    found["texts"] = [
        entry for entry in found.get("texts", []) if "perplexity" in entry and needed <= entry.get("text", {}).keys()
    ]
    for key in ("tasks", "reference_tasks"):
        found[key] = {
            task: {metric: score for metric, score in metrics.items() if "value" in score}
            for task, metrics in found.get(key, {}).items()
        }
    return found


def check_evaluation(folder: Path) -> None:
    """Raise an error if `evaluation.json` was written by another program or is cut off.

    Raises:
        OutputError: the file is invalid; the message says how to continue.
    """
    path = folder / EVALUATION
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        ours = isinstance(found, dict) and bool(found.keys() & {"texts", "tasks"})
    except (OSError, ValueError, RecursionError):
        ours = False
    if not ours:
        raise OutputError(f"{path} was not written by this package or is cut off. It was not changed; move it.")


def weights_digest(folder: Path) -> str | None:
    """Return the sha256 of names, types, shapes and values of the tensors in safetensors files; None without files.

    The digest does not depend on the distribution of the tensors over files.
    """
    found = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                values = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()
                found[name] = [str(tensor.dtype), list(tensor.shape), values]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest() if found else None


def stored_parameters(folder: Path, config: Any) -> int | None:
    """Return the number of parameters in the weight files; None without such files, or if they are packed."""
    if getattr(config, "quantization_config", None) or not weight_files(folder):
        return None
    tensors = read_headers(Source(str(folder))).values()
    return sum(tensor.size for tensor in tensors if tensor.dtype.startswith(("F", "BF")))
