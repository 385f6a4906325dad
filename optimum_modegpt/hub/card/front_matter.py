"""The front matter of the card, which the Hub reads."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from optimum_modegpt.hub.card.contents import Contents, is_repo_id

TAGS = ["modegpt", "compressed", "structured-pruning", "low-rank"]
TASK_SETTINGS = ("stderr", "num_fewshot", "samples", "version", "lm_eval")
"""The keys that describe the score of a task; keys may be missing."""


def metadata(found: Contents) -> ModelCardData:
    """Return the front matter of the card."""
    card, recovered = found.record.get("base_card", {}), found.record.get("recovered", {})
    recovery = {"name": recovered.get("dataset"), "revision": recovered.get("revision")}
    datasets = [hub_dataset(text) for text in (found.record.get("calibration", {}), recovery)]
    return ModelCardData(
        base_model=found.base if found.base_is_on_hub else None,
        base_model_relation=relation(found) if found.base_is_on_hub else None,
        license=card.get("license", "unknown"),
        license_name=card.get("license_name"),
        license_link=card.get("license_link"),
        language=card.get("language"),
        library_name="transformers",
        pipeline_tag=found.pipeline,
        tags=TAGS,
        datasets=list(dict.fromkeys(filter(None, datasets))) or None,
        model_name=found.name,
        eval_results=[*perplexities(found), *task_results(found)] or None,
    )


def relation(found: Contents) -> str | None:
    """Return the relation to the base model, of those that the Hub knows (adapter, merge, quantized, finetune).

    It is "quantized" for the weights of the compression, which are the same model in fewer bytes, and "finetune" for
    changed weights. It is None if that is unknown.
    """
    if found.weights_changed is None:
        return None
    return "finetune" if found.weights_changed else "quantized"


def hub_dataset(text: dict[str, Any]) -> str | None:
    """Return the Hub id of the dataset in a record of token windows; None if the dataset is not on the Hub."""
    from optimum_modegpt.calibration.sources import HUB_DATASETS  # slow, because it imports datasets

    name = text.get("name")
    if text.get("revision") is None or name is None:  # only datasets on the Hub have a revision
        return None
    name = HUB_DATASETS[name].path if name in HUB_DATASETS else name
    return name if is_repo_id(name) else None


def perplexities(found: Contents) -> list[EvalResult]:
    """Return the perplexities for the Hub: for each text only that of most tokens, since the Hub merges them."""
    by_text: dict[Any, dict[str, Any]] = {}
    for entry in sorted(found.evaluation.get("texts", []), key=lambda entry: entry["text"].get("tokens", 0)):
        by_text[hub_dataset(entry["text"]) or entry["text"]["name"], entry["text"].get("split")] = entry
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=hub_dataset(text) or text["name"],
            dataset_name=text["name"],
            dataset_split=text.get("split"),
            dataset_revision=text.get("revision"),
            dataset_args={key: text[key] for key in ("windows", "sequence_length", "sha256") if key in text},
            metric_type="perplexity",
            metric_value=entry["perplexity"],
        )
        for entry in by_text.values()
        for text in [entry["text"]]
    ]


def task_results(found: Contents) -> list[EvalResult]:
    """Return the scores on tasks for the Hub."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=metric,
            metric_value=score["value"],
            metric_args={key: score[key] for key in TASK_SETTINGS if key in score} or None,
        )
        for task, metrics in found.evaluation.get("tasks", {}).items()
        for metric, score in metrics.items()
    ]
