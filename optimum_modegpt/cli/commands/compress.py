"""`compress`: compress a model and save it."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from optimum_modegpt import distributed
from optimum_modegpt.budget.preflight import check_resources
from optimum_modegpt.cli.commands.advice import NEW_FOLDER, YOUR_TEXT, advised
from optimum_modegpt.cli.commands.common import (
    check_file,
    shows_progress,
    source_of,
)
from optimum_modegpt.cli.commands.configuration import configuration
from optimum_modegpt.cli.commands.estimate import estimate_of
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import InvalidConfig
from optimum_modegpt.hub.output import check_output, replacing, saving, taken_back, workshop_of
from optimum_modegpt.hub.result import REPORT
from optimum_modegpt.hub.upload import Upload
from optimum_modegpt.integration.quantizer import ModeGPTQuantizer
from optimum_modegpt.loading.models import load_config, load_model, pick_device
from optimum_modegpt.loading.source import Source, default_dataset
from optimum_modegpt.report import Report
from optimum_modegpt.stages import compute_device
from optimum_modegpt.walk.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

LEGEND = (
    "kept/dense widths of mlp, of qk (a query-key head) and vo (a value-output head); err: relative error of the "
    "part's fit"
)
STEEP = 0.4
"""The sparsity above which quality drops quickly."""


def run(options: Namespace) -> None:
    """Compress a model, save it, and upload it if requested; the output folder appears only once complete.

    In a distributed run, each rank computes with its share of the calibration windows; rank 0 does everything else.
    """
    with distributed.joined(pick_device(options.device)) as device:
        if not distributed.is_first():
            return _take_part(options, device)
        upload = _upload(options)
        if upload is not None:
            upload.check()
        report = compress_to(options.output, options, device)
    print(LEGEND)
    print(report.summary())
    print(f"saved in {options.output}")
    if upload is not None:
        commit = upload.push(options.output)
        print(f"uploaded: {commit.pr_url or commit.commit_url}")
    print(_next_step(options))


def compress_to(output: Path, options: Namespace, device: torch.device | None) -> Report:
    """Compress a model into `output` with the options of `compress`."""
    output = output.resolve()  # the folder next to it is on the same disk
    source = source_of(options)
    quantizer = _quantizer(options, source)
    check_file(options.report)
    with _unfinished_work(output) as checkpoint, checkpoint.alone():
        taken_back(checkpoint.folder, output)
        if options.fresh:
            checkpoint.remove()
        report = _placed(checkpoint, output, _request(options, source, quantizer))
        distributed.broadcast_object(report is None)  # whether the other ranks take part
        if report is None:
            check_output(output, overwrite=options.overwrite, used=_used_paths(source, quantizer.config, options))
            report = _compress(output, options, quantizer, source, checkpoint, device)
        distributed.barrier()  # if another rank has failed, the checkpoint is kept to resume from
        checkpoint.remove()
    if options.report is not None:
        shutil.copyfile(output / REPORT, options.report)
    return report


def _compress(
    output: Path,
    options: Namespace,
    quantizer: ModeGPTQuantizer,
    source: Source,
    checkpoint: Checkpoint,
    device: torch.device | None,
) -> Report:
    if quantizer.config.sparsity > STEEP:
        logger.warning(
            "sparsity %g: above %g quality drops quickly. Fine-tune afterwards: %s",
            quantizer.config.sparsity,
            STEEP,
            advised(
                options,
                *("recover", str(output)),
                teacher=options.model,
                teacher_revision=options.revision,
                dataset=YOUR_TEXT if _is_file(quantizer.config.dataset) else None,
                output=NEW_FOLDER,
            ),
        )
    if not options.ignore_estimate:
        found = estimate_of(source, quantizer.config, options.dtype, device)
        room = compute_device(device, torch.device("cpu"))
        check_resources(found, room, output, written=checkpoint.size)  # the checkpoint is reused
    with replacing(output, overwrite=options.overwrite, workshop=checkpoint.folder) as folder:
        windows = quantizer.prepare(load_config(source), None, source)
        model = load_model(source, options.dtype)
        report = quantizer.compress_with(
            model, windows, source=source, device=device, checkpoint=checkpoint, progress=shows_progress()
        )
        with saving(output):
            quantizer.save(model, folder, quantizer.tokenizer or source.tokenizer())
        request = _request(options, source, quantizer)
        checkpoint.keep_saved({"report": _digest(folder / REPORT), "request": request})
    return report


def _take_part(options: Namespace, device: torch.device | None) -> None:
    """Compute the share of a rank other than 0, which writes no result."""
    logging.getLogger("optimum_modegpt").setLevel(logging.ERROR)  # rank 0 warns
    source = source_of(options)
    quantizer = _quantizer(options, source)
    with _unfinished_work(options.output.resolve()) as checkpoint:
        if distributed.broadcast_object(None):
            windows = quantizer.prepare(load_config(source), None, source)
            model = load_model(source, options.dtype)
            quantizer.compress_with(model, windows, source=source, device=device, checkpoint=checkpoint, progress=False)
        distributed.barrier()


def _quantizer(options: Namespace, source: Source) -> ModeGPTQuantizer:
    return ModeGPTQuantizer(default_dataset(configuration(options), source))


def _placed(checkpoint: Checkpoint, output: Path, request: dict[str, Any]) -> Report | None:
    """Return the report of an earlier run of this command that was killed after its result was in place."""
    progress, file = checkpoint.read(), output / REPORT
    if progress is None or not file.is_file() or progress.saved != {"report": _digest(file), "request": request}:
        return None
    return Report.load(file)


def _request(options: Namespace, source: Source, quantizer: ModeGPTQuantizer) -> dict[str, Any]:
    """Return the request of the user, safe for JSON."""
    path = Path(source.path)
    model = str(path.resolve()) if path.exists() else source.path
    asked = {"model": model, "revision": source.revision, "dtype": options.dtype, **quantizer.config.to_dict()}
    del asked["batch_size"]  # it may change when a run is resumed
    return json.loads(json.dumps(asked, default=str))


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextmanager
def _unfinished_work(output: Path) -> Iterator[Checkpoint]:
    """Yield the checkpoint of a result at `output`; the message of an interrupt names it if it has finished blocks."""
    checkpoint = workshop_of(output)
    try:
        yield checkpoint
    except KeyboardInterrupt:
        if checkpoint.read() is None:
            raise
        raise KeyboardInterrupt(
            f"Finished blocks are kept in {checkpoint.folder}. "
            "Run the same command to resume, with --fresh to start again."
        ) from None


def _upload(options: Namespace) -> Upload | None:
    """Return the upload that the options request; None if they request none.

    Raises:
        InvalidConfig: options of an upload are given without its destination.
    """
    if options.push_to_hub is not None:
        private = options.private or None
        return Upload(options.push_to_hub, private=private, create_pr=options.create_pr, token=options.token)
    if options.private or options.create_pr:
        raise InvalidConfig("--private and --create-pr require --push-to-hub REPO.")
    return None


def _next_step(options: Namespace) -> str:
    """Return the command that evaluates the result, with a placeholder for a file of other text."""
    config = configuration(options)
    is_file = _is_file(config.dataset)
    command = advised(
        options,
        *("evaluate", str(options.output)),
        reference=options.model,
        reference_revision=options.revision,
        tokenizer=config.tokenizer,
        allow_foreign_tokenizer=config.allow_foreign_tokenizer,
        dataset=YOUR_TEXT if is_file else None,
        sequence_length=config.sequence_length,
    )
    return f"next{', on text that it was not calibrated on' if is_file else ''}: {command}"


def _is_file(dataset: Any) -> bool:
    return isinstance(dataset, str) and Path(dataset).exists()


def _used_paths(source: Source, config: ModeGPTConfig, options: Namespace) -> list[Path]:
    """Return the files and folders that a compression reads, and the report that it writes."""
    named = (source.path, config.dataset, config.tokenizer, options.config)
    read = [Path(each) for each in named if isinstance(each, str | Path) and Path(each).exists()]
    return read if options.report is None else [*read, options.report]
