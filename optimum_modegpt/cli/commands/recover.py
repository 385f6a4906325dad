"""`recover`: fine-tune a compressed model briefly to regain part of the lost quality."""

from __future__ import annotations

import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from optimum_modegpt.calibration.data import TokenWindows, evaluation_windows
from optimum_modegpt.cli.commands import common
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import EvaluationError, InvalidConfig
from optimum_modegpt.hub.commands import flags
from optimum_modegpt.hub.result import REPORT
from optimum_modegpt.hub.upload import KEPT_REPORT, save_result
from optimum_modegpt.loading.calibration import calibrate
from optimum_modegpt.loading.models import load_config, pick_device
from optimum_modegpt.loading.source import DEMO, Source
from optimum_modegpt.mixture import SELF, names_of, without_folders
from optimum_modegpt.output import check_output, checkpoint_of, replacing, restore_output, saving
from optimum_modegpt.recovery.config import RecoveryConfig
from optimum_modegpt.recovery.recover import Recovery, check_compressed, recover
from optimum_modegpt.report import Report

ON_CARD = (
    *("dataset", "dataset_split", "text_column", "held_out", "sequence_length", "num_samples"),
    *RecoveryConfig.__dataclass_fields__,
)
"""The flags that a card shows, except the name of the teacher."""
HELD_OUT_WINDOWS = 32
"""Maximum number of windows of the held-out text."""


def run(options: Namespace) -> None:
    """Fine-tune a model and save it; the output folder appears only once complete."""
    source, teacher = common.source_of(options), common.reference_of(options)
    output = options.output.resolve()  # the folder next to it is on the same disk
    checkpoint = checkpoint_of(output)
    with checkpoint.alone():
        restore_output(checkpoint.folder, output)
        used = common.existing_paths(source.path, *names_of(options.dataset), *names_of(options.held_out))
        if teacher is not None:
            used += common.existing_paths(teacher.path)
        check_output(output, overwrite=options.overwrite, used=used)
        recovery = recover_to(output, checkpoint.folder, source, teacher, options)
    print(recovery.summary())
    print(f"saved in {options.output}")
    print(next_step(options))


def recover_to(output: Path, work_folder: Path, source: Source, teacher: Source | None, options: Namespace) -> Recovery:
    """Fine-tune a model and save it in `output`.

    Raises:
        EvaluationError: the perplexity of the held-out windows did not improve, so nothing was saved.
    """
    config = RecoveryConfig(**{name: getattr(options, name) for name in RecoveryConfig.__dataclass_fields__})
    device, model_config = pick_device(options.device), load_config(source)
    check_compressed(model_config)
    if teacher is not None:
        load_config(teacher)  # refuses an invalid name before the text is read
    tokenizer = common.shared_tokenizer(None, source, teacher)
    file = cached_file(source.path, REPORT, _raise_exceptions_for_missing_entries=False, **source.hub)
    report = None if file is None else Report.load(file)
    with replacing(output, overwrite=options.overwrite, work_folder=work_folder) as folder:
        read = calibrate(text(options, model_config), tokenizer, model_config, source, fewer=True)
        if read.script is not None and teacher is None:
            raise InvalidConfig("--dataset self is text that the dense model writes. Name that model with --teacher.")
        model, dense = common.models_on(device, options.dtype, source, teacher)
        windows = read.windows(dense, device=device, progress=common.shows_progress())
        recovery = recover(
            model,
            windows,
            teacher=dense,
            held_out=held_out(options, tokenizer, windows, model_config, source),
            config=config,
            teacher_name=teacher.base_model if teacher else None,
            progress=common.shows_progress(),
        )
        if not recovery.improved:
            raise EvaluationError(
                f"fine-tuning did not help, so nothing was saved. The model started with perplexity "
                f"{recovery.perplexity_before:.3f} on {recovery.held_out_windows} held-out windows, and "
                f"{recovery.steps} steps did not improve it. Try a lower --learning-rate, more text, or text that is "
                "more similar to the training data of the model."
            )
        if report is not None:
            commands = {**report.commands, "recover": arguments(options, teacher)}
            vars(model)[KEPT_REPORT] = replace(report, commands=commands)
        with saving(output):
            tokenizer.save_pretrained(folder)
            save_result(model, folder)
            for processor_file in source.processor_files():
                shutil.copyfile(processor_file, folder / processor_file.name)
    return recovery


def arguments(options: Namespace, teacher: Source | None) -> list[str]:
    """Return the arguments of this command for the report; of local paths only the last part."""
    values = {name: getattr(options, name) for name in ON_CARD}
    for name in ("dataset", "held_out"):
        if values[name] is not None:
            values[name] = without_folders(values[name])
    name = teacher.base_model if teacher else None
    return flags({"teacher": name, "teacher_revision": options.reference_revision, **values})


def text(options: Namespace, model_config: Any) -> ModeGPTConfig:
    """Return the text to train on, as the configuration of a compression."""
    own = DEMO if model_config.modegpt.get("base_model") == DEMO else ModeGPTConfig.dataset
    return ModeGPTConfig(
        dataset=options.dataset or own,
        dataset_split=options.dataset_split,
        text_column=options.text_column,
        num_samples=options.num_samples,
        sequence_length=options.sequence_length,
        seed=options.seed,
    )


def held_out(
    options: Namespace, tokenizer: Any, windows: TokenWindows, model_config: Any, source: Source
) -> TokenWindows | None:
    """Return the windows that select the best step, of the length of those to train on, or None if not requested."""
    if options.held_out is None:
        return None
    return evaluation_windows(
        options.held_out,
        tokenizer,
        sequence_length=windows.tokens.shape[1],
        max_windows=HELD_OUT_WINDOWS,
        vocab_size=model_config.get_text_config().vocab_size,
        hub=source.dataset_arguments(),
    )


def next_step(options: Namespace) -> str:
    """Return the command that evaluates the result, with a placeholder for a file of other text."""
    names, text_column = [name for name in names_of(options.dataset) if name != SELF], options.text_column
    if common.existing_paths(*names):
        names, text_column = [common.YOUR_TEXT], None
    command = common.advised_command(
        options,
        *("evaluate", str(options.output)),
        reference=options.reference,
        reference_revision=options.reference_revision,
        dataset=names or None,
        text_column=text_column,
        sequence_length=options.sequence_length,
    )
    return f"next, on text that was not trained on: {command}"
