"""`benchmark`: how fast a model reads and writes, beside a reference in the same run."""

from __future__ import annotations

import argparse
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from optimum_modegpt.errors import OutputError
from optimum_modegpt.evaluation.speed import Benchmark
from optimum_modegpt.evaluation.speed import benchmark as measure
from optimum_modegpt.integration.commands.common import (
    add_device,
    add_reference_revision,
    check_file,
    count,
    models_on,
    path,
    reference_of,
    shows_progress,
    source_of,
    verb,
    write_json,
)
from optimum_modegpt.integration.headers import stored_bytes
from optimum_modegpt.integration.reading import pick_device
from optimum_modegpt.integration.source import Source
from optimum_modegpt.integration.tables import benchmark_table
from optimum_modegpt.plot import picture_formats, plot_speeds

NEW_TOKENS, REPEATS = 32, 5
BATCH_SIZES, PROMPT_LENGTHS = (1, 8), (128, 1024)


def add(verbs: Any) -> None:
    """Declares the arguments."""
    parser = verb(verbs, "benchmark", run, "How fast MODEL reads a prompt and writes, and what memory it takes.")
    parser.add_argument("--reference", metavar="DENSE", help="model to take turns with; ratios are to it")
    add_reference_revision(parser)
    parser.add_argument("--batch-sizes", type=counts, default=BATCH_SIZES, metavar="N,…", help="default 1,8")
    parser.add_argument(
        "--prompt-lengths",
        type=counts,
        default=PROMPT_LENGTHS,
        metavar="N,…",
        help="tokens, cut to the context; default 128,1024",
    )
    parser.add_argument(
        "--new-tokens", type=count, default=NEW_TOKENS, metavar="N", help=f"decoding steps; default {NEW_TOKENS}"
    )
    parser.add_argument(
        "--repeats", type=count, default=REPEATS, metavar="N", help=f"measurements of a setting; default {REPEATS}"
    )
    parser.add_argument("--compile", action="store_true", help="measure once more under torch.compile; takes minutes")
    add_device(parser)
    files = parser.add_argument_group("files")
    files.add_argument("--json", type=path, metavar="FILE", help="write all figures, machine and versions")
    files.add_argument("--plot", type=path, metavar="FILE", help="draw the speeds; .png, .svg or .pdf")


def counts(text: str) -> tuple[int, ...]:
    """Integers of at least 1, separated by commas."""
    try:
        return tuple(count(part.strip()) for part in text.split(","))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"expected integers of at least 1 such as 1,8, found {text!r}") from error


def run(options: Namespace) -> None:
    """Measures and prints the table."""
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
    """A size with that of the model's files; None where there is no model."""
    return None if source is None else replace(size, disk_bytes=stored_bytes(source))


def _check_files(options: Namespace) -> None:
    """Refuses, before any work, files that cannot be written."""
    for file in (options.json, options.plot):
        check_file(file)
    if options.plot is not None and options.plot.suffix.lstrip(".") not in (formats := picture_formats()):
        raise OutputError(
            f"{options.plot} names no picture format by its ending; expected one of {', '.join(formats)}."
        )


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
