"""`export`: write a model in the format of another tool."""

from __future__ import annotations

import logging
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

from optimum_modegpt.cli.arguments import DTYPES
from optimum_modegpt.cli.commands import common
from optimum_modegpt.errors import CalibrationDataError, InvalidConfig, UnsupportedModel
from optimum_modegpt.export.gguf_architecture import check_gguf
from optimum_modegpt.export.model import check_cache_length, check_path, export_model, requested
from optimum_modegpt.loading.models import load_config, load_model
from optimum_modegpt.loading.source import Source


def run(options: Namespace) -> None:
    """Export a model; the result appears only once complete."""
    chosen, source = requested(options.format), common.source_of(options)
    used = common.existing_paths(source.path)
    check_path(options.output, chosen, overwrite=options.overwrite, used=used)
    if not chosen.is_file and options.dtype not in DTYPES:
        raise InvalidConfig(f"--dtype {options.dtype} is a type of GGUF files only; expected {', '.join(DTYPES)}.")
    check_cache_length(options.cache_length, chosen)
    config = load_config(source)  # refuses an invalid name before the weights are read
    if chosen.is_file and (reason := check_gguf(config).reason) is not None:
        raise UnsupportedModel(reason)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of each package that is not installed
    warnings.filterwarnings("ignore", r"`isinstance\(treespec", FutureWarning)  # torch.export uses it itself
    loaded, stored = ("auto", options.dtype) if chosen.is_file else (options.dtype, "auto")
    remarks = export_model(
        load_model(source, loaded),
        options.output,
        chosen.name,
        tokenizer=tokenizer_of(source),
        files=source.processor_files(),
        dtype=stored,
        cache_length=options.cache_length,
        overwrite=options.overwrite,
    )
    for remark in remarks:
        print(remark)
    print(f"{chosen.name}: {size_of(options.output)}, saved in {options.output}")


def tokenizer_of(source: Source) -> Any:
    """Return the model's tokenizer, or None if it has none."""
    try:
        return source.tokenizer()
    except CalibrationDataError:
        return None


def size_of(path: Path) -> str:
    """Return the size of a file, or of all files in a folder, in MB."""
    files = path.rglob("*") if path.is_dir() else [path]
    return f"{sum(file.stat().st_size for file in files if file.is_file()) / 1e6:,.1f} MB"
