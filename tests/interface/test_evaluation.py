"""Test perplexity, fidelity, inspection and estimate against direct calculations."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import RECIPE, save_dense
from tiny_models import compressed, dense, fill, tokenizer, tokens
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from optimum_modegpt import (
    AlreadyCompressed,
    EvaluationError,
    InvalidConfig,
    ModeGPTConfig,
    UnsupportedModel,
    fidelity,
    perplexity,
)
from optimum_modegpt.budget.estimate import estimate, on_meta
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.compress import compress
from optimum_modegpt.evaluation import perplexity as scoring
from optimum_modegpt.evaluation.fidelity import check_tokenizers
from optimum_modegpt.evaluation.inspection import inspection
from optimum_modegpt.loading.safetensors_index import read_headers
from optimum_modegpt.loading.source import Source
from optimum_modegpt.report import count_parameters


def log_probabilities(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Compute log-probabilities (windows, length − 1, vocabulary), one window at a time, in float64."""
    with torch.no_grad():
        logits = torch.cat([model(window[None]).logits for window in windows])
    return logits[:, :-1].double().log_softmax(-1)


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return tokens(batch=5, length=16)


@pytest.mark.parametrize("batch_size", [None, 1, 2, 64])
def test_perplexity_is_exp_of_the_mean_nats(windows: Tensor, batch_size: int | None) -> None:
    model = dense("llama-gqa-tied")
    found = perplexity(model, windows, batch_size=batch_size)
    nats = -log_probabilities(model, windows).gather(-1, windows[:, 1:, None])
    assert found.tokens == 5 * 15
    assert found.perplexity == pytest.approx(float(nats.mean().exp()), rel=1e-6)


def test_chunks_do_not_change_the_result(windows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = dense("qwen2"), dense("qwen2", seed=1)
    whole = fidelity(model, reference, windows)
    monkeypatch.setattr(scoring, "CHUNK_BYTES", 4 * 260 * 7)
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 1)
    parts = fidelity(model, reference, windows)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-6)
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert parts.top1_agreement == whole.top1_agreement


def test_fidelity_is_the_divergence_from_the_reference(windows: Tensor) -> None:
    model, reference = compressed("llama-gqa-tied"), dense("llama-gqa-tied")
    found = fidelity(model, reference, windows)
    ours, theirs = log_probabilities(model, windows), log_probabilities(reference, windows)
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    assert found.kl == pytest.approx(float(kl), rel=1e-5)
    assert found.top1_agreement == pytest.approx(float(agreement))
    assert found.perplexity == pytest.approx(perplexity(model, windows).perplexity)
    assert found.reference_perplexity == pytest.approx(perplexity(reference, windows).perplexity)


def test_a_model_agrees_with_itself(windows: Tensor) -> None:
    model = dense("opt")
    found = fidelity(model, model, windows)
    assert found.kl == pytest.approx(0, abs=1e-7)
    assert found.top1_agreement == 1


def test_the_models_mode_is_restored_and_dropout_is_off(windows: Tensor) -> None:
    model = dense("opt", dropout=0.5)
    expected = perplexity(model, windows)
    model.train()
    assert perplexity(model, windows) == expected
    assert model.training


def test_a_loss_beyond_the_largest_float_is_infinite() -> None:
    assert scoring.exponential(1e6, 1) == math.inf


def test_weights_that_are_not_finite_are_an_error(windows: Tensor) -> None:
    model = dense("llama-gqa-tied")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(EvaluationError, match="loss on this text is nan"):
        perplexity(model, windows)
    with pytest.raises(EvaluationError, match="divergence from the reference is nan"):
        fidelity(model, dense("llama-gqa-tied"), windows)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (tokens(batch=1, length=65), "65 tokens are longer than the model's context of 64"),
        (torch.full((1, 8), 260), "token ids up to 260, but the model's vocabulary has 260 tokens"),
        (torch.zeros(1, 1, dtype=torch.int64), r"found \(1, 1\)"),
        (torch.zeros(0, 8, dtype=torch.int64), r"found \(0, 8\)"),
    ],
)
def test_windows_that_do_not_fit_are_refused(found: Tensor, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        perplexity(dense("llama-gqa-tied"), found)


def test_an_empty_batch_is_refused(windows: Tensor) -> None:
    with pytest.raises(EvaluationError, match="batch_size must be at least 1 or None, found 0"):
        perplexity(dense("opt"), windows, batch_size=0)


def test_different_vocabularies_are_refused(windows: Tensor) -> None:
    with pytest.raises(EvaluationError, match="predicts 260 tokens, the reference 300"):
        fidelity(dense("llama-gqa-tied"), dense("llama-gqa-tied", vocab_size=300), windows)
    other = tokenizer()
    other.add_tokens(["<new>"])
    check_tokenizers(tokenizer(), tokenizer())
    with pytest.raises(EvaluationError, match="differ in 1 tokens"):
        check_tokenizers(tokenizer(), other)


# ------------------------------------------------------------------------------------------------------------- inspect


@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-mqa-biases", "opt"])
@pytest.mark.parametrize("shard", ["1GB", "10KB"])
def test_inspection_counts_the_stored_weights(name: str, shard: str, tmp_path: Path) -> None:
    model, original = compressed(name), dense(name)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "10KB")
    found = inspection(AutoConfig.from_pretrained(tmp_path), read_headers(Source(str(tmp_path))))
    assert found.parameters == count_parameters(model)
    assert found.record == model.config.modegpt
    assert [block.ranks for block in found.blocks] == [
        {"mlp": widths.mlp, "qk": widths.qk, "vo": widths.vo} for widths in model.config.widths()
    ]
    assert found.blocks[0].dense_ranks == {"mlp": 48, "qk": 8, "vo": 8}
    assert found.sparsity == pytest.approx(1 - block_weights(model) / block_weights(original))


def block_weights(model: PreTrainedModel) -> int:
    """Count the weights of the projections of all blocks."""
    return sum(p.numel() for name, p in model.named_parameters() if "layers." in name and p.ndim == 2)


@pytest.mark.parametrize("name", ["qwen3_moe-dense-layers-biases", "gpt_oss"])
def test_inspection_counts_the_weights_of_experts(name: str, tmp_path: Path) -> None:
    model = dense(name)
    config = ModeGPTConfig(sparsity=0.3, method="paper", allocation="uniform")
    report = compress(model, config, TokenWindows(tokens(10, 16), {}), device="cpu", progress=False)
    model.save_pretrained(tmp_path)
    headers = read_headers(Source(str(tmp_path)))
    assert inspection(model.config, headers).sparsity == pytest.approx(report.achieved_sparsity)
    packed = "model.layers.1.mlp.experts.down_proj"
    for shape in (None, (4, 32, 1)):
        edited = {key: header for key, header in headers.items() if key != packed}
        if shape is not None:
            edited[packed] = replace(headers[packed], shape=shape)
        with pytest.raises(EvaluationError, match=r"1\.mlp\.experts\.down_proj is (missing|.* should have)"):
            inspection(model.config, edited)


def test_a_dense_checkpoint_is_counted_too(tmp_path: Path) -> None:
    save_dense(tmp_path)
    found = inspection(AutoConfig.from_pretrained(tmp_path), read_headers(Source(str(tmp_path))))
    assert found.model_type == "llama"
    assert found.parameters == count_parameters(dense("llama-gqa-tied"))
    assert found.blocks == ()
    assert found.record is None


@pytest.mark.parametrize("content", [None, b"not weights"])
def test_a_folder_without_readable_weights_is_an_error(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(EvaluationError, match="no readable safetensors"):
        read_headers(Source(str(tmp_path)))


# ------------------------------------------------------------------------------------------------------------ estimate


def test_the_estimate_counts_without_weights() -> None:
    model = on_meta(AutoModelForCausalLM, dense("llama-mha").config)
    assert all(parameter.is_meta for parameter in model.parameters())
    found = estimate(model, ModeGPTConfig(**RECIPE), 32)
    assert found.parameters == count_parameters(dense("llama-mha"))
    assert found.block_parameters == block_weights(dense("llama-mha"))
    assert found.calibration_tokens == 8 * 32
    blocks, stream = found.block_parameters * 4, found.calibration_tokens * 32 * 4
    assert found.disk == {
        "finished blocks": int(0.7 * blocks),
        "residual streams": stream,
        "result, or the next streams": max(found.result.bytes, stream),
    }
    assert found.result.bytes == pytest.approx(found.parameters * 4 - 0.3 * blocks, rel=0.01)
    sums = found.to_dict()
    assert sums["with_accelerator_device_total"] == sum(found.with_accelerator.needs.device.values())
    assert sums["disk_total"] == sum(found.disk.values())


def grown(**changes: Any) -> Any:
    values = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    return on_meta(AutoModelForCausalLM, LlamaConfig(**{**values, **changes}, vocab_size=64))


def test_device_memory_does_not_grow_with_depth() -> None:
    recipe = ModeGPTConfig(num_samples=8)
    # Models with few blocks use more windows for the gradients.
    shallow, deep = (estimate(grown(num_hidden_layers=layers), recipe, 32) for layers in (20, 200))
    assert deep.with_accelerator.needs.device == shallow.with_accelerator.needs.device
    assert deep.forward_multiply_adds == 10 * shallow.forward_multiply_adds
    gradients = [each.with_accelerator.needs.host["gradients"] for each in (shallow, deep)]
    assert gradients[1] == 10 * gradients[0], "gradients at every block are in the storage of the streams"
    wide = estimate(grown(num_hidden_layers=20, intermediate_size=256), recipe, 32)
    wider, before = (sum(each.with_accelerator.needs.device.values()) for each in (wide, shallow))
    assert wider > before


def test_the_default_method_takes_more_work_than_the_published_one() -> None:
    default, paper = (estimate(grown(), ModeGPTConfig(method=method), 32) for method in ("default", "paper"))
    assert default.forward_passes.keys() - paper.forward_passes.keys() == {
        "gradients",
        "sensitivities",
        "final gain",
        "refit of gate and up",
    }
    assert default.forward_passes["residual streams"] == 2 * paper.forward_passes["residual streams"]


def test_the_estimate_refuses_the_same_as_compress() -> None:
    with pytest.raises(AlreadyCompressed):
        estimate(fill(compressed("opt")), ModeGPTConfig(), 32)
    other = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    model = on_meta(AutoModelForCausalLM, other)
    with pytest.raises(InvalidConfig, match=r"sparsity=0\.9 cannot be reached: .* round_to=64"):
        estimate(grown(), ModeGPTConfig(sparsity=0.9, round_to=64), 32)
    model.config.model_type = "unheard-of"
    with pytest.raises(UnsupportedModel, match="unheard-of"):
        estimate(model, ModeGPTConfig(), 32)
