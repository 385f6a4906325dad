"""Test generation with key-value caches of different widths: every way gives the tokens of the uncached model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_configs import FAMILIES, VARIANTS
from tiny_models import compressed, dense, tokenizer, tokens
from torch import Tensor
from transformers import ContinuousBatchingConfig, PreTrainedModel, pipeline

from optimum_modegpt.kv_cache import cache_argument, cache_of

EVERY = pytest.mark.parametrize("name", VARIANTS)
FAMILY = pytest.mark.parametrize("name", FAMILIES)
NEW = 8


def generate(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, **options)


def greedy(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Generate without a cache and without `generate`, as a reference."""
    with torch.no_grad():
        for _ in range(NEW):
            scores = model(ids, use_cache=False).logits[:, -1]
            scores[:, 2] = -torch.inf  # the end token, which `generate` does not choose either
            ids = torch.cat((ids, scores.argmax(-1, keepdim=True)), dim=1)
    return ids


@EVERY
def test_cached_generation_matches_uncached_generation(name: str) -> None:
    model, ids = compressed(name), tokens()
    expected = greedy(model, ids)
    assert len(expected[:, -NEW:].unique()) > 1
    assert torch.equal(generate(model, ids), expected)
    assert torch.equal(generate(model, ids, use_cache=False), expected)
    # Compilation would take minutes; test_compile tests the compiled forward pass.
    static = generate(model, ids, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, expected)


@EVERY
def test_cached_logits_match_uncached_logits(name: str) -> None:
    model, ids = compressed(name), tokens(2, 14)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        start, argument = model(ids[:, :9], use_cache=True), cache_argument(model)
        found = [start.logits]
        for position in range(9, 14):
            step = model(ids[:, position : position + 1], **{argument: cache_of(start)}, use_cache=True)
            found.append(step.logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=3e-5, rtol=1e-5)
    cached = cache_of(start).layers
    attentions = [module for module in model.modules() if hasattr(module, "qk_head_dim")]
    assert [(layer.keys.shape[-1], layer.values.shape[-1]) for layer in cached] == [
        (attention.qk_head_dim, attention.v_head_dim) for attention in attentions
    ]


@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-mqa-biases", "opt"])
def test_decoding_step_accepts_a_mask_for_each_head(name: str) -> None:
    model, ids = compressed(name), tokens(2, 10)
    hidden = torch.rand(2, 4, 1, 10, generator=torch.Generator().manual_seed(0)) < 0.3
    mask = torch.zeros(2, 4, 1, 10).masked_fill(hidden, torch.finfo(torch.float32).min)
    found = {}
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            cache = {cache_argument(model): cache_of(model(ids[:, :9], use_cache=True))}
            found[attention] = model(
                ids[:, 9:], attention_mask=mask, position_ids=torch.full((2, 1), 9), **cache
            ).logits
    torch.testing.assert_close(found["sdpa"], found["eager"], atol=3e-5, rtol=1e-5)


@EVERY
def test_left_padded_batch_matches_single_sequences(name: str) -> None:
    model, ids = compressed(name), tokens(2, 10)
    short = ids[:1, 4:]
    padded = torch.cat((torch.cat((torch.zeros(1, 4, dtype=torch.long), short), dim=1), ids[1:]))
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    found = generate(model, padded, attention_mask=mask)
    assert torch.equal(found[0, 4:], generate(model, short)[0])
    assert torch.equal(found[1], generate(model, ids[1:])[0])


@FAMILY
def test_beam_search_with_and_without_cache(name: str) -> None:
    model, ids = compressed(name), tokens()
    found = generate(model, ids, num_beams=3)
    assert torch.equal(found, generate(model, ids, num_beams=3, use_cache=False))
    with torch.no_grad():
        scores = [-model(beam, labels=beam).loss for beam in (found, greedy(model, ids))]
    assert scores[0] >= scores[1] - 1e-6


@FAMILY
def test_continuous_batching(name: str) -> None:
    """Test the paged cache, which has one width for all blocks."""
    ids = tokens(1, 7)
    if len(batched(dense(name), ids)[0]) < NEW:
        pytest.skip(f"transformers {transformers.__version__} cannot batch the dense {name} continuously either")
    model = compressed(name)
    assert batched(model, ids) == [greedy(model, ids)[0, 7:].tolist()]


def batched(model: PreTrainedModel, ids: Tensor) -> list[list[int]]:
    """Return the new tokens of each text by continuous batching, or fewer if the model class does not support it."""
    config = model.generation_config
    config.max_new_tokens, config.do_sample, config.eos_token_id = NEW, False, -1
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)  # by default it takes all available memory
    outputs = model.generate_batch([text.tolist() for text in ids], config, small)
    return [output.generated_tokens for output in outputs.values()]


@FAMILY
def test_text_generation_pipeline(name: str) -> None:
    model = compressed(name)
    generator = pipeline("text-generation", model, tokenizer=tokenizer())
    [result] = generator("two beams", max_new_tokens=4, min_new_tokens=4, do_sample=False, return_full_text=False)
    ids = tokenizer()("two beams", return_tensors="pt").input_ids
    assert tokenizer().decode(ids[0]) == "two beams"
    assert result["generated_text"] == tokenizer().decode(greedy(model, ids)[0, ids.shape[1] :][:4])
