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
from optimum_modegpt.cli.commands import common
from optimum_modegpt.cli.tables import scores_table, tasks_table, worst_lines
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import InvalidConfig
from optimum_modegpt.evaluation.fidelity import fidelity
from optimum_modegpt.evaluation.harness import Tasks, TaskScores, harness, load_tasks
from optimum_modegpt.evaluation.perplexity import context_of, perplexity
from optimum_modegpt.hub.card import CARD, add_evaluation, may_be_replaced
from optimum_modegpt.hub.commands import flags
from optimum_modegpt.hub.result import EVALUATION, check_evaluation
from optimum_modegpt.layouts.records import is_result
from optimum_modegpt.loading.calibration import check_vocabulary
from optimum_modegpt.loading.models import load_config, pick_device
from optimum_modegpt.loading.source import DEMO, Source
from optimum_modegpt.mixture import without_folders
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
    common.check_file(options.json)
    check_flags(options)
    source, reference = common.source_of(options), common.reference_of(options)
    device, model_config = pick_device(options.device), load_config(source)
    if reference is not None:
        load_config(reference)  # refuses an invalid name before the text is read
    if options.update_card:
        check_card(options, model_config)
    tokenizer = common.shared_tokenizer(
        options.tokenizer, source, reference, allow_foreign=options.allow_foreign_tokenizer
    )
    check_vocabulary(tokenizer, model_config.get_text_config().vocab_size)
    tasks = None
    if options.tasks:
        tasks = load_tasks(options.tasks, include_path=options.include_path, progress=common.shows_progress())
    result: dict[str, Any] = {"model": options.model, "settings": settings(options, reference)}
    if tasks is None or options.dataset is not None:
        result |= text_scores(options, source, reference, model_config, tokenizer, device)
    if tasks is not None:
        found, dense = task_scores(options, source, tasks, tokenizer, device), None
        result["tasks"] = as_dicts(found)
        if reference is not None:
            dense = task_scores(options, reference, tasks, tokenizer, device)
            result["reference_tasks"] = as_dicts(dense)
        print(tasks_table(found, dense))
    common.write_json(options.json, result)
    if options.update_card:
        update_card(Path(options.model), result)


def check_flags(options: Namespace) -> None:
    """Raise an error for a flag that has no effect, because it requires another one, or applies to one text only."""
    idle, needed = (TASK_FLAGS, "tasks") if options.tasks is None else (TEXT_FLAGS, "dataset")
    for name in idle:
        if getattr(options, name) is not None and getattr(options, needed) is None:
            raise InvalidConfig(f"--{name.replace('_', '-')} requires --{needed}.")
    for name in ("dataset_split", "text_column"):
        if getattr(options, name) is not None and len(options.dataset or []) > 1:
            raise InvalidConfig(
                f"--{name.replace('_', '-')} applies to a single text, found {len(options.dataset)} with --dataset. "
                "Evaluate on the text that needs it in a run of its own."
            )


def check_card(options: Namespace, model_config: Any) -> None:
    if not Path(options.model).is_dir() or not is_result(model_config):
        raise InvalidConfig(f"--update-card requires the folder of a compressed model, found {options.model!r}.")
    check_evaluation(Path(options.model))
    if options.limit is not None:
        raise InvalidConfig("--limit is for trials, and a card shows whole tasks. Omit --limit or --update-card.")


def update_card(folder: Path, result: dict[str, Any]) -> None:
    add_evaluation(folder, result)
    if may_be_replaced(folder / CARD):
        print(f"card updated: {folder / CARD}")
    else:
        print(f"{folder / CARD} is not a generated card and was not changed; the result is in {EVALUATION}.")


def settings(options: Namespace, reference: Source | None) -> dict[str, Any]:
    """Return the reference and the flags of the measurement, for the card; of local paths only the last part."""
    values = {name: getattr(options, name) for name in ON_CARD}
    for name in ("tokenizer", "dataset", "include_path"):
        if values[name] is not None:
            values[name] = without_folders(values[name])
    if options.tasks is not None:
        values["tasks"] = ",".join(options.tasks)
    if options.dtype == "auto":
        del values["dtype"]
    if reference is None:
        return {"flags": flags(values)}
    return {"reference": reference.base_model, "flags": flags({"reference": reference.base_model, **values})}


def text_scores(
    options: Namespace,
    source: Source,
    reference: Source | None,
    model_config: Any,
    tokenizer: Any,
    device: torch.device | None,
) -> dict[str, Any]:
    """Measure and print the scores on every text; of several texts also the worst ones."""
    names = options.dataset or [default_text(source, model_config)]
    texts = [read_text(name, options, source, model_config, tokenizer) for name in names]
    models = common.models_on(device, options.dtype, source, reference)
    found = []
    for windows in texts:
        found.append({**scores(*models, windows, options.batch_size), "text": windows.record})
        if len(texts) > 1:
            print(f"\n{windows.record['name']}")
        print(scores_table(found[-1]))
    if len(found) == 1:
        return found[0]
    worst = worst_of(found)
    print(f"\n{worst_lines(worst)}")
    return {"texts": found, "worst": worst}


def worst_of(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the text of the highest perplexity and, with a reference, of the highest ratio to the reference's."""
    values: dict[str, list[float]] = {"perplexity": [each["perplexity"] for each in found]}
    if "reference_perplexity" in found[0]:
        values["perplexity_ratio"] = [each["perplexity"] / each["reference_perplexity"] for each in found]
    worst = {}
    for measure, numbers in values.items():
        index = max(range(len(found)), key=numbers.__getitem__)
        worst[measure] = {"text": found[index]["text"]["name"], "value": numbers[index]}
    return worst


def default_text(source: Source, model_config: Any) -> Any:
    """Return the default text; that of the embedded model, also compressed, is its own."""
    record = getattr(model_config, "modegpt", None) or {}
    is_demo = source.is_demo or record.get("base_model") == DEMO
    return demo.EVALUATION_TEXT if is_demo else ModeGPTConfig.dataset


def read_text(dataset: Any, options: Namespace, source: Source, model_config: Any, tokenizer: Any) -> TokenWindows:
    """Read the windows of a text to score."""
    return evaluation_windows(
        dataset,
        tokenizer,
        sequence_length=resolve_sequence_length(options.sequence_length, context_of(model_config)),
        max_windows=options.max_windows,
        split=options.dataset_split,
        text_column=options.text_column,
        vocab_size=model_config.get_text_config().vocab_size,
        hub=source.dataset_arguments(),
    )


def scores(
    model: PreTrainedModel, reference: PreTrainedModel | None, windows: TokenWindows, batch_size: int | None
) -> dict[str, Any]:
    """Return perplexity, positions and parameters; with a reference also its own, KL and top-1 agreement."""
    show = common.shows_progress()
    if reference is None:
        found = dataclasses.asdict(perplexity(model, windows.tokens, batch_size=batch_size, progress=show))
        return {**found, "parameters": count_parameters(model)}
    found = dataclasses.asdict(fidelity(model, reference, windows.tokens, batch_size=batch_size, progress=show))
    return {**found, "parameters": count_parameters(model), "reference_parameters": count_parameters(reference)}


def task_scores(
    options: Namespace, source: Source, tasks: Tasks, tokenizer: Any, device: torch.device | None
) -> TaskScores:
    """Return the scores of the requested names, with only this model in memory; a group may have its own score."""
    model, _ = common.models_on(device, options.dtype, source, None)
    found = harness(
        model,
        tokenizer,
        tasks,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        batch_size=options.batch_size,
        progress=common.shows_progress(),
    )
    return {name: found[name] for name in tasks.names if name in found}


def as_dicts(scores: TaskScores) -> dict[str, dict[str, Any]]:
    """Return scores by task and metric, safe for JSON."""
    found: dict[str, dict[str, Any]] = {}
    for task, metrics in scores.items():
        found[task] = {metric: dataclasses.asdict(score) for metric, score in metrics.items()}
    return found
