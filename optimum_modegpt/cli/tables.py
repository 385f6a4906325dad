"""Format results as the text that the commands print."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from optimum_modegpt.cli.terminal import one_line
from optimum_modegpt.evaluation.harness import MAIN_METRICS, Score, TaskScores, main_scores, mean_score
from optimum_modegpt.evaluation.inspection import Inspection
from optimum_modegpt.hub.result import plain
from optimum_modegpt.report import PARTS

if TYPE_CHECKING:
    from optimum_modegpt.budget.estimate import Estimate
    from optimum_modegpt.evaluation.speed import Benchmark, Row, Size, Speed, Spread

TORCH_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Names of data types in torch, by their names in safetensors."""

STREAMS = {"device": "the accelerator's memory", "host": "host memory", "files": "files"}


def scores_table(result: dict[str, Any]) -> str:
    """Return perplexity and parameters as text; with a reference, also those of the reference and the distance."""
    rows = [f"{'perplexity':<16}{result['perplexity']:>14.4f}", f"{'parameters':<16}{result['parameters']:>14,}"]
    if "kl" in result:
        rows = [
            f"{'':<16}{'model':>14}{'reference':>14}",
            f"{rows[0]}{result['reference_perplexity']:>14.4f}",
            f"{rows[1]}{result['reference_parameters']:>14,}",
            f"{'KL divergence':<16}{result['kl']:>14.4f}  nats per position",
            f"{'top-1 agreement':<16}{result['top1_agreement']:>14.2%}",
        ]
    return "\n".join([*rows, f"{'scored positions':<16}{result['tokens']:>14,}"])


def tasks_table(scores: TaskScores, reference: TaskScores | None) -> str:
    """Return every metric of every task with its standard error, and the mean over tasks, as text.

    With a reference, the table also shows differences and the kept fraction. The error of a difference assumes two
    independent runs, so it is an upper estimate: both models answer the same questions. The kept fraction is the
    model's score divided by the reference's, for metrics of which higher is better; chance level is not subtracted.
    """
    rows = [
        _task_row((task, metric), score, None if reference is None else reference[task][metric])
        for task, metrics in scores.items()
        for metric, score in metrics.items()
    ]
    main = main_scores(scores)
    if len(main) > 1:
        before = None if reference is None else mean_score(main_scores(reference))
        rows.append(_task_row((f"mean of {len(main)}", "*"), mean_score(main), before))
    columns = ("score",) if reference is None else ("reference", "model", "difference", "kept")
    lines = _aligned([("task", "metric", "n-shot", "samples", *columns), *rows], left=2)
    versions = {score.lm_eval for metrics in scores.values() for score in metrics.values()}
    legend = f"\n* of each task {', else '.join(MAIN_METRICS)}" if len(main) > 1 else ""
    return f"{lines}\n± is one standard error; lm-eval {', '.join(versions)}{legend}"


def _task_row(names: tuple[str, str], score: Score, before: Score | None) -> tuple[str, ...]:
    shots = "" if score.num_fewshot is None else str(score.num_fewshot)
    shown = (*names, shots, f"{score.samples:,}")
    if before is None:
        return (*shown, _with_error(score.value, score.stderr))
    errors = [each.stderr for each in (score, before) if each.stderr is not None]
    difference = _with_error(score.value - before.value, math.hypot(*errors) if len(errors) == 2 else None, sign="+")
    kept = f"{score.value / before.value:.1%}" if score.higher_is_better and before.value > 0 else ""
    return (*shown, _with_error(before.value, before.stderr), _with_error(score.value, score.stderr), difference, kept)


def _with_error(value: float, stderr: float | None, sign: str = "") -> str:
    digits = ".4f" if abs(value) < 1e6 else ".4e"
    return f"{value:{sign}{digits}}" + ("" if stderr is None else f" ± {stderr:{digits}}")


def _aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Return rows as lines, with the first `left` columns aligned to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def inspection_table(found: Inspection, evaluation: dict[str, Any]) -> str:
    """Return ranks by block and part, sparsity and compression record as text, then any recovery and measurements."""
    dtype = "" if found.dtype is None else f", {TORCH_NAMES.get(found.dtype, found.dtype)}"
    rows = [f"{found.model_type}, {found.parameters:,} parameters{dtype}"]
    if not found.blocks:
        return rows[0]
    rows.append(f"{'block':>5}" + "".join(f"{part:>14}" for part in PARTS))
    for block in found.blocks:
        cells = (f"{block.ranks[part]}/{block.dense_ranks[part]}" for part in PARTS)
        rows.append(f"{block.index:>5}" + "".join(f"{cell:>14}" for cell in cells))
    record = found.record or {}
    recipe = record["recipe"] if isinstance(record.get("recipe"), dict) else {}
    asked = f" (requested {recipe['sparsity']:.2%})" if isinstance(recipe.get("sparsity"), float) else ""
    rows.append(f"removed {found.sparsity:.2%} of the block projections{asked}")
    revision = record.get("base_revision")
    at = "" if revision is None else f" (revision {one_line(revision)})"
    rows.append(f"compressed from {one_line(record.get('base_model'))}{at} with")
    rows += [
        f"  {one_line(key)} = {one_line(value)}"
        for key, value in recipe.items()
        if value is not None and key != "quant_method"
    ]
    known = plain(record)
    known = {key: value for key, value in known.items() if isinstance(value, dict)}
    if opened := _opened(known.get("calibration", {})):
        rows.append(f"calibrated with {opened}")
    rows += _tokenizer_rows(known.get("calibration", {}))
    return "\n".join([*rows, *_recovery_rows(known), *_evaluation_rows(evaluation)])


def _tokenizer_rows(calibration: dict[str, Any]) -> list[str]:
    """Return lines on the calibration's tokenizer, with the digests of its vocabulary and chat template."""
    digests = {"vocabulary": "vocabulary_sha256", "chat template": "chat_template_sha256"}
    found = [f"{name} {calibration[key]}" for name, key in digests.items() if key in calibration]
    if not found:
        return []
    rows = [f"tokenizer {calibration.get('tokenizer', 'in memory')}, sha256 of its {', of its '.join(found)}"]
    if "foreign_tokenizer" in calibration:
        rows.append(f"  not the dense model's own: it differs in {calibration['foreign_tokenizer']}")
    return rows


def _opened(text: dict[str, Any]) -> str:
    """Return how the token windows of a record begin; "" if no token was put first."""
    return "each window starting with BOS" if text.get("first_token") else ""


def _recovery_rows(record: dict[str, Any]) -> list[str]:
    """Return one line on the fine-tuning; no line if the model was not fine-tuned."""
    recovered = record.get("recovered")
    if recovered is None:
        return []
    shown = {"on": recovered.get("dataset"), "steps": recovered.get("steps"), "teacher": recovered.get("teacher")}
    details = [f"{key} {value}" for key, value in shown.items() if value is not None]
    return [f"fine-tuned afterwards: {', '.join(details)}".rstrip(": ")]


def _evaluation_rows(evaluation: dict[str, Any]) -> list[str]:
    """Return lines on the measurements of `evaluate --update-card` for these weights."""
    rows = [_text_row(entry) for entry in evaluation.get("texts", [])]
    for task, metrics in evaluation.get("tasks", {}).items():
        before = evaluation.get("reference_tasks", {}).get(task, {})
        for metric, score in metrics.items():
            beside = f" (reference {before[metric]['value']:.4f})" if metric in before else ""
            rows.append(f"  {task}, {metric}: {score['value']:.4f}{beside}")
    return ["measured", *rows] if rows else []


def _text_row(entry: dict[str, Any]) -> str:
    text = entry["text"]
    row = f"  {text['name']}, {text['windows']:,} × {text['sequence_length']:,} tokens"
    row += f", {opened}: " if (opened := _opened(text)) else ": "
    row += f"perplexity {entry['perplexity']:.4f}"
    if {"kl", "reference_perplexity"} <= entry.keys():
        row += f" (reference {entry['reference_perplexity']:.4f}, KL divergence {entry['kl']:.4f})"
    return row


def estimate_table(found: Estimate) -> str:
    """Return the estimate of memory, disk and work as text, in sums and parts."""
    rows = [
        "ESTIMATE from shapes alone; the report of a compression has the measured values.",
        f"{found.parameters:,} parameters, {found.block_parameters:,} of them in the blocks' projections",
        f"{found.calibration_tokens:,} calibration tokens",
    ]
    if found.processes > 1:
        rows.append(f"{found.processes} processes: host memory and files are totals, device memory is per process")
    for title, arrangement in (("with an accelerator", found.with_accelerator), ("without one", found.without)):
        needs, place = arrangement.needs, STREAMS[arrangement.streams]
        rows.append(f"{title}: streams in {place}, {arrangement.batch_size} windows at a time")
        rows += _parts("device memory", needs.device)
        rows += _parts("host memory", needs.host)
        rows += _parts("files of streams", needs.files)
    rows += _parts("disk, while it runs", found.disk)
    if found.mapped_weights:
        rows.append(
            f"weights stay in their files: {_bytes(found.mapped_weights)}, counted as resident memory while in use"
        )
    passes = found.forward_passes
    rows.append(
        f"work: {sum(passes.values()):.1f} forward passes over the calibration tokens "
        f"({found.forward_multiply_adds:.2e} multiply-adds each)"
    )
    rows += [f"  {count:>12.2f}  {name}" for name, count in passes.items()]
    return "\n".join(rows)


def _parts(title: str, needs: dict[str, int]) -> list[str]:
    if not needs:
        return []
    return [
        f"{title}: {_bytes(sum(needs.values()))}",
        *(f"  {_bytes(size):>12}  {name}" for name, size in needs.items()),
    ]


def _bytes(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def benchmark_table(found: Benchmark) -> str:
    """Return the measurements of every setting as text; with a reference, also the speed relative to it."""
    machine = found.machine
    paired = found.reference is not None
    columns = ("model", "reference", "times as fast") if paired else ("model",)
    rows = [line for row in found.rows for line in _benchmark_rows(row, paired)]
    lines = [
        f"{machine['device_name']} ({machine['device']}), {machine['dtype']}, {machine['attention']} attention, "
        f"torch {machine['torch']}, transformers {machine['transformers']}",
        *(f"{name}: {_size(size)}" for name, size in (("model", found.model), ("reference", found.reference)) if size),
        _aligned([("batch × prompt", "run", "measure", *columns), *rows], left=3),
        f"medians of {found.repeats} runs with {found.new_tokens} new tokens; minimum and maximum in brackets",
        f"peak memory: the weights, plus the increase of the {found.memory_kind} during a run over its level before",
    ]
    failures = [f"{_setting(row)} {failure}" for row in found.rows for failure in row.failures]
    return "\n".join([*lines, *failures, *found.notes])


def _benchmark_rows(row: Row, paired: bool) -> list[tuple[str, ...]]:
    """Return one line per measure; the first also names the setting."""
    speeds = (row.model, row.reference) if paired else (row.model,)
    measures = [
        ("prefill tokens/s", row.prefill_ratio, lambda one: f"{one.prefill_tokens_per_second.median:,.1f}"),
        ("decode tokens/s", row.decode_ratio, lambda one: f"{one.decode_tokens_per_second.median:,.1f}"),
        ("time to first token, ms", None, lambda one: f"{1e3 * one.first_token_seconds.median:,.2f}"),
        ("cache bytes per token", None, lambda one: _number(one.cache_bytes_per_token)),
        ("peak memory", None, lambda one: _bytes(one.peak_memory)),
    ]
    lines = [
        (name, *(_cell(one, show) for one in speeds), *((_ratio(ratio),) if paired else ()))
        for name, ratio, show in measures
    ]
    places = [(_setting(row), "compiled" if row.setting.compiled else "plain"), *[("", "")] * (len(lines) - 1)]
    return [(*place, *line) for place, line in zip(places, lines, strict=True)]


def _cell(speed: Speed | None, show: Callable[[Speed], str]) -> str:
    return "out of memory" if speed is None else show(speed)


def _ratio(ratio: Spread | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _setting(row: Row) -> str:
    return f"{row.setting.batch_size} × {row.setting.prompt_length}"


def _size(size: Size) -> str:
    on_disk = "" if size.disk_bytes is None else f", {_bytes(size.disk_bytes)} on disk"
    return f"{size.parameters:,} parameters, {_bytes(size.weight_bytes)} of weights{on_disk}"
