"""Measure GGUF files in llama.cpp: their size, their perplexity, and their speed relative to the first file.

python tests/benchmarks/gguf_files.py DENSE.gguf SMALL.gguf … --tokenizer DIR --text FILE [--quantize q4_0]

The windows of the text are those of `scoreboard.py`. The files take turns in each repeat, and each ratio compares two
times of the same repeat. `--quantize` also measures copies of the files that llama.cpp's own quantizer writes. Needs
`llama-cpp-python`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import llama_cpp
import torch
from machine import machine
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoTokenizer

from optimum_modegpt.calibration.data import evaluation_windows
from optimum_modegpt.evaluation.perplexity import exponential
from optimum_modegpt.evaluation.speed import Spread

TYPES = {"q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    text = evaluation_windows(
        str(options.text), tokenizer, sequence_length=options.sequence_length, max_windows=options.max_windows
    )
    with tempfile.TemporaryDirectory() as folder:
        files = list(options.files)
        for name in options.quantize:
            files += [quantize(file, Path(folder), name) for file in options.files]
        rows = {file.stem: {"bytes": file.stat().st_size} | measured(file, text.tokens, options) for file in files}
        for group in (files[start : start + len(options.files)] for start in range(0, len(files), len(options.files))):
            for file, speed in zip(group, speeds(group, text.tokens[0].tolist(), options), strict=True):
                rows[file.stem] |= speed
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine("cpu"), "rows": rows}, indent=2) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="GGUF files, the dense one first")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="folder with the tokenizer")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="text for the perplexity")
    parser.add_argument("--quantize", nargs="+", default=[], choices=TYPES, metavar="TYPE", help=", ".join(TYPES))
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens per window")
    parser.add_argument("--max-windows", type=int, default=48, help="windows of the text")
    parser.add_argument("--prompt-length", type=int, default=256, help="tokens of the prompt whose time is measured")
    parser.add_argument("--new-tokens", type=int, default=32, help="decoding steps whose time is measured")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each time")
    parser.add_argument("--threads", type=int, default=2, help="threads of llama.cpp")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    return parser.parse_args(arguments)


def quantize(file: Path, folder: Path, name: str) -> Path:
    """Write a copy of a GGUF file with weights of 4 bits, by llama.cpp's quantizer."""
    path = folder / f"{file.stem}-{name}.gguf"
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = TYPES[name]
    failed = llama_cpp.llama_model_quantize(str(file).encode(), str(path).encode(), ctypes.pointer(parameters))
    if failed:
        raise RuntimeError(f"llama.cpp did not quantize {file} to {name}; its error is above.")
    return path


@contextmanager
def running(file: Path, options: argparse.Namespace, *, logits: bool) -> Iterator[Any]:
    """Load a file in llama.cpp. With `logits`, every position of a text has its own."""
    context = max(options.sequence_length, options.prompt_length + options.new_tokens)
    engine = llama_cpp.Llama(
        str(file),
        n_ctx=context,
        n_batch=context,
        n_threads=options.threads,
        n_threads_batch=options.threads,
        logits_all=logits,
        verbose=False,
    )
    try:
        yield engine
    finally:
        engine.close()


def measured(file: Path, windows: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Compute the perplexity of a file on windows (windows, tokens)."""
    nats = 0.0
    with running(file, options, logits=True) as engine:
        for window in tqdm(windows, desc=file.stem, unit="window"):
            engine.reset()
            engine.eval(window.tolist())
            logits = torch.from_numpy(engine.scores[: len(window) - 1])
            nats += float(cross_entropy(logits, window[1:], reduction="sum"))
    return {"perplexity": exponential(nats, windows[:, 1:].numel())}


def speeds(files: list[Path], prompt: list[int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the tokens per second of prompts and of new tokens, and both relative to the first file."""
    prompt = prompt[: options.prompt_length]
    times: list[list[tuple[float, float]]] = []
    for repeat in tqdm(range(options.repeats + 1), desc="speed", unit="repeat"):
        found = []
        for file in files:
            with running(file, options, logits=False) as engine:
                found.append(seconds(engine, prompt, options.new_tokens))
        if repeat:  # the first is a warm-up, which reads the files from disk
            times.append(found)
    rows = []
    for index in range(len(files)):
        row: dict[str, Any] = {}
        for step, (name, tokens) in enumerate((("prefill", len(prompt)), ("decode", options.new_tokens))):
            row[name] = asdict(Spread.of(tokens / repeat[index][step] for repeat in times))
            row[f"{name}_ratio"] = asdict(Spread.of(repeat[0][step] / repeat[index][step] for repeat in times))
        rows.append(row)
    return rows


def seconds(engine: Any, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """Return the seconds for the prompt and for the new tokens after it."""
    engine.eval(prompt)  # the first call allocates memory
    engine.reset()
    start = time.perf_counter()
    engine.eval(prompt)
    middle = time.perf_counter()
    for _ in range(new_tokens):
        engine.eval(prompt[-1:])
    return middle - start, time.perf_counter() - middle


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| file | MB | perplexity | prompt, tokens/s | new tokens/s | prompt | new tokens |", "|" + "---|" * 7]
    for name, row in rows.items():
        rates = f"{row['prefill']['median']:.0f} | {row['decode']['median']:.0f}"
        ratios = " | ".join(
            "{median:.2f}× ({low:.2f} to {high:.2f})".format(**row[key]) for key in ("prefill_ratio", "decode_ratio")
        )
        lines.append(f"| {name} | {row['bytes'] / 1e6:.1f} | {row['perplexity']:.2f} | {rates} | {ratios} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
