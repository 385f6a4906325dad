"""What the commands do: each takes the parsed options, prints its result, and raises what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from optimum_modegpt import demo
from optimum_modegpt.architectures import check_model_type
from optimum_modegpt.calibration.data import TokenWindows, evaluation_windows, resolve_sequence_length
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import InvalidConfig, ModeGPTError, OutputError, UnsupportedModel
from optimum_modegpt.evaluation.estimate import Estimate, on_meta
from optimum_modegpt.evaluation.estimate import estimate as estimate_costs
from optimum_modegpt.evaluation.fidelity import check_tokenizers, fidelity
from optimum_modegpt.evaluation.inspection import Inspection, inspection
from optimum_modegpt.evaluation.perplexity import perplexity
from optimum_modegpt.integration.headers import read_headers
from optimum_modegpt.integration.output import check_output, replacing
from optimum_modegpt.integration.quantizer import ModeGPTQuantizer
from optimum_modegpt.integration.source import DEMO, Source, context_of, dataset_hub, default_dataset
from optimum_modegpt.report import PARTS, Report, count_parameters

DEMO_WINDOWS = 64
PROMPT_WORDS, SAMPLE_TOKENS = 12, 48


# ------------------------------------------------------------------------------------------------------ the commands


def compress(options: Namespace) -> None:
    """Compresses a model and saves it; the folder appears at the end, whole."""
    print(_compress_to(options.output, options).summary())
    print(f"saved in {options.output}")
    print(f"next: {options.program} evaluate {options.output} --reference {options.model}")


def evaluate(options: Namespace) -> None:
    """Perplexity on a text; with a reference also the distance from it."""
    _check_file(options.json)
    source, reference = _source(options), _reference(options)
    model_config = load_config(source)
    context = context_of(model_config)
    tokenizer = source.tokenizer()
    if reference is not None:
        check_tokenizers(tokenizer, reference.tokenizer())
    windows = evaluation_windows(
        options.dataset or _evaluation_text(source, model_config),
        tokenizer,
        sequence_length=resolve_sequence_length(options.sequence_length, context),
        max_windows=options.max_windows,
        split=options.dataset_split,
        text_column=options.text_column,
        vocab_size=model_config.get_text_config().vocab_size,
        hub=dataset_hub(source),
    )
    device = pick_device(options.device)
    model = load_model(source, options.dtype).to(device)
    dense = None if reference is None else load_model(reference, options.dtype).to(device)
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
        print(f"This is a dense model. To compress it: {options.program} compress {options.model} --output DIR")


def estimate(options: Namespace) -> None:
    """What compressing a model would take, without loading its weights."""
    _check_file(options.json)
    source = _source(options)
    model_config, config = load_config(source), configuration(options)
    check_model_type(model_config.model_type)
    length = resolve_sequence_length(config.sequence_length, context_of(model_config))
    found = estimate_costs(on_meta(AutoModelForCausalLM, model_config), config, length)
    _write_json(options.json, found.to_dict())
    print(estimate_table(found))


def demonstrate(options: Namespace) -> None:
    """The whole job on the embedded model: compress, save, reload, evaluate before and after, generate."""
    with tempfile.TemporaryDirectory() as folder:
        output = options.output or Path(folder) / "demo"
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
        report = quantizer.compress_with(model, windows, source=source, device=device)
        quantizer.save(model, folder, quantizer.tokenizer or source.tokenizer())
    if options.report is not None:
        report.save(options.report)
    return report


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


def _check_file(path: Path | None) -> None:
    if path is not None and not path.absolute().parent.is_dir():
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
        found = dataclasses.asdict(perplexity(model, windows.tokens, batch_size=batch_size, progress=True))
        return {**found, "parameters": count_parameters(model)}
    found = dataclasses.asdict(fidelity(model, reference, windows.tokens, batch_size=batch_size, progress=True))
    return {**found, "parameters": count_parameters(model), "reference_parameters": count_parameters(reference)}


def _evaluation_text(source: Source, model_config: Any) -> Any:
    record = getattr(model_config, "modegpt", None) or {}
    is_demo = source.is_demo or record.get("base_model") == DEMO
    return demo.EVALUATION_TEXT if is_demo else ModeGPTConfig.dataset


def _compare(folder: Path, options: Namespace) -> None:
    """Reloads what was saved, and shows it beside the dense model."""
    source, device = Source(str(folder)), pick_device(options.device)
    tokenizer = source.tokenizer()
    dense, small = (load_model(each, "auto").to(device) for each in (_source(options), source))
    windows = evaluation_windows(
        demo.EVALUATION_TEXT,
        tokenizer,
        sequence_length=resolve_sequence_length(None, context_of(small.config)),
        max_windows=DEMO_WINDOWS,
    )
    result = scores(small, dense, windows, None)
    print(f"\nreloaded, on {result['tokens']:,} tokens of text that was not used before:")
    print(scores_table(result))
    opening = "".join(re.findall(r"\s*\S+", demo.EVALUATION_TEXT.read_text(encoding="utf-8"))[:PROMPT_WORDS])
    prompt = tokenizer(opening, return_tensors="pt").input_ids.to(device)
    print(f"\nboth go on from: {opening}")
    for name, model in (("dense", dense), ("compressed", small)):
        written = model.generate(prompt, max_new_tokens=SAMPLE_TOKENS, do_sample=False)
        print(f"{name:>10}: {tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)}")
