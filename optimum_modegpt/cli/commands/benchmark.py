"""`benchmark`: measure prefill and decode speed of a model, alternating with a reference in the same run."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from optimum_modegpt.cli.commands import common
from optimum_modegpt.cli.tables import benchmark_table
from optimum_modegpt.errors import OutputError
from optimum_modegpt.evaluation.speed import Benchmark
from optimum_modegpt.evaluation.speed import benchmark as measure
from optimum_modegpt.loading.models import pick_device
from optimum_modegpt.loading.safetensors_index import stored_bytes
from optimum_modegpt.plot import picture_formats, plot_speeds


def run(options: Namespace) -> None:
    """Measure the speed and print the table."""
    common.check_file(options.json)
    common.check_file(options.plot)
    if options.plot is not None and options.plot.suffix.lstrip(".") not in (formats := picture_formats()):
        raise OutputError(f"{options.plot} has no suffix of a picture format; expected one of {', '.join(formats)}.")
    source, dense = common.source_of(options), common.reference_of(options)
    model, reference = common.models_on(pick_device(options.device), options.dtype, source, dense)
    found = measure(
        model,
        reference,
        batch_sizes=options.batch_sizes,
        prompt_lengths=options.prompt_lengths,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        compile=options.compile,
        progress=common.shows_progress(),
    )
    found = replace(found, model=replace(found.model, disk_bytes=stored_bytes(source)))
    if dense is not None and found.reference is not None:
        found = replace(found, reference=replace(found.reference, disk_bytes=stored_bytes(dense)))
    print(benchmark_table(found))
    common.write_json(
        options.json, {"model_name": options.model, "reference_name": options.reference, **found.to_dict()}
    )
    if options.plot is not None:
        plot(options, found)
        print(f"plot: {options.plot}")


def plot(options: Namespace, found: Benchmark) -> None:
    settings = []
    for row in found.rows:
        setting = f"{row.setting.batch_size} × {row.setting.prompt_length}"
        settings.append(f"{setting}\ncompiled" if row.setting.compiled else setting)
    names = {"model": options.model}
    if options.reference is not None:
        names = {"reference": options.reference, **names}
    speeds: dict[str, Any] = {"prefill": {}, "decode": {}}
    for key, name in names.items():
        for kind, bars in speeds.items():
            bars[f"{key}: {Path(name).name}"] = spreads = []
            for row in found.rows:
                speed = getattr(row, key)
                spread = None if speed is None else getattr(speed, f"{kind}_tokens_per_second")
                spreads.append(None if spread is None else (spread.low, spread.median, spread.high))
    plot_speeds(settings, speeds, f"{found.machine['device_name']}, {found.machine['dtype']}", options.plot)
