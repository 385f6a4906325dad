"""`compare`: a compressed model beside the dense one, prompt by prompt; thresholds decide the exit code."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optimum_modegpt import demo
from optimum_modegpt.comparison.compare import compare as compare_models
from optimum_modegpt.comparison.page import comparison_page
from optimum_modegpt.comparison.prompts import Prompt, read_prompts
from optimum_modegpt.comparison.records import Comparison, PromptComparison
from optimum_modegpt.comparison.thresholds import Check, Thresholds
from optimum_modegpt.errors import EvaluationError, OutputError
from optimum_modegpt.integration.commands.common import (
    add_access,
    add_device,
    add_tokenizer,
    check_file,
    count,
    models_on,
    path,
    reference_of,
    shared_tokenizer,
    shows_progress,
    source_of,
    write_json,
)
from optimum_modegpt.integration.reading import load_config, pick_device
from optimum_modegpt.integration.source import Source, check_vocabulary

BROKEN = 1
"""Exit code where a threshold does not hold."""
DEMO_PROMPTS, DEMO_WORDS = 64, 24
"""Openings of pages of the embedded text that serve as prompts of the demo."""


def add(verbs: Any) -> None:
    """Declares the arguments."""
    text = "How COMPRESSED differs from DENSE, prompt by prompt; thresholds decide the exit code."
    parser = verbs.add_parser("compare", help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument("reference", metavar="DENSE", help="name on the Hub, folder, or demo for the embedded model")
    parser.add_argument("model", metavar="COMPRESSED", help="name on the Hub, or folder")
    add_access(parser, "COMPRESSED")
    parser.add_argument(
        "--prompts",
        type=path,
        metavar="FILE",
        help='.txt: a prompt each line; .jsonl: {"prompt": …}, {"text": …} or {"messages": […]} each line; .json: a '
        "list of these or of strings. Left out, the demo takes its own text",
    )
    parser.add_argument("--max-new-tokens", type=count, default=48, metavar="N", help="of a continuation; default 48")
    add_tokenizer(parser, "that of the models")
    add_device(parser)
    limits = parser.add_argument_group(
        "thresholds", f"Exit code {BROKEN} where one is broken, 0 where all hold or none is set, 2 for an error."
    )
    limits.add_argument("--max-kl", type=float, metavar="X", help="most mean KL divergence, nats per position")
    limits.add_argument("--min-agreement", type=float, metavar="X", help="least top-1 agreement, a fraction")
    limits.add_argument("--max-perplexity-ratio", type=float, metavar="X", help="most perplexity over that of DENSE")
    files = parser.add_argument_group("files")
    files.add_argument("--html", type=path, metavar="FILE", help="write the comparison as one page that stands alone")
    files.add_argument("--jsonl", type=path, metavar="FILE", help="write a record a prompt as soon as it is measured")
    files.add_argument("--json", type=path, metavar="FILE", help="write everything at the end")


def run(options: Namespace) -> int:
    """Prints the comparison and the thresholds; 1 where one is broken.

    Raises:
        EvaluationError: a threshold cannot be judged; the comparison was printed and written all the same.
    """
    thresholds = Thresholds(options.max_kl, options.min_agreement, options.max_perplexity_ratio)
    _check_files(options.prompts, [options.html, options.jsonl, options.json])
    source, reference = source_of(options), reference_of(options)
    assert reference is not None
    prompts, device = _prompts(options.prompts, reference), pick_device(options.device)
    # Before their tokenizers: transformers reads these by the configuration, and trips over a broken one.
    configs = [load_config(each) for each in (reference, source)]
    _check_order(options, *(getattr(config, "modegpt", None) is not None for config in configs))
    tokenizer = shared_tokenizer(options.tokenizer, source, reference, allow_foreign=options.allow_foreign_tokenizer)
    check_vocabulary(tokenizer, configs[-1].get_text_config().vocab_size)
    model, dense = models_on(device, options.dtype, source, reference)
    assert dense is not None
    with _streaming(options.jsonl) as on_record:
        found = compare_models(
            model,
            dense,
            tokenizer,
            prompts,
            max_new_tokens=options.max_new_tokens,
            on_record=on_record,
            progress=shows_progress(),
        )
    print(found.summary())
    try:
        checks = found.check(thresholds)
    except EvaluationError:
        _write(options, found, ())
        raise
    for check in checks:
        print(check)
    _write(options, found, checks)
    return 0 if all(check.held for check in checks) else BROKEN


def _check_order(options: Namespace, first_is_compressed: bool, second_is_compressed: bool) -> None:
    """Refuses a compressed model before a dense one: every threshold would be held to the wrong model."""
    if first_is_compressed and not second_is_compressed:
        raise EvaluationError(
            f"{options.reference} is a compressed model and {options.model} a dense one; the dense one comes first: "
            f"compare {options.model} {options.reference}"
        )


def _check_files(prompts: Path | None, written: list[Path | None]) -> None:
    """Refuses files that cannot be written, and one file for two purposes."""
    used = [] if prompts is None else [prompts.resolve()]
    for file in filter(None, written):
        check_file(file)
        if file.resolve() in used:
            raise OutputError(f"{file} is named twice; prompts and each result need a file of their own.")
        used.append(file.resolve())


def _write(options: Namespace, found: Comparison, checks: tuple[Check, ...]) -> None:
    names = {"model": options.model, "reference": options.reference}
    outcomes = [
        {"measure": each.measure, "found": each.found, "allowed": each.allowed, "held": each.held} for each in checks
    ]
    write_json(options.json, {**names, "thresholds": outcomes, **found.to_dict()})
    if options.html is not None:
        options.html.write_text(comparison_page(found, checks, **names), encoding="utf-8")
        print(f"page: {options.html}")


def _prompts(file: Path | None, reference: Source) -> list[Prompt]:
    if file is not None:
        return read_prompts(file)
    if not reference.is_demo:
        raise EvaluationError(
            "--prompts is missing: name a .txt, .jsonl or .json file with prompts such as the model will be served."
        )
    pages = demo.EVALUATION_TEXT.read_text(encoding="utf-8").split("\n\n")[:DEMO_PROMPTS]
    return ["".join(re.findall(r"\s*\S+", page)[:DEMO_WORDS]) for page in pages]


@contextmanager
def _streaming(file: Path | None) -> Iterator[Callable[[PromptComparison], None] | None]:
    """A function that writes a record as a line at once, for whoever follows the file.

    Raises:
        KeyboardInterrupt: interrupted; the message names the file, which stays.
    """
    if file is None:
        yield None
        return
    with file.open("w", encoding="utf-8") as lines:
        try:
            yield lambda record: print(json.dumps(record.to_dict()), file=lines, flush=True)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{file} holds the prompts that were measured.") from None
