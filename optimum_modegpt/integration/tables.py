"""What the commands print: results as text for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from optimum_modegpt.evaluation.estimate import Estimate
from optimum_modegpt.evaluation.harness import MAIN_METRICS, Score, TaskScores, main_scores, mean_score
from optimum_modegpt.evaluation.inspection import Inspection
from optimum_modegpt.integration.plain import one_line
from optimum_modegpt.report import PARTS


def scores_table(result: dict[str, Any]) -> str:
    """Perplexity and parameters; with a reference beside its own, and the distance from it."""
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
    """Every metric of every task with its standard error, and the mean over tasks; beside a reference what is kept.

    The error of a difference is that of two independent runs, so rather too large: both answer the same questions.
    Kept is the model's score over the reference's, where higher is better; what guessing would score is not taken off.
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
    """Rows as lines; the first `left` columns begin at one place, the others end there."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def inspection_table(found: Inspection) -> str:
    """Kept and dense widths by block and part, what was removed, and how."""
    rows = [f"{found.model_type}, {found.parameters:,} parameters"]
    if not found.blocks:
        return rows[0]
    rows.append(f"{'block':>5}" + "".join(f"{part:>14}" for part in PARTS))
    for block in found.blocks:
        cells = (f"{block.ranks[part]}/{block.dense_ranks[part]}" for part in PARTS)
        rows.append(f"{block.index:>5}" + "".join(f"{cell:>14}" for cell in cells))
    record = found.record or {}
    recipe = record["recipe"] if isinstance(record.get("recipe"), dict) else {}
    asked = f" (asked for {recipe['sparsity']:.2%})" if isinstance(recipe.get("sparsity"), float) else ""
    rows.append(f"removed {found.sparsity:.2%} of the block projections{asked}")
    base, revision = one_line(record.get("base_model")), one_line(record.get("base_revision"))
    rows.append(f"compressed from {base} (revision {revision}) with")
    rows += [f"  {one_line(key)} = {one_line(value)}" for key, value in recipe.items() if value is not None]
    return "\n".join(rows)


def estimate_table(found: Estimate) -> str:
    """Memory, disk and work, in sums and parts."""
    rows = [
        "ESTIMATE from shapes alone; measured figures are in the report of a compression.",
        f"{found.parameters:,} parameters, {found.block_parameters:,} of them in the blocks' projections",
        f"{found.calibration_tokens:,} calibration tokens",
    ]
    for title, needs in (("device memory", found.device_memory), ("host memory", found.cpu_memory)):
        rows.append(f"{title}: {_bytes(sum(needs.values()))}")
        rows += [f"  {_bytes(size):>12}  {name}" for name, size in needs.items()]
    rows.append(f"disk: {_bytes(found.disk)}")
    passes = found.forward_passes
    rows.append(
        f"work: {sum(passes.values()):.1f} forward passes over the calibration tokens "
        f"({found.forward_multiply_adds:.2e} multiply-adds each)"
    )
    rows += [f"  {count:>12.2f}  {name}" for name, count in passes.items()]
    return "\n".join(rows)


def _bytes(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
