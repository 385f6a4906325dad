"""`demo`: run all steps on the embedded model."""

from __future__ import annotations

import re
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from optimum_modegpt import demo
from optimum_modegpt.calibration.data import evaluation_windows, resolve_sequence_length
from optimum_modegpt.cli.commands import common
from optimum_modegpt.cli.commands.compress import LEGEND, compress_to
from optimum_modegpt.cli.commands.evaluate import scores
from optimum_modegpt.cli.tables import scores_table
from optimum_modegpt.evaluation.perplexity import context_of
from optimum_modegpt.evaluation.speed import benchmark
from optimum_modegpt.loading.models import pick_device
from optimum_modegpt.loading.safetensors_index import weight_bytes
from optimum_modegpt.loading.source import Source

WINDOWS = 64
PROMPT_WORDS, SAMPLE_TOKENS = 12, 120


def run(options: Namespace) -> None:
    """Compress the embedded model, save and reload it, evaluate it before and after, and generate text."""
    with tempfile.TemporaryDirectory() as folder:
        output = options.output or Path(folder) / "demo"
        print("1. compress the embedded model")
        print(LEGEND)
        print(compress_to(output, options, common.configuration(options), pick_device(options.device)).summary())
        compare(output, options)
    print(f"\nnext, a model of your own: {options.program} compress MODEL --sparsity 0.2 --output DIR")
    if options.output is not None:
        print(f"The compressed model was saved in {output}.")


def compare(folder: Path, options: Namespace) -> None:
    """Reload the saved model and compare it with the dense one."""
    small, dense = common.models_on(pick_device(options.device), "auto", Source(str(folder)), common.source_of(options))
    assert dense is not None
    tokenizer = Source(str(folder)).tokenizer()
    length = resolve_sequence_length(None, context_of(small.config))
    windows = evaluation_windows(demo.EVALUATION_TEXT, tokenizer, sequence_length=length, max_windows=WINDOWS)
    result = scores(small, dense, windows, None)
    print(f"\n2. reload and evaluate, on {result['tokens']:,} tokens of text that was not used before")
    print(scores_table(result))
    print_samples(small, dense, tokenizer)
    speed = benchmark(small, dense, batch_sizes=(8,), prompt_lengths=(128,), new_tokens=32).rows[0]
    before, after = result["reference_parameters"], result["parameters"]
    large, little = weight_bytes(demo.MODEL_DIR) or 0, weight_bytes(folder) or 0
    print("\n4. verdict")
    print(f"size: {before:,} -> {after:,} parameters, {1 - after / before:.0%} fewer; ", end="")
    print(f"{large / 1e6:.1f} -> {little / 1e6:.1f} MB on disk")
    if speed.prefill_ratio is not None and speed.decode_ratio is not None:
        print(f"speed: reads a prompt {speed.prefill_ratio.median:.2f} and writes ", end="")
        print(f"{speed.decode_ratio.median:.2f} times as fast (larger models gain more)")
    print(f"quality: perplexity {result['reference_perplexity']:.2f} -> {result['perplexity']:.2f} on unseen text")


def print_samples(small: PreTrainedModel, dense: PreTrainedModel, tokenizer: Any) -> None:
    """Print the continuations that both models write to the first words of the evaluation text."""
    opening = "".join(re.findall(r"\s*\S+", demo.EVALUATION_TEXT.read_text(encoding="utf-8"))[:PROMPT_WORDS])
    prompt = tokenizer(opening, return_tensors="pt").input_ids.to(small.device)
    print(f"\n3. generate {SAMPLE_TOKENS} tokens, greedy, after this opening:\n\n{opening}")
    for name, model in (("dense", dense), ("compressed", small)):
        written: Any = model.generate(  # pyright: ignore[reportCallIssue]
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=SAMPLE_TOKENS, do_sample=False
        )
        text = tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)
        print(f"\n--- {name}:{whole_sentences(text)}")


def whole_sentences(text: str) -> str:
    """Return the text up to the end of its last full sentence; all of it if it has none."""
    found = re.match(r""".*(?<!\bMr)(?<!\bMrs)(?<!\bDr)[.!?]["']?(?=\s|$)""", text, flags=re.DOTALL)
    return found.group() if found else text
