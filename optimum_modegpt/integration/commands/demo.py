"""`demo`: the whole job on the embedded model."""

from __future__ import annotations

import re
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from optimum_modegpt import demo
from optimum_modegpt.calibration.data import evaluation_windows, resolve_sequence_length
from optimum_modegpt.integration.commands.common import models_on, source_of
from optimum_modegpt.integration.commands.compress import LEGEND, compress_to
from optimum_modegpt.integration.commands.evaluate import scores
from optimum_modegpt.integration.reading import pick_device
from optimum_modegpt.integration.source import Source, context_of
from optimum_modegpt.integration.tables import scores_table

DEMO_WINDOWS = 64
PROMPT_WORDS, SAMPLE_TOKENS = 12, 48


def run(options: Namespace) -> None:
    """The whole job on the embedded model: compress, save, reload, evaluate before and after, generate."""
    with tempfile.TemporaryDirectory() as folder:
        output = options.output or Path(folder) / "demo"
        print("1. compress the embedded model")
        print(LEGEND)
        print(compress_to(output, options, pick_device(options.device)).summary())
        _compare(output, options)
    where = "a temporary folder; keep it with --output DIR" if options.output is None else str(output)
    print(f"\nThe compressed model was saved in {where}.")


def _compare(folder: Path, options: Namespace) -> None:
    """Reloads what was saved, and shows it beside the dense model."""
    small, dense = models_on(pick_device(options.device), "auto", Source(str(folder)), source_of(options))
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
