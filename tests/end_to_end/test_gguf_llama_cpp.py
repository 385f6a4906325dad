"""GGUF files in llama.cpp itself, if `llama-cpp-python` is installed: logits, greedy text and tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gguf import UNEVEN, stock_llama
from tiny_models import compressed, dense, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_modegpt import ModeGPTConfig, perplexity
from optimum_modegpt.calibration.data import evaluation_windows
from optimum_modegpt.demo import CALIBRATION_TEXT, EVALUATION_TEXT, MODEL_DIR
from optimum_modegpt.export.gguf import export_gguf
from optimum_modegpt.export.gguf_tokenizer import SAMPLE
from optimum_modegpt.modeling.modegpt_family import Widths

pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")
gguf_files = pytest.importorskip("gguf_files")

GELU_TABLE = 5e-3
"""Tolerance for Gemma: llama.cpp reads its activation from a table of 16-bit values."""


@contextmanager
def running(path: Path) -> Iterator[Any]:
    """Load a file with a cache in float32."""
    engine = llama_cpp.Llama(
        str(path), n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, type_k=0, type_v=0, verbose=False
    )
    try:
        yield engine
    finally:
        engine.close()


def logits_of(engine: Any, ids: list[int]) -> Tensor:
    engine.reset()
    engine.eval(ids)
    return torch.tensor(engine.scores[: len(ids)])


@pytest.mark.parametrize(
    ("make", "architecture", "tolerance"),
    [
        (lambda: dense("llama-gqa-tied"), "llama", 2e-4),
        (lambda: compressed("llama-gqa-tied"), "deci", 2e-4),
        (lambda: compressed("llama-mqa-biases"), "deci", 2e-4),
        (lambda: compressed("mistral-head-dim"), "deci", 2e-4),
        (stock_llama, "llama", 2e-4),
        (lambda: dense("qwen2"), "qwen2", 2e-4),
        (lambda: compressed("qwen2"), "deci", 2e-4),
        (lambda: compressed("qwen2", widths=[Widths(6, 5, 32)] * 3), "qwen2", 2e-4),
        (lambda: dense("qwen3"), "qwen3", 2e-4),
        (lambda: compressed("qwen3", widths=UNEVEN), "openelm", 2e-4),
        (lambda: compressed("gemma3_text", widths=[Widths(12, 7, 32)] * 3), "gemma3", GELU_TABLE),
        (lambda: dense("gemma4_text"), "gemma4", GELU_TABLE),
        (lambda: compressed("gemma4_text"), "gemma4", GELU_TABLE),
    ],
)
def test_llama_cpp_computes_the_logits_of_the_model(
    make: Any, architecture: str, tolerance: float, tmp_path: Path
) -> None:
    model, ids = make(), tokens(1, 40)
    report = export_gguf(model, None, tmp_path / "model.gguf", "f32")
    assert report.architecture == architecture
    with running(report.path) as engine:
        found = logits_of(engine, ids[0].tolist())
    torch.testing.assert_close(found, model(ids).logits[0], rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def narrow_demo() -> PreTrainedModel:
    """The trained demo model with other widths in every block."""
    texts = CALIBRATION_TEXT.read_text().splitlines()
    config = ModeGPTConfig(sparsity=0.2, method="paper", allocation="influence", dataset=texts, num_samples=8)
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, compression_config=config).eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 1e-3), ("f16", 0.1), ("bf16", 0.5), ("q8_0", 1.0)])
def test_a_compressed_model_writes_the_same_text_in_llama_cpp(
    narrow_demo: PreTrainedModel, dtype: Any, tolerance: float, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    report = export_gguf(narrow_demo, tokenizer, tmp_path / "model.gguf", dtype)
    assert report.architecture == "deci"
    prompt = EVALUATION_TEXT.read_text()[:200]
    ids = tokenizer(prompt)["input_ids"]
    with running(report.path) as engine:
        assert engine.tokenize(prompt.encode(), special=True) == ids
        found = logits_of(engine, ids)
        torch.testing.assert_close(found, narrow_demo(torch.tensor([ids])).logits[0], rtol=0, atol=tolerance)
        if dtype == "f32":
            assert greedy(engine, ids, 64) == generated(narrow_demo, ids, 64)


def greedy(engine: Any, ids: list[int], count: int) -> list[int]:
    """Continue a text by the most probable tokens in llama.cpp."""
    engine.reset()
    engine.eval(ids)
    result: list[int] = []
    for _ in range(count):
        result.append(int(engine.scores[engine.n_tokens - 1].argmax()))
        engine.eval(result[-1:])
    return result


def generated(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """Continue a text by the most probable tokens in transformers."""
    prompt = torch.tensor([ids])
    whole = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        eos_token_id=None,
    )
    return whole[0, len(ids) :].tolist()


def test_the_benchmark_of_files_measures_them_and_their_quantised_copies(
    narrow_demo: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    files = [tmp_path / "dense.gguf", tmp_path / "narrow.gguf"]
    for model, path in zip((AutoModelForCausalLM.from_pretrained(MODEL_DIR), narrow_demo), files, strict=True):
        export_gguf(model, tokenizer, path, "f32")
    few = ("--sequence-length", 64, "--max-windows", 2, "--prompt-length", 16, "--new-tokens", 4, "--repeats", 2)
    settings = ("--tokenizer", MODEL_DIR, "--text", EVALUATION_TEXT, "--quantize", "q4_0", *few)
    gguf_files.main([*map(str, (*files, *settings, "--json", tmp_path / "results.json"))])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert list(rows) == ["dense", "narrow", "dense-q4_0", "narrow-q4_0"]
    windows = evaluation_windows(str(EVALUATION_TEXT), tokenizer, sequence_length=64, max_windows=2)
    expected = perplexity(narrow_demo, windows.tokens).perplexity
    assert rows["narrow"]["perplexity"] == pytest.approx(expected, rel=1e-3)
    assert rows["narrow-q4_0"]["bytes"] < rows["narrow"]["bytes"]
    assert rows["dense-q4_0"]["decode_ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert f"| narrow | {rows['narrow']['bytes'] / 1e6:.1f} | {expected:.2f} |" in capsys.readouterr().out


def test_llama_cpp_tokenizes_as_the_tokenizer_does(tmp_path: Path) -> None:
    for index, source in enumerate(trained_tokenizers()):
        path = tmp_path / f"{index}.gguf"
        export_gguf(dense("llama-mha", vocab_size=len(source)), source, path)
        engine = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        for text in (SAMPLE, " leading", "trailing ", "don't DON'T 1234567"):
            assert engine.tokenize(text.encode(), special=True) == source(text)["input_ids"], (index, text)
        engine.close()


def trained_tokenizers() -> Iterator[Any]:
    """Byte-level BPE with the pre-tokenizers of three families, and a unigram model, trained on the demo text."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from optimum_modegpt.export.gguf_tokenizer import PRE_TOKENIZERS

    texts = CALIBRATION_TEXT.read_text().splitlines()[:300]
    special = ["<s>", "</s>", "<unk>"]
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    for _, ignore_merges, parts in PRE_TOKENIZERS:
        backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
        splits = [
            pre_tokenizers.Digits(individual_digits=True)
            if part["type"] == "Digits"
            else pre_tokenizers.Split(Regex(part["pattern"]["Regex"]), "isolated")
            for part in parts[:-1]
        ]
        bytes_last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=parts[-1]["use_regex"])
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_last])
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(
            texts,
            trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
        )
        yield PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    backend = Tokenizer(models.Unigram())
    spaces = normalizers.Replace(Regex(" {2,}"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.Strip(left=False), spaces])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(
        texts,
        trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    yield PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **names)
