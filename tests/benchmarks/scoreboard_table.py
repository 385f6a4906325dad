"""Format the rows of the scoreboard as Markdown, one table per model, calibration and settings."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from quality import TEMPERATURES, share_left
from zero_shot import mean_accuracy, share_kept

DENSE = "dense"
PAPER = "paper"
TEMPERED = tuple(f"paper ε {temperature}" for temperature in TEMPERATURES)

Row = dict[str, Any]


def tables(rows: Sequence[Row]) -> list[str]:
    """Return one table for each dense row and each calibration that was measured like it."""
    found = []
    for dense in rows:
        if dense["recipe"] != DENSE:
            continue
        groups: dict[str, list[Row]] = {}
        for row in rows:
            if row is not dense and all(row[key] == dense[key] for key in ("weights", "settings")):
                groups.setdefault(json.dumps(row["calibration"]), []).append(row)
        for text, group in groups.items():
            found.append(f"{title(dense, json.loads(text))}\n\n{table(dense, group)}")
        if not groups:
            found.append(f"{dense['model']}\n\n{table(dense, [])}")
    return found


def title(dense: Row, calibration: dict[str, Any]) -> str:
    """Return the model and the calibration text."""
    size = f"{calibration['windows']} windows of {calibration['sequence_length']} tokens"
    return f"{dense['model']}, calibrated on {size} of {calibration['name']}"


def table(dense: Row, rows: Sequence[Row]) -> str:
    """Format the dense row, then by sparsity the best temperature of the paper and all other recipes."""
    texts, tasks = dense.get("texts", {}), dense.get("tasks", {})
    columns = ["removed", "recipe", *texts, *(f"left, {text}" for text in texts)]
    columns += [*tasks, *(["mean of tasks", "kept"] if tasks else [])]
    columns += ["same tokens", "top-1", "parameters", "MB", "prefill", "decode", "minutes", "floor", "code"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", line(dense, dense, [])]
    for sparsity in sorted({row["sparsity"] for row in rows}):
        group = [row for row in rows if row["sparsity"] == sparsity]
        published = [row for row in group if row["recipe"].startswith(PAPER)]
        lines += [line(row, dense, published) for row in shown(group)]
    return "\n".join(lines)


def shown(group: Sequence[Row]) -> list[Row]:
    """Return the rows of one sparsity without the temperatures of the paper that are not the best one."""
    tempered = [row for row in group if row["recipe"] in TEMPERED]
    others = [row for row in group if row["recipe"] not in TEMPERED]
    if not tempered or "texts" not in tempered[0]:
        return [*tempered, *others]
    return [min(tempered, key=mean_loss), *others]


def mean_loss(row: Row) -> float:
    """Return the mean log-perplexity over the texts."""
    return statistics.fmean(map(math.log, row["texts"].values()))


def line(row: Row, dense: Row, published: Sequence[Row]) -> str:
    """Format a row. An empty cell was not measured or does not apply."""
    texts = row.get("texts", {})
    cells = [f"{row['sparsity']:.0%}", row["recipe"]]
    cells += [f"{value:.2f}" for value in texts.values()]
    cells += [left(row, dense, published, text) for text in texts]
    if "tasks" in row:
        cells += task_cells(row, dense)
    cells += agreement_cells(row)
    cells += [f"{row['parameters']:,}", f"{row['bytes'] / 1e6:.1f}"]
    cells += speed_cells(row)
    cells += time_cells(row)
    cells.append((row["code"] or "")[-6:])
    return f"| {' | '.join(cells)} |"


def left(row: Row, dense: Row, published: Sequence[Row], text: str) -> str:
    """Return the share of the published method's loss that is left, by its best row on this text."""
    if not published or row in published:
        return ""
    best = min(each["texts"][text] for each in published)
    if best <= dense["texts"][text]:
        return ""  # the published method loses nothing on this text
    return f"{share_left(row['texts'][text], best, dense['texts'][text]):.2f}"


def task_cells(row: Row, dense: Row) -> list[str]:
    """Return the accuracies, their mean, and the share of the dense mean with its paired standard error."""
    answers, reference = right_answers(row), right_answers(dense)
    cells = [f"{statistics.fmean(right):.3f}" for right in answers]
    mean, error = mean_accuracy(answers)
    cells.append(f"{mean:.3f} ± {error:.3f}")
    if row is dense or not any(map(any, reference)):
        return [*cells, ""]
    share, error = share_kept(reference, answers)
    return [*cells, f"{share:.1%} ± {error:.1%}"]


def right_answers(row: Row) -> list[list[bool]]:
    """Return by task whether each answer was right."""
    return [[character == "1" for character in answers] for answers in row["tasks"].values()]


def agreement_cells(row: Row) -> list[str]:
    if "greedy" not in row:
        return ["", ""]
    return [f"{row['greedy']['same']:.0%}", f"{row['greedy']['top1']:.1%}"]


def speed_cells(row: Row) -> list[str]:
    """Return how many times as fast as the dense model a model reads and writes."""
    if "speed" not in row:
        return ["", ""]
    return [f"{row['speed'][run]['median']:.2f}" for run in ("prefill", "decode")]


def time_cells(row: Row) -> list[str]:
    """Return the minutes of the compression, and the least that its matrix products alone take."""
    if "stages" not in row:
        return ["", ""]
    seconds = sum(stage["seconds"] for stage in row["stages"])
    floor = sum(sum(stage["floor"].values()) for stage in row["stages"])
    return [f"{seconds / 60:.1f}", f"{floor / 60:.1f}"]
