"""`evaluate`: measure perplexity on a text or tasks of lm-eval, and the distance from a reference model."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_modegpt import demo
from optimum_modegpt.calibration.data import TokenWindows, evaluation_windows, resolve_sequence_length
from optimum_modegpt.cli.commands.common import (
    check_file,
    models_on,
    reference_of,
    shared_tokenizer,
    shows_progress,
    source_of,
    write_json,
)
from optimum_modegpt.cli.tables import scores_table, tasks_table
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import InvalidConfig
from optimum_modegpt.evaluation.fidelity import fidelity
from optimum_modegpt.evaluation.harness import Tasks, TaskScores, harness, load_tasks
from optimum_modegpt.evaluation.perplexity import perplexity
from optimum_modegpt.hub.card import CARD, add_evaluation, may_be_replaced
from optimum_modegpt.hub.commands import flags
from optimum_modegpt.hub.result import EVALUATION, check_evaluation
from optimum_modegpt.loading.models import load_config, pick_device
from optimum_modegpt.loading.source import DEMO, Source, check_vocabulary, context_of, dataset_hub
from optimum_modegpt.modeling.modegpt_family import is_compressed
from optimum_modegpt.report import count_parameters

TEXT_FLAGS = ("dataset_split", "text_column", "sequence_length", "max_windows")
TASK_FLAGS = ("num_fewshot", "limit", "include_path")
ON_CARD = (
    *("reference_revision", "tokenizer", "allow_foreign_tokenizer", "batch_size", "dtype"),
    *("dataset", *TEXT_FLAGS, "tasks", "num_fewshot", "include_path"),
)
"""The flags that a card shows, except the name of the reference."""


def run(options: Namespace) -> None:
    """Measure perplexity on a text, scores on tasks, or both."""
    check_file(options.json)
    _check_flags(options)
    source, reference = source_of(options), reference_of(options)
    device, model_config = pick_device(options.device), load_config(source)
    if reference is not None:
        load_config(reference)  # refuses an invalid name before the text is read
    if options.update_card:
        _check_card(options, model_config)
    tokenizer = shared_tokenizer(options.tokenizer, source, reference, allow_foreign=options.allow_foreign_tokenizer)
    check_vocabulary(tokenizer, model_config.get_text_config().vocab_size)
    tasks = None
    if options.tasks is not None:
        tasks = load_tasks(options.tasks, include_path=options.include_path, progress=shows_progress())
    result: dict[str, Any] = {"model": options.model, "settings": _settings(options, reference)}
    if tasks is None or options.dataset is not None:
        windows = _windows(options, source, model_config, tokenizer)
        result |= _text_scores(options, source, reference, windows, device)
        print(scores_table(result))
    if tasks is not None:
        found = _task_scores(options, source, tasks, tokenizer, device)
        dense = None if reference is None else _task_scores(options, reference, tasks, tokenizer, device)
        result |= _records(found, dense)
        print(tasks_table(found, dense))
    write_json(options.json, result)
    if options.update_card:
        folder = Path(options.model)
        add_evaluation(folder, result)
        if may_be_replaced(folder / CARD):
            print(f"card updated: {folder / CARD}")
        else:
            print(f"{folder / CARD} is not a generated card and was not changed; the result is in {EVALUATION}.")


def _check_flags(options: Namespace) -> None:
    """Raise an error for a flag that has no effect.

    Raises:
        InvalidConfig: a flag requires another one; the message names both.
    """
    idle, needed = (TASK_FLAGS, "tasks") if options.tasks is None else (TEXT_FLAGS, "dataset")
    if getattr(options, needed) is not None:
        return
    for name in idle:
        if getattr(options, name) is not None:
            raise InvalidConfig(f"--{name.replace('_', '-')} requires --{needed}.")


def _check_card(options: Namespace, model_config: Any) -> None:
    if not Path(options.model).is_dir() or not is_compressed(model_config.model_type):
        raise InvalidConfig(f"--update-card requires the folder of a compressed model, found {options.model!r}.")
    check_evaluation(Path(options.model))
    if options.limit is not None:
        raise InvalidConfig("--limit is for trials, and a card shows whole tasks. Omit --limit or --update-card.")


def _settings(options: Namespace, reference: Source | None) -> dict[str, Any]:
    """Return the reference and the flags of the measurement, for the card; of local paths only the last part."""
    values = {name: getattr(options, name) for name in ON_CARD}
    for name in ("tokenizer", "dataset", "include_path"):
        if values[name] is not None and Path(values[name]).exists():
            values[name] = Path(values[name]).resolve().name
    if options.tasks is not None:
        values["tasks"] = ",".join(options.tasks)
    if options.dtype == "auto":
        del values["dtype"]
    if reference is None:
        return {"flags": flags(values)}
    return {"reference": reference.base_model, "flags": flags({"reference": reference.base_model, **values})}


def _windows(options: Namespace, source: Source, model_config: Any, tokenizer: Any) -> TokenWindows:
    return evaluation_windows(
        options.dataset or _evaluation_text(source, model_config),
        tokenizer,
        sequence_length=resolve_sequence_length(options.sequence_length, context_of(model_config)),
        max_windows=options.max_windows,
        split=options.dataset_split,
        text_column=options.text_column,
        vocab_size=model_config.get_text_config().vocab_size,
        hub=dataset_hub(source),
    )


def _text_scores(
    options: Namespace, source: Source, reference: Source | None, windows: TokenWindows, device: torch.device | None
) -> dict[str, Any]:
    model, dense = models_on(device, options.dtype, source, reference)
    return {**scores(model, dense, windows, options.batch_size), "text": windows.record}


def _task_scores(
    options: Namespace, source: Source, tasks: Tasks, tokenizer: Any, device: torch.device | None
) -> TaskScores:
    """Return the scores of the requested names, with only this model in memory; a group may have its own score."""
    model, _ = models_on(device, options.dtype, source, None)
    found = harness(
        model,
        tokenizer,
        tasks,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        batch_size=options.batch_size,
        progress=shows_progress(),
    )
    return {name: found[name] for name in tasks.names if name in found}


def _records(found: TaskScores, reference: TaskScores | None) -> dict[str, Any]:
    named = {"tasks": found} if reference is None else {"tasks": found, "reference_tasks": reference}
    return {
        key: {
            task: {metric: dataclasses.asdict(score) for metric, score in metrics.items()}
            for task, metrics in scores.items()
        }
        for key, scores in named.items()
    }


def scores(
    model: PreTrainedModel, reference: PreTrainedModel | None, windows: TokenWindows, batch_size: int | None
) -> dict[str, Any]:
    """Return perplexity, positions and parameters; with a reference also its own, KL and top-1 agreement."""
    if reference is None:
        found = dataclasses.asdict(perplexity(model, windows.tokens, batch_size=batch_size, progress=shows_progress()))
        return {**found, "parameters": count_parameters(model)}
    found = dataclasses.asdict(
        fidelity(model, reference, windows.tokens, batch_size=batch_size, progress=shows_progress())
    )
    return {**found, "parameters": count_parameters(model), "reference_parameters": count_parameters(reference)}


def _evaluation_text(source: Source, model_config: Any) -> Any:
    record = getattr(model_config, "modegpt", None) or {}
    is_demo = source.is_demo or record.get("base_model") == DEMO
    return demo.EVALUATION_TEXT if is_demo else ModeGPTConfig.dataset
