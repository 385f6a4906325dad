"""`compare`: compare a compressed model with the dense one prompt by prompt; thresholds determine the exit code."""

from __future__ import annotations

import json
import re
import shlex
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from optimum_modegpt import demo
from optimum_modegpt.cli.arguments import BROKEN
from optimum_modegpt.cli.commands import common
from optimum_modegpt.comparison.compare import compare as compare_models
from optimum_modegpt.comparison.page import comparison_page
from optimum_modegpt.comparison.prompts import Prompt, read_prompts
from optimum_modegpt.comparison.records import Comparison, PromptComparison
from optimum_modegpt.comparison.thresholds import Check, Thresholds
from optimum_modegpt.errors import EvaluationError, OutputError
from optimum_modegpt.layouts.records import is_result
from optimum_modegpt.loading.calibration import check_vocabulary
from optimum_modegpt.loading.models import load_config, pick_device
from optimum_modegpt.loading.source import Source

DEMO_PROMPTS, DEMO_WORDS = 64, 24
"""Number of prompts of the demo, and words in each: the first words of pages of the embedded text."""


def run(options: Namespace) -> int:
    """Print the comparison and the thresholds; return 1 if a threshold is not met, else 0.

    Raises:
        EvaluationError: a threshold cannot be evaluated; the comparison was printed and written nevertheless.
    """
    thresholds = Thresholds(options.max_kl, options.min_agreement, options.max_perplexity_ratio)
    check_files(options)
    source, reference = common.source_of(options), common.reference_of(options)
    assert reference is not None
    prompts, device = prompts_of(options, reference), pick_device(options.device)
    # Loaded before the tokenizers: transformers reads those through the configuration and fails on a broken one.
    dense_config, model_config = load_config(reference), load_config(source)
    if is_result(dense_config) and not is_result(model_config):
        raise EvaluationError(  # every threshold would apply to the dense model
            f"{options.reference} is a compressed model and {options.model} a dense one. Name the dense one first: "
            f"{shlex.join(['compare', options.model, options.reference])}"
        )
    tokenizer = common.shared_tokenizer(
        options.tokenizer, source, reference, allow_foreign=options.allow_foreign_tokenizer
    )
    check_vocabulary(tokenizer, model_config.get_text_config().vocab_size)
    model, dense = common.models_on(device, options.dtype, source, reference)
    assert dense is not None
    with writing_records(options.jsonl) as on_record:
        found = compare_models(
            model,
            dense,
            tokenizer,
            prompts,
            max_new_tokens=options.max_new_tokens,
            on_record=on_record,
            progress=common.shows_progress(),
        )
    print(found.summary())
    try:
        checks = found.check(thresholds)
    except EvaluationError:
        write(options, found, ())
        raise
    for check in checks:
        print(check)
    write(options, found, checks)
    return 0 if all(check.held for check in checks) else BROKEN


def check_files(options: Namespace) -> None:
    """Raise an error if a file cannot be written or is named for two purposes."""
    used = []
    for file in (options.prompts, options.html, options.jsonl, options.json):
        if file is None:
            continue
        if file is not options.prompts:
            common.check_file(file)
        if file.resolve() in used:
            raise OutputError(f"{file} is named twice; prompts and each result need separate files.")
        used.append(file.resolve())


def write(options: Namespace, found: Comparison, checks: tuple[Check, ...]) -> None:
    names = {"model": options.model, "reference": options.reference}
    outcomes = [
        {"measure": each.measure, "found": each.found, "allowed": each.allowed, "held": each.held} for each in checks
    ]
    common.write_json(options.json, {**names, "thresholds": outcomes, **found.to_dict()})
    if options.html is not None:
        options.html.write_text(comparison_page(found, checks, **names), encoding="utf-8")
        print(f"page: {options.html}")


def prompts_of(options: Namespace, reference: Source) -> list[Prompt]:
    if options.prompts is not None:
        return read_prompts(options.prompts)
    if not reference.is_demo:
        raise EvaluationError(
            "--prompts is missing. Name a .txt, .jsonl or .json file with prompts like those the model will receive."
        )
    pages = demo.EVALUATION_TEXT.read_text(encoding="utf-8").split("\n\n")[:DEMO_PROMPTS]
    return ["".join(re.findall(r"\s*\S+", page)[:DEMO_WORDS]) for page in pages]


@contextmanager
def writing_records(file: Path | None) -> Iterator[Callable[[PromptComparison], None] | None]:
    """Yield a function that writes a record as a line and flushes it, so that the file can be followed.

    Raises:
        KeyboardInterrupt: interrupted; the message names the file, which is kept.
    """
    if file is None:
        yield None
        return
    with file.open("w", encoding="utf-8") as lines:
        try:
            yield lambda record: print(json.dumps(record.to_dict()), file=lines, flush=True)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{file} contains the prompts measured so far.") from None
