"""Format results as the text that the commands print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from optimum_modegpt.cli.terminal import one_line
from optimum_modegpt.evaluation.harness import MAIN_METRICS, Score, TaskScores, main_scores, mean_score
from optimum_modegpt.evaluation.inspection import Inspection
from optimum_modegpt.hub.result import sanitized
from optimum_modegpt.modeling.modegpt_family import parts_among
from optimum_modegpt.quantities import written_bytes
from optimum_modegpt.report import target_text

if TYPE_CHECKING:
    from optimum_modegpt.budget.estimate import Estimate
    from optimum_modegpt.evaluation.speed import Benchmark, Row, Speed, Spread
    from optimum_modegpt.serving.servable import Servable
    from optimum_modegpt.serving.shape import Shape

TORCH_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Names of data types in torch, by their names in safetensors."""

STREAMS = {"device": "the accelerator's memory", "host": "host memory", "files": "files"}


def aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Return rows as lines, with the first `left` columns aligned to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        line = ""
        for column, cell in enumerate(row):
            width = widths[column]
            line += (f"{cell:<{width}}" if column < left else f"{cell:>{width}}") + "  "
        lines.append(line.rstrip())
    return "\n".join(lines)


def scores_table(result: dict[str, Any]) -> str:
    """Return perplexity and parameters as text; with a reference, also those of the reference and the distance."""
    perplexity = ["perplexity", f"{result['perplexity']:.4f}"]
    parameters = ["parameters", f"{result['parameters']:,}"]
    rows = [perplexity, parameters, ["scored positions", f"{result['tokens']:,}"]]
    if "kl" in result:
        perplexity.append(f"{result['reference_perplexity']:.4f}")
        parameters.append(f"{result['reference_parameters']:,}")
        rows.insert(0, ["", "model", "reference"])
        rows.insert(3, ["KL divergence", f"{result['kl']:.4f}", "nats per position"])
        rows.insert(4, ["top-1 agreement", f"{result['top1_agreement']:.2%}"])
        for row in rows:
            row += [""] * (3 - len(row))
    return aligned(rows, left=1)


def worst_lines(worst: dict[str, dict[str, Any]]) -> str:
    """Return the worst of several texts as text, one line per measure."""
    texts = {"perplexity": "highest perplexity", "perplexity_ratio": "highest ratio to the reference's perplexity"}
    rows = []
    for measure, found in worst.items():
        rows.append([texts[measure], f"{found['value']:.4f}", found["text"]])
    return aligned(rows, left=1)


def tasks_table(scores: TaskScores, reference: TaskScores | None) -> str:
    """Return every metric of every task with its standard error, and the mean over tasks, as text.

    With a reference, the table also shows differences and the kept fraction. The error of a difference assumes two
    independent runs, so it is an upper estimate: both models answer the same questions. The kept fraction is the
    model's score divided by the reference's, for metrics of which higher is better; chance level is not subtracted.
    """
    columns = ["score"] if reference is None else ["reference", "model", "difference", "kept"]
    rows = [["task", "metric", "n-shot", "samples", *columns]]
    versions = set()
    for task, metrics in scores.items():
        for metric, score in metrics.items():
            before = None if reference is None else reference[task][metric]
            rows.append([task, metric, *_score_cells(score, before)])
            versions.add(score.lm_eval)
    legend = f"± is one standard error; lm-eval {', '.join(versions)}"
    main = main_scores(scores)
    if len(main) > 1:
        before = None if reference is None else mean_score(main_scores(reference))
        rows.append([f"mean of {len(main)}", "*", *_score_cells(mean_score(main), before)])
        legend += f"\n* of each task {', else '.join(MAIN_METRICS)}"
    return f"{aligned(rows, left=2)}\n{legend}"


def _score_cells(score: Score, before: Score | None) -> list[str]:
    shots = "" if score.num_fewshot is None else str(score.num_fewshot)
    cells = [shots, f"{score.samples:,}"]
    if before is None:
        return [*cells, _with_error(score.value, score.stderr)]
    stderr = None
    if score.stderr is not None and before.stderr is not None:
        stderr = math.hypot(score.stderr, before.stderr)
    cells.append(_with_error(before.value, before.stderr))
    cells.append(_with_error(score.value, score.stderr))
    cells.append(_with_error(score.value - before.value, stderr, sign="+"))
    cells.append(f"{score.value / before.value:.1%}" if score.higher_is_better and before.value > 0 else "")
    return cells


def _with_error(value: float, stderr: float | None, sign: str = "") -> str:
    digits = ".4f" if abs(value) < 1e6 else ".4e"
    if stderr is None:
        return f"{value:{sign}{digits}}"
    return f"{value:{sign}{digits}} ± {stderr:{digits}}"


def inspection_table(found: Inspection, evaluation: dict[str, Any]) -> str:
    """Return ranks by block and part, sparsity and compression record as text, then any recovery and measurements."""
    lines = [f"{found.model_type}, {found.parameters:,} parameters"]
    if found.dtype is not None:
        lines[0] += f", {TORCH_NAMES.get(found.dtype, found.dtype)}"
    if not found.blocks:
        return lines[0]
    parts = parts_among(block.ranks for block in found.blocks)
    rows = [["block", *parts]]
    for block in found.blocks:
        cells = {part: f"{rank}/{block.dense_ranks[part]}" for part, rank in block.ranks.items()}
        rows.append([str(block.index), *(cells.get(part, "–") for part in parts)])
    lines.append(aligned(rows, left=0))
    lines += found.uncut
    record = found.record or {}
    known = {key: value for key, value in sanitized(record).items() if isinstance(value, dict)}
    lines += _recipe_lines(record, found.sparsity)
    lines += _calibration_lines(known.get("calibration", {}))
    if recovered := known.get("recovered"):
        shown = {"on": "dataset", "steps": "steps", "teacher": "teacher"}
        details = [f"{name} {recovered[key]}" for name, key in shown.items() if key in recovered]
        lines.append(f"fine-tuned afterwards: {', '.join(details)}")
    return "\n".join(lines + _evaluation_lines(evaluation))


def _recipe_lines(record: dict[str, Any], sparsity: float) -> list[str]:
    """Return lines on the sparsity, the base model and the settings; the record may be edited, so it is escaped."""
    recipe = record.get("recipe")
    if not isinstance(recipe, dict):
        recipe = {}
    removed, target = f"removed {sparsity:.2%} of the block projections", _target_lines(record)
    if isinstance(recipe.get("sparsity"), float):
        removed += f" ({'for the target' if target else 'requested'} {recipe['sparsity']:.2%})"
    base = f"compressed from {one_line(record.get('base_model'))}"
    if record.get("base_revision") is not None:
        base += f" (revision {one_line(record['base_revision'])})"
    lines = [removed, *target, f"{base} with"]
    for key, value in recipe.items():
        if value is not None and key != "quant_method":
            lines.append(f"  {one_line(key)} = {one_line(value)}")
    return lines


def _target_lines(record: dict[str, Any]) -> list[str]:
    """Return a line on the requested and the reached size; none if a sparsity was requested."""
    if not record.get("target"):
        return []
    try:
        return [one_line(target_text(record["target"]))]
    except (KeyError, TypeError, ValueError) as error:
        return [f"the target in the record was edited, and cannot be read: {type(error).__name__} {one_line(error)}"]


def _calibration_lines(calibration: dict[str, Any]) -> list[str]:
    lines = []
    shares = []
    for source in calibration.get("sources", ()):
        if isinstance(source, dict):
            shares.append(f"{one_line(source.get('windows'))} of {one_line(source.get('name'))}")
    if shares:
        lines.append(f"calibrated on a mixture, windows by source: {', '.join(shares)}")
    if calibration.get("first_token"):
        lines.append("calibrated with each window starting with BOS")
    if "vocabulary_sha256" in calibration:
        tokenizer = f"tokenizer {calibration.get('tokenizer', 'in memory')}"
        tokenizer += f", sha256 of its vocabulary {calibration['vocabulary_sha256']}"
        if "chat_template_sha256" in calibration:
            tokenizer += f", of its chat template {calibration['chat_template_sha256']}"
        lines.append(tokenizer)
    if "foreign_tokenizer" in calibration:
        lines.append(f"  not the dense model's own: it differs in {calibration['foreign_tokenizer']}")
    return lines


def _evaluation_lines(evaluation: dict[str, Any]) -> list[str]:
    """Return lines on the measurements of `evaluate --update-card` for these weights."""
    lines = []
    for entry in evaluation.get("texts", []):
        text = entry["text"]
        line = f"  {text['name']}, {text['windows']:,} × {text['sequence_length']:,} tokens"
        if text.get("first_token"):
            line += ", each window starting with BOS"
        line += f": perplexity {entry['perplexity']:.4f}"
        if "kl" in entry and "reference_perplexity" in entry:
            line += f" (reference {entry['reference_perplexity']:.4f}, KL divergence {entry['kl']:.4f})"
        lines.append(line)
    for task, metrics in evaluation.get("tasks", {}).items():
        before = evaluation.get("reference_tasks", {}).get(task, {})
        for metric, score in metrics.items():
            line = f"  {task}, {metric}: {score['value']:.4f}"
            if metric in before:
                line += f" (reference {before[metric]['value']:.4f})"
            lines.append(line)
    return ["measured", *lines] if lines else []


def estimate_table(found: Estimate) -> str:
    """Return the estimate of memory, disk and work as text, in sums and parts."""
    lines = [
        "ESTIMATE from shapes alone; the report of a compression has the measured values.",
        f"{found.parameters:,} parameters, {found.block_parameters:,} of them in the blocks' projections",
        _result_line(found),
        f"{found.calibration_tokens:,} calibration tokens",
        *found.uncut,
    ]
    if found.processes > 1:
        lines.append(f"{found.processes} processes: host memory and files are totals, device memory is per process")
    for title, arrangement in (("with an accelerator", found.with_accelerator), ("without one", found.without)):
        place = STREAMS[arrangement.streams]
        lines.append(f"{title}: streams in {place}, {arrangement.batch_size} windows at a time")
        lines += _byte_lines("device memory", arrangement.needs.device)
        lines += _byte_lines("host memory", arrangement.needs.host)
        lines += _byte_lines("files of streams", arrangement.needs.files)
    lines += _byte_lines("disk, while it runs", found.disk)
    if found.mapped_weights:
        size = _bytes(found.mapped_weights)
        lines.append(f"weights stay in their files: {size}, counted as resident memory while in use")
    passes, work = sum(found.forward_passes.values()), found.forward_multiply_adds
    lines.append(f"work: {passes:.1f} forward passes over the calibration tokens ({work:.2e} multiply-adds each)")
    for name, count in found.forward_passes.items():
        lines.append(f"  {count:>12.2f}  {name}")
    return "\n".join(lines)


def _result_line(found: Estimate) -> str:
    """Return the sparsity and the size of the result as text, with the target that they reach, if any."""
    result, target = found.result, found.target
    size = f"{result.parameters:,} parameters, {written_bytes(result.bytes)} of weights"
    if target is None:
        return f"result of sparsity {found.sparsity:.4g}: {size}"
    if target.quantization is not None:
        size += f", {written_bytes(result.quantized_bytes)} after quantization to {target.quantization}"
    verb = "comes nearest to" if target.is_missed(result) else "reaches"
    return f"sparsity {found.sparsity:.4g} {verb} {target.field}={target.requested}: {size}"


def _byte_lines(title: str, needs: dict[str, int]) -> list[str]:
    if not needs:
        return []
    lines = [f"{title}: {_bytes(sum(needs.values()))}"]
    for name, size in needs.items():
        lines.append(f"  {_bytes(size):>12}  {name}")
    return lines


def _bytes(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def servable_table(shape: Shape, found: Sequence[Servable]) -> str:
    """Return the shape of a model, whether each engine runs it and why, and the commands of those that do, as text."""
    rows = [["engine", "works", "known from"], *([each.engine, each.works, each.checked] for each in found)]
    reasons = [[f"  {each.engine}", each.reason] for each in found]
    commands = [[f"  {each.engine}", each.command] for each in found if each.command is not None]
    sections = [shape.to_text(), aligned(rows, left=3), "why", aligned(reasons, left=2)]
    return "\n".join([*sections, "how", aligned(commands, left=2)])


def servable_line(found: Sequence[Servable]) -> str:
    """Return in one line which engines run a model, which do not, and of which it is not known."""
    titles = {"Served by": ("yes", "with package"), "not by": ("no",), "not known": ("unknown",)}
    parts = []
    for title, values in titles.items():
        if names := [each.engine for each in found if each.works in values]:
            parts.append(f"{title}: {', '.join(names)}")
    return "; ".join(parts)


def benchmark_table(found: Benchmark) -> str:
    """Return the measurements of every setting as text; with a reference, also the speed relative to it."""
    machine = found.machine
    lines = [
        f"{machine['device_name']} ({machine['device']}), {machine['dtype']}, {machine['attention']} attention, "
        f"torch {machine['torch']}, transformers {machine['transformers']}"
    ]
    for name, size in (("model", found.model), ("reference", found.reference)):
        if size is not None:
            line = f"{name}: {size.parameters:,} parameters, {_bytes(size.weight_bytes)} of weights"
            lines.append(line if size.disk_bytes is None else f"{line}, {_bytes(size.disk_bytes)} on disk")
    rows = [["batch × prompt", "run", "measure", "model", "reference", "times as fast"]]
    for row in found.rows:
        rows += _benchmark_rows(row, found.reference is not None)
    if found.reference is None:
        rows = [row[:-2] for row in rows]
    lines += [
        aligned(rows, left=3),
        f"medians of {found.repeats} runs with {found.new_tokens} new tokens; minimum and maximum in brackets",
        f"peak memory: the weights, plus the increase of the {found.memory_kind} during a run over its level before",
    ]
    for row in found.rows:
        lines += [f"{_setting(row)} {failure}" for failure in row.failures]
    return "\n".join([*lines, *found.notes])


def _benchmark_rows(row: Row, has_reference: bool) -> list[list[str]]:
    """Return one line per measure; the first also names the setting."""
    model = _speed_cells(row.model)
    reference = _speed_cells(row.reference) if has_reference else [""] * len(model)
    ratios = [_ratio(row.prefill_ratio), _ratio(row.decode_ratio), "", "", ""]
    names = ("prefill tokens/s", "decode tokens/s", "time to first token, ms", "cache bytes per token", "peak memory")
    rows = [["", "", *cells] for cells in zip(names, model, reference, ratios, strict=True)]
    rows[0][:2] = [_setting(row), "compiled" if row.setting.compiled else "plain"]
    return rows


def _speed_cells(speed: Speed | None) -> list[str]:
    if speed is None:
        return ["out of memory"] * 5
    cache = speed.cache_bytes_per_token
    return [
        f"{speed.prefill_tokens_per_second.median:,.1f}",
        f"{speed.decode_tokens_per_second.median:,.1f}",
        f"{1e3 * speed.first_token_seconds.median:,.2f}",
        "" if cache is None else f"{cache:,.0f}",
        _bytes(speed.peak_memory),
    ]


def _ratio(ratio: Spread | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _setting(row: Row) -> str:
    return f"{row.setting.batch_size} × {row.setting.prompt_length}"
