"""`benchmark`: measure prefill and decode speed of a model, alternating with a reference in the same run."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from optimum_modegpt.cli.commands.common import (
    check_file,
    models_on,
    reference_of,
    shows_progress,
    source_of,
    write_json,
)
from optimum_modegpt.cli.tables import benchmark_table
from optimum_modegpt.errors import OutputError
from optimum_modegpt.evaluation.speed import Benchmark
from optimum_modegpt.evaluation.speed import benchmark as measure
from optimum_modegpt.loading.models import pick_device
from optimum_modegpt.loading.safetensors_index import stored_bytes
from optimum_modegpt.loading.source import Source
from optimum_modegpt.plot import picture_formats, plot_speeds


def run(options: Namespace) -> None:
    """Measure the speed and print the table."""
    _check_files(options)
    source, dense = source_of(options), reference_of(options)
    model, reference = models_on(pick_device(options.device), options.dtype, source, dense)
    measured = measure(
        model,
        reference,
        batch_sizes=options.batch_sizes,
        prompt_lengths=options.prompt_lengths,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        compile=options.compile,
        progress=shows_progress(),
    )
    found = replace(measured, model=_stored(measured.model, source), reference=_stored(measured.reference, dense))
    print(benchmark_table(found))
    write_json(options.json, {"model_name": options.model, "reference_name": options.reference, **found.to_dict()})
    if options.plot is not None:
        _draw(options, found)


def _stored(size: Any, source: Source | None) -> Any:
    """Return a size with that of the model's files added; None without a model."""
    return None if source is None else replace(size, disk_bytes=stored_bytes(source))


def _check_files(options: Namespace) -> None:
    """Raise an error, before any work, if a file cannot be written."""
    for file in (options.json, options.plot):
        check_file(file)
    if options.plot is not None and options.plot.suffix.lstrip(".") not in (formats := picture_formats()):
        raise OutputError(f"{options.plot} has no suffix of a picture format; expected one of {', '.join(formats)}.")


def _draw(options: Namespace, found: Benchmark) -> None:
    names = {"reference": options.reference, "model": options.model}
    settings = [
        f"{row.setting.batch_size} × {row.setting.prompt_length}" + ("\ncompiled" if row.setting.compiled else "")
        for row in found.rows
    ]
    speeds = {
        measure: {
            f"{key}: {Path(name).name}": [_spread(getattr(row, key), measure) for row in found.rows]
            for key, name in names.items()
            if name is not None
        }
        for measure in ("prefill", "decode")
    }
    plot_speeds(settings, speeds, f"{found.machine['device_name']}, {found.machine['dtype']}", options.plot)
    print(f"plot: {options.plot}")


def _spread(speed: Any, measure: str) -> tuple[float, float, float] | None:
    spread = None if speed is None else getattr(speed, f"{measure}_tokens_per_second")
    return None if spread is None else (spread.low, spread.median, spread.high)
