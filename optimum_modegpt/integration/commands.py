"""What the commands do: each takes the parsed options, prints its result, and raises what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
import tempfile
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_modegpt import demo
from optimum_modegpt.architectures import FAMILIES, check_model_type
from optimum_modegpt.calibration.data import TokenWindows, evaluation_windows, resolve_sequence_length
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import CalibrationDataError, InvalidConfig, OutputError
from optimum_modegpt.evaluation.estimate import estimate as estimate_costs
from optimum_modegpt.evaluation.estimate import on_meta
from optimum_modegpt.evaluation.fidelity import check_tokenizers, fidelity
from optimum_modegpt.evaluation.inspection import inspection
from optimum_modegpt.evaluation.perplexity import perplexity
from optimum_modegpt.integration.headers import read_headers
from optimum_modegpt.integration.output import check_output, replacing
from optimum_modegpt.integration.quantizer import ModeGPTQuantizer
from optimum_modegpt.integration.reading import load_config, load_model, pick_device, readable
from optimum_modegpt.integration.source import (
    DEMO,
    Source,
    check_vocabulary,
    context_of,
    dataset_hub,
    default_dataset,
    tokenizer_named,
)
from optimum_modegpt.integration.tables import estimate_table, inspection_table, scores_table
from optimum_modegpt.report import Report, count_parameters
from optimum_modegpt.stages import compute_device

DEMO_WINDOWS = 64
DEMO_LEGEND = (
    "Kept/dense widths of a block's parts: mlp (channels), qk (query and key heads), vo (value and output heads);"
    "\nerr: relative error of what the part computes, on the calibration text."
)
PROMPT_WORDS, SAMPLE_TOKENS = 12, 48


# ------------------------------------------------------------------------------------------------------ the commands


def compress(options: Namespace) -> None:
    """Compresses a model and saves it; the folder appears at the end, whole."""
    print(_compress_to(options.output, options).summary())
    print(f"saved in {options.output}")
    print(_next_step(options))


def evaluate(options: Namespace) -> None:
    """Perplexity on a text; with a reference also the distance from it."""
    _check_file(options.json)
    source, reference = _source(options), _reference(options)
    device, model_config = pick_device(options.device), load_config(source)
    vocab_size = model_config.get_text_config().vocab_size
    tokenizer = _evaluation_tokenizer(options.tokenizer, source, reference)
    check_vocabulary(tokenizer, vocab_size)
    windows = evaluation_windows(
        options.dataset or _evaluation_text(source, model_config),
        tokenizer,
        sequence_length=resolve_sequence_length(options.sequence_length, context_of(model_config)),
        max_windows=options.max_windows,
        split=options.dataset_split,
        text_column=options.text_column,
        vocab_size=vocab_size,
        hub=dataset_hub(source),
    )
    model, dense = _models_on(device, options.dtype, source, reference)
    result = {"model": options.model, **scores(model, dense, windows, options.batch_size), "text": windows.record}
    _write_json(options.json, result)
    print(scores_table(result))


def inspect(options: Namespace) -> None:
    """Ranks, parameters and record of a compressed model, without loading its weights."""
    _check_file(options.json)
    source = _source(options)
    found = inspection(load_config(source), read_headers(source))
    _write_json(options.json, found.to_dict())
    print(inspection_table(found))
    if not found.blocks:
        advice = f"To compress it: {options.program} compress {shlex.quote(options.model)} --output DIR"
        unknown = f"Models of its type cannot be compressed; known: {', '.join(sorted(FAMILIES))}."
        print(f"This is a dense model. {advice if found.model_type in FAMILIES else unknown}")


def estimate(options: Namespace) -> None:
    """What compressing a model would take, without loading its weights."""
    _check_file(options.json)
    source = _source(options)
    model_config, config = load_config(source), configuration(options)
    check_model_type(model_config.model_type)
    length = resolve_sequence_length(config.sequence_length, context_of(model_config))
    with readable(source):
        found = estimate_costs(on_meta(AutoModelForCausalLM, model_config), config, length)
    _write_json(options.json, found.to_dict())
    print(estimate_table(found))


def demonstrate(options: Namespace) -> None:
    """The whole job on the embedded model: compress, save, reload, evaluate before and after, generate."""
    with tempfile.TemporaryDirectory() as folder:
        output = options.output or Path(folder) / "demo"
        print("1. compress the embedded model")
        print(DEMO_LEGEND)
        print(_compress_to(output, options).summary())
        _compare(output, options)
    where = "a temporary folder; keep it with --output DIR" if options.output is None else str(output)
    print(f"\nThe compressed model was saved in {where}.")


# ---------------------------------------------------------------------------------------------------------- compress


def configuration(options: Namespace) -> ModeGPTConfig:
    """The configuration: flags over the file over the defaults.

    Raises:
        InvalidConfig: a file that cannot be read, an unknown field, a value that is out of range.
    """
    names = {field.name for field in dataclasses.fields(ModeGPTConfig)}
    flags = {name: value for name, value in vars(options).items() if name in names}
    return ModeGPTConfig.from_dict({**_read_fields(options.config), **flags})


def _read_fields(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidConfig(f"--config {path} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidConfig(f"--config {path} holds a {type(fields).__name__}; expected an object of fields.")
    return fields


def _compress_to(output: Path, options: Namespace) -> Report:
    source = _source(options)
    quantizer = ModeGPTQuantizer(default_dataset(configuration(options), source))
    check_output(output, overwrite=options.overwrite, used=_used_paths(source, quantizer.config, options))
    _check_file(options.report)
    device = pick_device(options.device)
    with replacing(output, overwrite=options.overwrite) as folder:
        windows = quantizer.prepare(load_config(source), None, source)
        model = load_model(source, options.dtype)
        report = quantizer.compress_with(model, windows, source=source, device=device, progress=shows_progress())
        quantizer.save(model, folder, quantizer.tokenizer or source.tokenizer())
    if options.report is not None:
        report.save(options.report)
    return report


def _next_step(options: Namespace) -> str:
    """The command that evaluates the result, ready for a shell; on the user's own text where one was given."""
    words = ["evaluate", str(options.output), "--reference", options.model]
    config, advice = configuration(options), ""
    if options.trust_remote_code:
        words.append("--trust-remote-code")
    if isinstance(config.dataset, str) and Path(config.dataset).exists():
        words += ["--dataset", config.dataset]
        if config.sequence_length is not None:
            words += ["--sequence-length", str(config.sequence_length)]
        advice = "Text that was calibrated on flatters the result: evaluate on text kept apart, in place of this one.\n"
    return f"{advice}next: {options.program} {shlex.join(words)}"


def _used_paths(source: Source, config: ModeGPTConfig, options: Namespace) -> list[Path]:
    """Files and folders that a compression reads, and the report that it writes."""
    named = (source.path, config.dataset, config.tokenizer, options.config)
    read = [Path(each) for each in named if isinstance(each, str | Path) and Path(each).exists()]
    return read if options.report is None else [*read, options.report]


# ----------------------------------------------------------------------------------------------------------- loading


def _source(options: Namespace) -> Source:
    return Source.of_arguments(options.model, {**vars(options), "trust_remote_code": options.trust_remote_code or None})


def _reference(options: Namespace) -> Source | None:
    if options.reference is None:
        return None
    arguments = {"token": options.token, "trust_remote_code": options.trust_remote_code or None}
    return Source.of_arguments(options.reference, arguments)


def shows_progress() -> bool:
    """Whether there is someone to watch progress bars."""
    return sys.stderr.isatty()


def _check_file(path: Path | None) -> None:
    """Refuses a file that cannot be written, before any work."""
    if path is None:
        return
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name the file to write.")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path} cannot be written: the folder {path.absolute().parent} does not exist.")


def _write_json(path: Path | None, data: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- evaluate


def scores(
    model: PreTrainedModel, reference: PreTrainedModel | None, windows: TokenWindows, batch_size: int | None
) -> dict[str, Any]:
    """Perplexity, scored positions and parameters; with a reference its own, KL divergence and top-1 agreement."""
    if reference is None:
        found = dataclasses.asdict(perplexity(model, windows.tokens, batch_size=batch_size, progress=shows_progress()))
        return {**found, "parameters": count_parameters(model)}
    found = dataclasses.asdict(
        fidelity(model, reference, windows.tokens, batch_size=batch_size, progress=shows_progress())
    )
    return {**found, "parameters": count_parameters(model), "reference_parameters": count_parameters(reference)}


def _models_on(
    device: torch.device | None, dtype: str, source: Source, reference: Source | None
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    device = compute_device(device, torch.device("cpu"))
    model = load_model(source, dtype).to(device)
    return model, None if reference is None else load_model(reference, dtype).to(device)


def _evaluation_tokenizer(name: str | None, source: Source, reference: Source | None) -> Any:
    """The one of this name, else the model's own, else the reference's; where both have one, they must agree.

    Raises:
        CalibrationDataError: when there is none.
        EvaluationError: when two disagree.
    """
    if name is not None:
        return tokenizer_named(name, source)
    try:
        own = source.tokenizer()
    except CalibrationDataError:
        if reference is None:
            raise
        return reference.tokenizer()
    if reference is not None:
        with suppress(CalibrationDataError):  # it has none
            check_tokenizers(own, reference.tokenizer())
    return own


def _evaluation_text(source: Source, model_config: Any) -> Any:
    record = getattr(model_config, "modegpt", None) or {}
    is_demo = source.is_demo or record.get("base_model") == DEMO
    return demo.EVALUATION_TEXT if is_demo else ModeGPTConfig.dataset


def _compare(folder: Path, options: Namespace) -> None:
    """Reloads what was saved, and shows it beside the dense model."""
    small, dense = _models_on(pick_device(options.device), "auto", Source(str(folder)), _source(options))
    assert dense is not None
    tokenizer = Source(str(folder)).tokenizer()
    windows = evaluation_windows(
        demo.EVALUATION_TEXT,
        tokenizer,
        sequence_length=resolve_sequence_length(None, context_of(small.config)),
        max_windows=DEMO_WINDOWS,
    )
    result = scores(small, dense, windows, None)
    print(f"\n2. reload and evaluate, on {result['tokens']:,} tokens of text that was not used before")
    print(scores_table(result))
    opening = "".join(re.findall(r"\s*\S+", demo.EVALUATION_TEXT.read_text(encoding="utf-8"))[:PROMPT_WORDS])
    prompt = tokenizer(opening, return_tensors="pt").input_ids.to(small.device)
    print(f"\n3. generate: both go on from: {opening}")
    for name, model in (("dense", dense), ("compressed", small)):
        written: Any = model.generate(prompt, max_new_tokens=SAMPLE_TOKENS, do_sample=False)  # pyright: ignore[reportCallIssue]
        print(
            f"{name:>10}: {whole_sentences(tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True))}"
        )


def whole_sentences(text: str) -> str:
    """The text up to the end of its last full sentence; all of it where there is none."""
    found = re.match(r""".*(?<!\bMr)(?<!\bMrs)(?<!\bDr)[.!?]["']?(?=\s|$)""", text, flags=re.DOTALL)
    return found.group() if found else text
