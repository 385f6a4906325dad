"""Keep the results of benchmarks as JSON: one row per cell, saved after each cell, and found again by its fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from machine import machine


def read(file: Path) -> dict[str, Any]:
    """Return the results so far."""
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    return {"machine": {}, "rows": []}


def write(file: Path, record: dict[str, Any]) -> None:
    """Save the results so far with a description of the machine, each row on a line of its own."""
    record["machine"] = machine()
    head = {key: value for key, value in record.items() if key != "rows"}
    rows = ",\n".join(map(json.dumps, record["rows"]))
    text = json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "rows": [\n{rows}\n  ]\n}}\n'
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def find(record: dict[str, Any], cell: dict[str, Any]) -> dict[str, Any] | None:
    """Return the row of a cell, or None if it is not measured yet."""
    for row in record["rows"]:
        if all(row.get(key) == value for key, value in cell.items()):
            return row
    return None
