"""The model card: README.md of a result folder, written from what lies there and from nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils.sha import sha_fileobj

from optimum_modegpt import demo
from optimum_modegpt.calibration.data import HUB_DATASETS
from optimum_modegpt.config import IN_MEMORY, ModeGPTConfig
from optimum_modegpt.errors import UnsupportedModel
from optimum_modegpt.evaluation.inspection import BlockRanks, block_ranks
from optimum_modegpt.integration.headers import weight_bytes
from optimum_modegpt.integration.reading import load_config
from optimum_modegpt.integration.source import DEMO, Source
from optimum_modegpt.modeling.modegpt_common import weight_files
from optimum_modegpt.plot import plot_kept
from optimum_modegpt.report import PARTS, Report

CARD, REPORT, EVALUATION, PICTURE = "README.md", "report.json", "evaluation.json", "ranks.png"
TEMPLATE = Path(__file__).with_suffix(".md.jinja")
MARK = (
    "<!-- Written by optimum_modegpt, and written again when there is news; to keep words of your own, delete this. -->"
)
TAGS = ["modegpt", "compressed", "structured-pruning", "low-rank"]
TEXT_IDENTITY = ("name", "split", "text_column", "file_sha256")
"""What makes two records of a text the same text; a newer measurement replaces an older one on it."""
COLUMNS = 88
"""Of a command on the page."""
TASK_SETTINGS = ("stderr", "num_fewshot", "samples", "version", "lm_eval")
"""What belongs to the score of a task, as far as it is known."""
PIPELINES = {"ForCausalLM": "text-generation", "ForSequenceClassification": "text-classification"}


@dataclass(frozen=True)
class Contents:
    """What lies in a result folder."""

    config: Any
    report: Report | None
    evaluation: dict[str, Any]
    weight_bytes: int | None
    has_tokenizer: bool
    repo_id: str | None = None

    @property
    def record(self) -> dict[str, Any]:
        """What config.json says of the compression; of older ones, and of hand-made ones, keys may be missing."""
        return self.config.modegpt

    @property
    def base(self) -> str | None:
        """The dense model: a name of the Hub, "demo", or the last part of a folder's path."""
        return self.record.get("base_model")

    @property
    def base_is_on_hub(self) -> bool:
        """Whether `base` is a name of the Hub: of folders only the last part is kept."""
        return self.base is not None and "/" in self.base and not self.base.startswith("./")

    @property
    def sparsity(self) -> float | None:
        """The achieved sparsity."""
        return self.record.get("achieved", {}).get("sparsity")

    @property
    def name(self) -> str:
        """What the card calls the model: that of the folder may be a temporary one."""
        base = (self.base or "model").rpartition("/")[2]
        return f"{base}-modegpt" + ("" if self.sparsity is None else f"-{self.sparsity:.0%}".rstrip("%"))


def write_card(folder: Path, repo_id: str | None = None) -> Path:
    """Writes README.md into the folder of a compressed model, and `ranks.png` where matplotlib is installed.

    The card says what config.json, report.json, evaluation.json and the weight files say. A README.md that is not
    ours is left alone. Where `repo_id` is known, its code names it. Returns the path of README.md.

    Raises:
        UnsupportedModel: the folder holds no compressed model.
        EvaluationError: its configuration was edited and cannot be read.
    """
    path = folder / CARD
    if path.is_file() and not is_ours(path.read_text(encoding="utf-8")):
        return path
    found = dataclasses.replace(read(folder), repo_id=repo_id)
    blocks = block_ranks(found.config)
    if importlib.util.find_spec("matplotlib") is not None:
        draw(found, blocks, folder / PICTURE)
    card = ModelCard.from_template(
        metadata(found), template_path=str(TEMPLATE), **page(found, blocks), has_picture=(folder / PICTURE).is_file()
    )
    path.write_text(f"{card}\n", encoding="utf-8", newline="\n")
    return path


def is_ours(text: str) -> bool:
    """Whether a card was written by `write_card` and not taken over by a person since."""
    return MARK in text


def add_evaluation(folder: Path, result: dict[str, Any]) -> None:
    """Puts a result of the command `evaluate` into `evaluation.json` of a folder, and renews the card.

    One entry a text and one a task: a newer one replaces an older one, and what was measured of other weights goes.

    Raises:
        UnsupportedModel: the folder holds no compressed model.
    """
    evaluation = {"weights_sha256": weights_digest(folder), **read(folder).evaluation}
    if "perplexity" in result:
        entry = {key: value for key, value in result.items() if key not in ("model", "tasks", "reference_tasks")}
        others = [each for each in evaluation.get("texts", []) if identity(each) != identity(entry)]
        evaluation["texts"] = [*others, entry]
    for key in ("tasks", "reference_tasks"):
        if key in result:
            evaluation[key] = {**evaluation.get(key, {}), **result[key]}
    (folder / EVALUATION).write_text(json.dumps(evaluation, indent=2) + "\n", encoding="utf-8")
    write_card(folder)


def identity(entry: dict[str, Any]) -> tuple[Any, ...]:
    """Which text a measured perplexity belongs to."""
    return tuple(entry["text"].get(key) for key in TEXT_IDENTITY)


# ---------------------------------------------------------------------------------------------------------- reading


def read(folder: Path) -> Contents:
    """What lies in the folder of a compressed model.

    Raises:
        UnsupportedModel: there is none.
    """
    config = load_config(Source(str(folder)))
    if not config.model_type.startswith("modegpt_"):
        raise UnsupportedModel(f"{folder} holds a dense model ({config.model_type}); a card is for compressed ones.")
    report = read_report(folder / REPORT, config.modegpt)
    return Contents(
        config=config,
        report=report,
        evaluation=read_evaluation(folder),
        weight_bytes=weight_bytes(folder) or (report and report.weight_bytes),
        has_tokenizer=(folder / "tokenizer_config.json").is_file(),
    )


def read_report(path: Path, record: dict[str, Any]) -> Report | None:
    """The report of the compression that `record` tells of; None where there is none, or that of another model."""
    if not path.is_file():
        return None
    report = Report.load(path)
    same = (report.config, report.calibration) == (record.get("recipe"), record.get("calibration"))
    return report if same else None


def read_evaluation(folder: Path) -> dict[str, Any]:
    """What was measured of the weights in the folder; of others, from before a fine-tuning for one, it says nothing.

    Where the weights are not there, it is taken at its word.
    """
    if not (folder / EVALUATION).is_file():
        return {}
    found = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
    return found if found.get("weights_sha256") == weights_digest(folder) or not weight_files(folder) else {}


def weights_digest(folder: Path) -> str | None:
    """sha256 over the safetensors files of a folder; None where there are none."""
    digest = hashlib.sha256()
    for path in (files := weight_files(folder)):
        with path.open("rb") as file:
            digest.update(sha_fileobj(file))
    return digest.hexdigest() if files else None


def draw(found: Contents, blocks: tuple[BlockRanks, ...], path: Path) -> None:
    """The picture of the kept widths."""
    kept = {part: [block.ranks[part] / block.dense_ranks[part] for block in blocks] for part in PARTS}
    plot_kept(kept, found.name, path)


# ---------------------------------------------------------------------------------------------------------- metadata


def metadata(found: Contents) -> ModelCardData:
    """The header of the card."""
    card = found.record.get("base_card", {})
    return ModelCardData(
        base_model=found.base if found.base_is_on_hub else None,
        # Of the Hub's relations (adapter, merge, quantized, finetune): the same model in fewer bytes, nothing trained.
        # Only a recovery is training.
        base_model_relation=("finetune" if "recovered" in found.record else "quantized")
        if found.base_is_on_hub
        else None,
        license=card.get("license", "unknown"),
        license_name=card.get("license_name"),
        license_link=card.get("license_link"),
        language=card.get("language"),
        library_name="transformers",
        pipeline_tag=pipeline_tag(found),
        tags=TAGS,
        datasets=[name] if (name := hub_dataset(found.record.get("calibration", {}))) else None,
        model_name=found.name,
        eval_results=[*perplexities(found), *task_results(found)] or None,
    )


def pipeline_tag(found: Contents) -> str | None:
    """The task of the saved class."""
    return next((tag for ending, tag in PIPELINES.items() if architecture(found).endswith(ending)), None)


def architecture(found: Contents) -> str:
    """Name of the saved class."""
    return (found.config.architectures or [""])[0]


def hub_dataset(text: dict[str, Any]) -> str | None:
    """The id on the Hub of the dataset that a record of token windows names; None where it is none."""
    name = text.get("name")
    if text.get("revision") is None or name is None:  # only datasets of the Hub have one
        return None
    return HUB_DATASETS[name].path if name in HUB_DATASETS else name


def perplexities(found: Contents) -> list[EvalResult]:
    """The measured perplexities, as the Hub reads them."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=hub_dataset(text) or text["name"],  # results of one type would be merged
            dataset_name=text["name"],
            dataset_split=text.get("split"),
            dataset_revision=text.get("revision"),
            dataset_args={key: text[key] for key in ("windows", "sequence_length", "sha256")},
            metric_type="perplexity",
            metric_value=entry["perplexity"],
        )
        for entry in found.evaluation.get("texts", [])
        for text in [entry["text"]]
    ]


def task_results(found: Contents) -> list[EvalResult]:
    """The measured tasks, as the Hub reads them."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=metric,
            metric_value=score["value"],
            metric_args={key: score[key] for key in TASK_SETTINGS if score.get(key) is not None} or None,
        )
        for task, metrics in found.evaluation.get("tasks", {}).items()
        for metric, score in metrics.items()
    ]


# -------------------------------------------------------------------------------------------------------------- page


def page(found: Contents, blocks: tuple[BlockRanks, ...]) -> dict[str, Any]:
    """What the template shows."""
    recipe = found.record.get("recipe", {})
    parameters = found.record.get("achieved", {}).get("parameters")
    dtype = found.config.dtype or torch.float32
    return {
        "mark": MARK,
        "found": found,
        "record": found.record,
        "recipe": recipe,
        "parameters": parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes_before": parameters and parameters["total_before"] * dtype.itemsize,
        "embedded": found.base == DEMO,
        "pipeline": pipeline_tag(found),
        "quantization": (getattr(found.config, "quantization_config", None) or {}).get("quant_method"),
        "auto_class": auto_class(found),
        "blocks": blocks,
        "errors": relative_errors(found),
        "seconds": found.report and sum(stage.seconds for stage in found.report.stages),
        "command": compress_command(found),
        "call": compress_call(found),
        "notes": notes(found),
        "evaluate_commands": evaluate_commands(found),
        "texts": found.evaluation.get("texts", []),
        "tasks": found.evaluation.get("tasks", {}),
        "reference_tasks": found.evaluation.get("reference_tasks", {}),
    }


def auto_class(found: Contents) -> str:
    """The Auto class that loads the saved class."""
    classes = getattr(found.config, "auto_map", None) or {}
    return next((auto for auto, name in classes.items() if name.endswith(f".{architecture(found)}")), "AutoModel")


def relative_errors(found: Contents) -> dict[int, dict[str, float]]:
    """Relative errors by block and part, where a report has them."""
    blocks = found.report.blocks if found.report else ()
    return {
        block.index: {
            name: part.relative_error for name, part in block.parts.items() if part.relative_error is not None
        }
        for block in blocks
    }


# ---------------------------------------------------------------------------------------------------------- commands


def choices(found: Contents) -> dict[str, Any]:
    """The fields that make it again: sparsity and text, and whatever differs from the defaults."""
    recipe = found.record.get("recipe", {})
    return {
        field.name: recipe[field.name]
        for field in dataclasses.fields(ModeGPTConfig)
        if field.name in recipe and (field.name in ("sparsity", "dataset") or recipe[field.name] != field.default)
    }


def compress_command(found: Contents) -> str | None:
    """The command that makes it again; None where a command line cannot name what was given."""
    fields = choices(found)
    if not fields or found.base is None or any(str(value).startswith(IN_MEMORY) for value in fields.values()):
        return None
    words = ["optimum-cli", "modegpt", "compress", found.base]
    for name, value in (dense_choices(found) | fields).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return shell([*words, "--output", found.name])


def compress_call(found: Contents) -> str | None:
    """The same in Python; a dataset or tokenizer that was in memory stands there as a name."""
    fields = choices(found)
    if not fields or found.base is None:
        return None
    shown = [f"{name}={name if str(value).startswith(IN_MEMORY) else literal(value)}" for name, value in fields.items()]
    loading = [f", {name}={literal(value)}" for name, value in dense_choices(found).items()]
    return (
        "from optimum_modegpt import ModeGPTConfig, ModeGPTModelForCausalLM\n\n"
        f"config = ModeGPTConfig({', '.join(shown)})\n"
        "model = ModeGPTModelForCausalLM.from_pretrained(\n"
        f"    {literal(found.base)}{''.join(loading)}, compression_config=config\n)\n"
        f"model.save_pretrained({literal(found.name)})"
    )


def dense_choices(found: Contents) -> dict[str, Any]:
    """How the dense model was loaded, as far as it is known."""
    loading = {"revision": found.record.get("base_revision"), "dtype": found.record.get("dtype")}
    return {name: value for name, value in loading.items() if value is not None}


def shell(words: list[str]) -> str:
    """A command for a shell, in lines that a page shows whole; a flag stays with its value."""
    lines = [""]
    for argument in re.split(r" (?=--)", shlex.join(words)):
        if len(lines[-1]) + len(argument) > COLUMNS:
            lines.append("   ")
        lines[-1] += f" {argument}"
    return " \\\n".join(lines).strip()


def literal(value: Any) -> str:
    """A value as Python source."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def notes(found: Contents) -> list[str]:
    """What has to be put in place of what the record can only describe."""
    fields, lines = choices(found), []
    if found.base != DEMO and not found.base_is_on_hub:
        lines.append(f"`{found.base}` was a folder: give its path.")
    if found.record.get("calibration", {}).get("file_sha256") and fields.get("dataset") != DEMO:
        lines.append(f"`{fields['dataset']}` was a file: give its path.")
    in_memory = [(name, value) for name, value in fields.items() if str(value).startswith(IN_MEMORY)]
    lines += [f"`{name}` was an object: {value.removeprefix(IN_MEMORY)}." for name, value in in_memory]
    return lines


def evaluate_commands(found: Contents) -> list[str]:
    """The commands that measured what the card shows."""
    start = ["optimum-cli", "modegpt", "evaluate", found.name]
    start += ["--reference", found.base] if found.base else []
    commands = []
    for entry in found.evaluation.get("texts", []):
        text = entry["text"]
        if text["name"].startswith(IN_MEMORY):
            continue
        embedded = found.base == DEMO and text["name"] == demo.EVALUATION_TEXT.name
        words = [] if embedded else ["--dataset", text["name"]]
        words += ["--sequence-length", str(text["sequence_length"])]
        words += ["--max-windows", str(text["windows"])] if text["windows"] < text["available_windows"] else []
        commands.append(shell([*start, *words]))
    by_examples: dict[Any, list[str]] = {}
    for task, metrics in found.evaluation.get("tasks", {}).items():
        examples = next((score.get("num_fewshot") for score in metrics.values()), None)
        by_examples.setdefault(examples, []).append(task)
    for examples, tasks in by_examples.items():
        words = [] if examples is None else ["--num-fewshot", str(examples)]
        commands.append(shell([*start, "--tasks", ",".join(tasks), *words]))
    return commands
