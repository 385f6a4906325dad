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
from transformers import PreTrainedModel

from optimum_modegpt import distributed
from optimum_modegpt.budget.preflight import check_resources
from optimum_modegpt.cli.commands import common
from optimum_modegpt.cli.commands.estimate import estimate_of
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import InvalidConfig
from optimum_modegpt.hub.result import REPORT
from optimum_modegpt.hub.upload import Upload
from optimum_modegpt.integration.job import Job
from optimum_modegpt.integration.quantizer import ModeGPTQuantizer
from optimum_modegpt.loading.models import load_config, load_model, pick_device
from optimum_modegpt.loading.source import default_dataset
from optimum_modegpt.mixture import names_of
from optimum_modegpt.output import check_output, checkpoint_of, replacing, restore_output, saving
from optimum_modegpt.report import Report
from optimum_modegpt.serving.servable import best, check_servable
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
    config = common.configuration(options)
    with distributed.joined(pick_device(options.device)) as device:
        if not distributed.is_first():
            return take_part(options, config, device)
        upload = requested_upload(options)
        if upload is not None:
            upload.check()
        report = compress_to(options.output, options, config, device)
    print(LEGEND)
    print(report.summary())
    print(f"saved in {options.output}")
    if upload is not None:
        commit = upload.push(options.output)
        print(f"uploaded: {commit.pr_url or commit.commit_url}")
    print(next_step(options, config))
    print(serving_step(options.output))


def compress_to(output: Path, options: Namespace, config: ModeGPTConfig, device: torch.device | None) -> Report:
    """Compress a model into `output` with the options of `compress`."""
    output = output.resolve()  # the folder next to it is on the same disk
    common.check_file(options.report)
    with unfinished_work(output) as checkpoint, checkpoint.alone():
        job = requested_job(options, config, checkpoint)
        restore_output(checkpoint.folder, output)
        if options.fresh:
            checkpoint.remove()
        request = describe(job, options.dtype)
        report = report_in_place(checkpoint, output, request)
        distributed.broadcast_object(report is None)  # whether the other ranks take part
        if report is None:
            check_folder(job, output, options)
            model_config = load_config(job.source)
            found = estimate_of(job.source, model_config, job.config, options.dtype, device)
            warn_of_loss(found.sparsity, output)
            if not options.ignore_estimate:
                place = compute_device(device, torch.device("cpu"))
                check_resources(found, place, output, written=checkpoint.size)  # the checkpoint is reused
            with replacing(output, overwrite=options.overwrite, work_folder=checkpoint.folder) as folder:
                model, quantizer = compress(job, model_config, options, device, progress=common.shows_progress())
                with saving(output):
                    quantizer.save(model, folder, quantizer.tokenizer or job.source.tokenizer())
                del model  # its weights are in the checkpoint, which is removed below
                checkpoint.keep_saved({"report": digest(folder / REPORT), "request": request})
            report = Report.load(output / REPORT)
        distributed.barrier()  # if another rank has failed, the checkpoint is kept to resume from
        checkpoint.remove()
    if options.report is not None:
        shutil.copyfile(output / REPORT, options.report)
    return report


def check_folder(job: Job, output: Path, options: Namespace) -> None:
    """Refuse an output folder that must not be written."""
    names = (job.source.path, job.config.tokenizer, options.config, *names_of(job.config.dataset))
    used = common.existing_paths(*names)
    if options.report is not None:
        used.append(options.report)
    check_output(output, overwrite=options.overwrite, used=used)


def warn_of_loss(sparsity: float, output: Path) -> None:
    """Warn of a steep loss of quality."""
    if sparsity > STEEP:
        text = "sparsity %.4g: above %g quality drops quickly. Fine-tune the result, with recover %s."
        logger.warning(text, sparsity, STEEP, output)


def compress(
    job: Job, model_config: Any, options: Namespace, device: torch.device | None, *, progress: bool
) -> tuple[PreTrainedModel, ModeGPTQuantizer]:
    """Read the calibration text, then load the model and compress it."""
    quantizer = ModeGPTQuantizer(job.config)
    calibration = quantizer.prepare(model_config, None, job.source)
    model = load_model(job.source, options.dtype)
    windows = calibration.windows(model, device=device, progress=progress)
    quantizer.compress_with(
        model, windows, source=job.source, device=device, checkpoint=job.checkpoint, progress=progress
    )
    return model, quantizer


def take_part(options: Namespace, config: ModeGPTConfig, device: torch.device | None) -> None:
    """Compute the share of a rank other than 0, which writes no result."""
    logging.getLogger("optimum_modegpt").setLevel(logging.ERROR)  # rank 0 warns
    with unfinished_work(options.output.resolve()) as checkpoint:
        if distributed.broadcast_object(None):
            job = requested_job(options, config, checkpoint)
            compress(job, load_config(job.source), options, device, progress=False)
        distributed.barrier()


def requested_job(options: Namespace, config: ModeGPTConfig, checkpoint: Checkpoint) -> Job:
    source = common.source_of(options)
    return Job(default_dataset(config, source), source, checkpoint)


def describe(job: Job, dtype: str) -> dict[str, Any]:
    """Describe a job, safe for JSON, to recognize its result."""
    path = Path(job.source.path)
    model = str(path.resolve()) if path.exists() else job.source.path
    request = {"model": model, "revision": job.source.revision, "dtype": dtype, **job.config.to_dict()}
    del request["batch_size"]  # it may change when a run is resumed
    return json.loads(json.dumps(request, default=str))


def report_in_place(checkpoint: Checkpoint, output: Path, request: dict[str, Any]) -> Report | None:
    """Return the report of an earlier run of this command that was killed after its result was in place."""
    progress, file = checkpoint.read(), output / REPORT
    if progress is None or not file.is_file() or progress.saved != {"report": digest(file), "request": request}:
        return None
    return Report.load(file)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextmanager
def unfinished_work(output: Path) -> Iterator[Checkpoint]:
    """Yield the checkpoint of a result at `output`; the message of an interrupt names it if it has finished blocks."""
    checkpoint = checkpoint_of(output)
    try:
        yield checkpoint
    except KeyboardInterrupt:
        if checkpoint.read() is None:
            raise
        raise KeyboardInterrupt(
            f"Finished blocks are kept in {checkpoint.folder}. "
            "Run the same command to resume, with --fresh to start again."
        ) from None


def requested_upload(options: Namespace) -> Upload | None:
    """Return the upload that the options request; None if they request none."""
    if options.push_to_hub is not None:
        private = options.private or None
        return Upload(options.push_to_hub, private=private, create_pr=options.create_pr, token=options.token)
    if options.private or options.create_pr:
        raise InvalidConfig("--private and --create-pr require --push-to-hub REPO.")
    return None


def next_step(options: Namespace, config: ModeGPTConfig) -> str:
    """Return the command that evaluates the result, with a placeholder for a file of other text."""
    title, dataset = "next", None
    if common.existing_paths(*names_of(config.dataset)):
        title, dataset = "next, on text that it was not calibrated on", common.YOUR_TEXT
    command = common.advised_command(
        options,
        *("evaluate", str(options.output)),
        reference=options.model,
        reference_revision=options.revision,
        tokenizer=config.tokenizer,
        allow_foreign_tokenizer=config.allow_foreign_tokenizer,
        dataset=dataset,
        sequence_length=config.sequence_length,
    )
    return f"{title}: {command}"


def serving_step(output: Path) -> str:
    """Return the command that serves the result, or the Python line that loads it."""
    found = best(check_servable(output))
    return f"to run it with {found.engine}: {found.command}"
