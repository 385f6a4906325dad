"""What lies in a result folder, as far as it is ours and whole."""

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
from optimum_modegpt.integration.card import shapes
from optimum_modegpt.integration.headers import read_headers, weight_bytes, weight_files
from optimum_modegpt.integration.reading import load_config
from optimum_modegpt.integration.source import DEMO, Source
from optimum_modegpt.modeling.modegpt_family import is_compressed
from optimum_modegpt.report import Report

logger = logging.get_logger(__name__)

REPORT, EVALUATION = "report.json", "evaluation.json"
PIPELINES = {"ForCausalLM": "text-generation", "ForSequenceClassification": "text-classification"}


@dataclass(frozen=True)
class Contents:
    """What lies in a result folder."""

    config: Any
    record: dict[str, Any]
    """What config.json says of the compression; of older ones, and of hand-made ones, keys may be missing."""
    report: dict[str, Any] | None
    evaluation: dict[str, Any]
    weights_changed: bool | None
    """Whether the weights are others than the compression made; None where that is not known."""
    stored_parameters: int | None
    """As the weight files have them; None without such files, and where they are packed."""
    weight_bytes: int | None
    has_tokenizer: bool
    repo_id: str | None = None

    @property
    def base(self) -> str | None:
        """The dense model: a name of the Hub, "demo", or the last part of a folder's path."""
        base = self.record.get("base_model")
        return base.rpartition("/")[2] or None if base is not None and base.startswith("/") else base

    @property
    def base_is_on_hub(self) -> bool:
        """Whether `base` is a name of the Hub: of folders only the last part is kept, and they have no revision."""
        return (
            self.base is not None
            and self.base != DEMO
            and ("/" in self.base or "base_revision" in self.record)
            and is_repo_id(self.base)
        )

    @property
    def sparsity(self) -> float | None:
        """The achieved sparsity."""
        return self.record.get("achieved", {}).get("sparsity")

    @property
    def parameters(self) -> dict[str, int] | None:
        """Numbers of parameters before and after the compression."""
        found = self.record.get("achieved", {}).get("parameters", {})
        return found if len(found) == len(shapes.RECORD["achieved"]["parameters"]) else None

    @property
    def compressed_name(self) -> str:
        """What the card calls the model that the compression made: the name of the folder may be a temporary one."""
        base = re.sub(r"[^\w.-]+", "-", (self.base or "model").rpartition("/")[2])
        return f"{base}-modegpt" + ("" if self.sparsity is None else f"-{self.sparsity:.0%}".rstrip("%"))

    @property
    def name(self) -> str:
        """What the card calls the model."""
        return self.compressed_name + ("-recovered" if "recovered" in self.record else "")

    @property
    def architecture(self) -> str:
        """Name of the saved class."""
        return (self.config.architectures or [""])[0]

    @property
    def pipeline(self) -> str | None:
        """The task of the saved class, as the Hub calls it."""
        return next((tag for ending, tag in PIPELINES.items() if self.architecture.endswith(ending)), None)

    @property
    def is_causal(self) -> bool:
        """Whether this is the language model that the compression made, and no other head on its body."""
        return self.pipeline == "text-generation"

    @property
    def quantization(self) -> str | None:
        """How it was quantised after the compression; None where it was not."""
        found = getattr(self.config, "quantization_config", None)
        return shapes.text(str(found.get("quant_method"))) if isinstance(found, dict) else None


def is_repo_id(name: str) -> bool:
    """Whether a model of the Hub could have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def read(folder: Path, repo_id: str | None = None) -> Contents:
    """What lies in the folder of a compressed model.

    Raises:
        UnsupportedModel: there is none.
    """
    config = load_config(Source(str(folder)))
    if not is_compressed(config.model_type):
        raise UnsupportedModel(f"{folder} holds a dense model ({config.model_type}); a card is for compressed ones.")
    record = shapes.fitted(config.modegpt, shapes.RECORD) or {}
    report, evaluation = read_report(folder, config.modegpt), read_evaluation(folder)
    digest = weights_digest(folder) if report or evaluation else None  # which reads all of them
    bare = next(folder.glob("*.safetensors"), None) is None
    return Contents(
        config=config,
        record=record,
        report=report,
        # Of other weights, from before a fine-tuning for one, it says nothing. Without weights it is taken at its word.
        evaluation=evaluation if bare or digest == evaluation.get("weights_sha256") else {},
        weights_changed="recovered" in record or _changed(report, digest, bare),
        stored_parameters=stored_parameters(folder, config),
        weight_bytes=weight_bytes(folder) or (report or {}).get("weight_bytes"),
        has_tokenizer=(folder / "tokenizer_config.json").is_file(),
        repo_id=repo_id,
    )


def _changed(report: dict[str, Any] | None, digest: str | None, bare: bool) -> bool | None:
    """Whether weights of this digest are others than the report tells of; a bare report is taken at its word."""
    if report is None:
        return None
    if bare:
        return False
    known = None not in (digest, report.get("weights_sha256"))
    return digest != report["weights_sha256"] if known else None


def read_report(folder: Path, record: Any) -> dict[str, Any] | None:
    """The report of the compression that `record` tells of; None where there is none, or that of another model."""
    if not (folder / REPORT).is_file():
        return None
    try:
        report = Report.load(folder / REPORT)
    except (OSError, EvaluationError, RecursionError) as error:
        logger.warning("%s is left alone, and the card says nothing of it: %s", folder / REPORT, error)
        return None
    told = (record.get("recipe"), record.get("calibration")) if isinstance(record, dict) else None
    return shapes.fitted(report.to_dict(), shapes.REPORT) if (report.config, report.calibration) == told else None


def read_evaluation(folder: Path) -> dict[str, Any]:
    """What was measured, of whatever weights; empty where nothing was, or where the file is none of ours."""
    try:
        check_evaluation(folder)
    except OutputError as error:
        logger.warning("%s The card says nothing of it.", error)
        return {}
    if not (folder / EVALUATION).is_file():
        return {}
    found = shapes.fitted(json.loads((folder / EVALUATION).read_text(encoding="utf-8")), shapes.EVALUATION)
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
    """Refuses a file `evaluation.json` that another program wrote, or that is cut off.

    Raises:
        OutputError: with what to do.
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
        raise OutputError(f"{path} is no evaluation of ours, or cut off, and is left alone; move it away.")


def weights_digest(folder: Path) -> str | None:
    """sha256 over names, types, shapes and values of the tensors in safetensors files; None where there are none.

    It does not depend on how the tensors are spread over files.
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
    """Numbers in the weight files; None without such files, and where they are packed."""
    if getattr(config, "quantization_config", None) or not weight_files(folder):
        return None
    tensors = read_headers(Source(str(folder))).values()
    return sum(tensor.size for tensor in tensors if tensor.dtype.startswith(("F", "BF")))
