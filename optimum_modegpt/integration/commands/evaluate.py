"""`evaluate`: perplexity on a text; with a reference also the distance from it."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from typing import Any

from transformers import PreTrainedModel

from optimum_modegpt import demo
from optimum_modegpt.calibration.data import TokenWindows, evaluation_windows, resolve_sequence_length
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.evaluation.fidelity import fidelity
from optimum_modegpt.evaluation.perplexity import perplexity
from optimum_modegpt.integration.commands.common import (
    add_device,
    check_file,
    count,
    models_on,
    path,
    reference_of,
    shared_tokenizer,
    shows_progress,
    source_of,
    verb,
    write_json,
)
from optimum_modegpt.integration.reading import load_config, pick_device
from optimum_modegpt.integration.source import (
    DEMO,
    Source,
    check_vocabulary,
    context_of,
    dataset_hub,
)
from optimum_modegpt.integration.tables import scores_table
from optimum_modegpt.report import count_parameters


def add(verbs: Any) -> None:
    """Declares the arguments."""
    parser = verb(verbs, "evaluate", run, "Perplexity of MODEL, and how far it is from a reference.")
    parser.add_argument("--reference", metavar="DENSE", help="model to compare with, usually the dense one")
    parser.add_argument("--dataset", metavar="NAME_OR_FILE", help="text; by default wikitext2, or the demo's own")
    parser.add_argument("--dataset-split", metavar="NAME", help="split to read; by default test, validation or train")
    parser.add_argument("--text-column", metavar="NAME", help="column that holds the text")
    parser.add_argument(
        "--sequence-length", type=int, metavar="N", help="tokens per window; default min(2048, context)"
    )
    parser.add_argument("--max-windows", type=count, metavar="N", help="score the first N windows only")
    parser.add_argument("--batch-size", type=count, metavar="N", help="windows per forward pass; chosen by size")
    parser.add_argument("--tokenizer", metavar="NAME", help="name or folder; by default MODEL's own, else DENSE's")
    parser.add_argument("--json", type=path, metavar="FILE", help="also write the result there")
    add_device(parser)


def run(options: Namespace) -> None:
    """Perplexity on a text; with a reference also the distance from it."""
    check_file(options.json)
    source, reference = source_of(options), reference_of(options)
    device, model_config = pick_device(options.device), load_config(source)
    vocab_size = model_config.get_text_config().vocab_size
    tokenizer = shared_tokenizer(options.tokenizer, source, reference)
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
    model, dense = models_on(device, options.dtype, source, reference)
    result = {"model": options.model, **scores(model, dense, windows, options.batch_size), "text": windows.record}
    write_json(options.json, result)
    print(scores_table(result))


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


def _evaluation_text(source: Source, model_config: Any) -> Any:
    record = getattr(model_config, "modegpt", None) or {}
    is_demo = source.is_demo or record.get("base_model") == DEMO
    return demo.EVALUATION_TEXT if is_demo else ModeGPTConfig.dataset
