"""`recover`: fine-tunes a compressed model for a little while, so that it gets back some of what it lost."""

from __future__ import annotations

import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import EvaluationError
from optimum_modegpt.integration.card import REPORT
from optimum_modegpt.integration.commands.common import (
    OTHER_TEXT,
    add_device,
    count,
    models_on,
    path,
    reference_of,
    shared_tokenizer,
    shows_progress,
    source_of,
    verb,
)
from optimum_modegpt.integration.hub import KEPT_REPORT
from optimum_modegpt.integration.output import check_output, replacing, saving
from optimum_modegpt.integration.reading import load_config, pick_device
from optimum_modegpt.integration.source import DEMO, Source, calibrate
from optimum_modegpt.recovery import Recovery, RecoveryConfig, check_compressed, recover
from optimum_modegpt.report import Report

MOST_WINDOWS = 4096


def add(verbs: Any) -> None:
    """Declares the arguments."""
    parser = verb(verbs, "recover", run, "Fine-tune a compressed MODEL with LoRA, merge it and save the result.")
    parser.add_argument("--output", type=path, required=True, metavar="DIR", help="folder to write; it appears whole")
    parser.add_argument("--overwrite", action="store_true", help="replace the result that stands there, after success")
    parser.add_argument("--teacher", dest="reference", metavar="DENSE", help="learn its predictions, not the text's")
    parser.add_argument("--dataset", metavar="NAME_OR_FILE", help="text; by default wikitext2, or the demo's own")
    parser.add_argument(
        "--dataset-split", metavar="NAME", help="split to read, or a slice such as train[:10%%]; by default train"
    )
    parser.add_argument("--text-column", metavar="NAME", help="column that holds the text or token ids")
    parser.add_argument(
        "--sequence-length", type=int, metavar="N", help="tokens per window; default min(2048, context)"
    )
    parser.add_argument(
        "--num-samples",
        type=count,
        default=MOST_WINDOWS,
        metavar="N",
        help="windows to take at most; default %(default)s",
    )
    parser.add_argument("--learning-rate", type=float, metavar="X", help="its peak; default 0.03 / sqrt(d_model)")
    for flag, kind, text in (
        ("steps", count, "updates of the weights"),
        ("batch-size", count, "windows per step"),
        ("lora-rank", count, "rank of the adapters"),
        ("seed", int, "of the choice and order of the windows and of the adapters' first values"),
    ):
        default = getattr(RecoveryConfig, flag.replace("-", "_"))
        parser.add_argument(f"--{flag}", type=kind, default=default, metavar="N", help=f"{text}; default %(default)s")
    add_device(parser)


def run(options: Namespace) -> None:
    """Fine-tunes a model and saves it; the folder appears at the end, whole.

    Raises:
        EvaluationError: nothing was gained on the held-out windows, so nothing was saved.
    """
    source, teacher = source_of(options), reference_of(options)
    config = RecoveryConfig(**{name: getattr(options, name) for name in RecoveryConfig.__dataclass_fields__})
    check_output(options.output, overwrite=options.overwrite, used=_used_paths(source, teacher, options))
    recovery = _recover_to(options.output, source, teacher, config, options)
    print(recovery.summary())
    print(f"saved in {options.output}")
    print(_next_step(options))


def _recover_to(
    output: Path, source: Source, teacher: Source | None, config: RecoveryConfig, options: Namespace
) -> Recovery:
    device, model_config = pick_device(options.device), load_config(source)
    check_compressed(model_config)
    if teacher is not None:
        load_config(teacher)  # a name that leads nowhere is refused before anything is read
    tokenizer, report = shared_tokenizer(None, source, teacher), _report(source)
    with replacing(output, overwrite=options.overwrite) as folder:
        windows = calibrate(_text(options, model_config), tokenizer, model_config, source, fewer=True)
        model, dense = models_on(device, options.dtype, source, teacher)
        recovery = recover(
            model,
            windows,
            teacher=dense,
            config=config,
            teacher_name=teacher.base_model if teacher else None,
            progress=shows_progress(),
        )
        if not recovery.improved:
            raise EvaluationError(
                f"fine-tuning did not help, so nothing was saved: the model began with perplexity "
                f"{recovery.perplexity_before:.3f} on {recovery.held_out_windows} windows that were kept apart, and "
                f"{recovery.steps} steps made it no better. Try a lower --learning-rate, more text, or text that is "
                "more like what the model was trained on."
            )
        if report is not None:
            vars(model)[KEPT_REPORT] = report
        with saving(output):
            tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)
    return recovery


def _text(options: Namespace, model_config: Any) -> ModeGPTConfig:
    """What to read, in the words of a compression."""
    own = DEMO if model_config.modegpt.get("base_model") == DEMO else ModeGPTConfig.dataset
    return ModeGPTConfig(
        dataset=options.dataset or own,
        dataset_split=options.dataset_split,
        text_column=options.text_column,
        num_samples=options.num_samples,
        sequence_length=options.sequence_length,
        seed=options.seed,
    )


def _report(source: Source) -> Report | None:
    """The report of the compression, where it lies beside the model."""
    file = cached_file(source.path, REPORT, _raise_exceptions_for_missing_entries=False, **source.hub)
    return None if file is None else Report.load(file)


def _used_paths(source: Source, teacher: Source | None, options: Namespace) -> list[Path]:
    named = (source.path, teacher.path if teacher else None, options.dataset)
    return [Path(name) for name in named if name is not None and Path(name).exists()]


def _next_step(options: Namespace) -> str:
    """The command that evaluates the result, ready for a shell but for the name of a text of the user's own."""
    words = ["evaluate", str(options.output)]
    if options.reference is not None:
        words += ["--reference", options.reference]
    if options.dataset is not None:
        words += ["--dataset", OTHER_TEXT if Path(options.dataset).exists() else options.dataset]
    if options.trust_remote_code:
        words.append("--trust-remote-code")
    return f"next, on text that was not trained on: {options.program} {shlex.join(words)}"
