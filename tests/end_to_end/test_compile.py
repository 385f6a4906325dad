"""Test torch.compile: blocks of different widths give one graph, also in generation with a static cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import compressed, tokens
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig, GenerationConfig, PreTrainedModel

from optimum_modegpt.modeling.modegpt_family import Widths

BLOCKS = 9
"""More than the recompilations that torch.compile allows, so that one graph per block would fail."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    widths = [Widths(2 * (index % 4 + 1), 3 * index % 8 + 1, 17 + index) for index in range(BLOCKS)]
    assert len(set(widths)) == BLOCKS
    return compressed("llama-gqa-tied", widths=widths, num_hidden_layers=BLOCKS)


@pytest.fixture
def graphs() -> Iterator[CompileCounter]:
    """Return a torch.compile backend that counts graphs and runs them eagerly."""
    torch.compiler.reset()
    yield CompileCounter()
    torch.compiler.reset()


@torch.no_grad()
def test_model_compiles_to_one_static_and_one_dynamic_graph(model: PreTrainedModel, graphs: CompileCounter) -> None:
    forward = torch.compile(model, backend=graphs)
    for lengths, expected in (((12, 12), 1), ((17, 31, 9), 2)):
        for length in lengths:
            ids = tokens(2, length)
            logits = model(ids, use_cache=False).logits
            torch.testing.assert_close(forward(ids, use_cache=False).logits, logits, atol=1e-5, rtol=1e-5)
        assert graphs.frame_count == expected


def test_generation_with_a_static_cache_compiles_one_step(model: PreTrainedModel, graphs: CompileCounter) -> None:
    ids = tokens(2, 12)
    settings = GenerationConfig(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=2)
    expected = model.generate(ids, settings)

    def backend(*arguments: Any) -> Any:  # a function, since `generate` would deep-copy the counter
        return graphs(*arguments)

    compiling = CompileConfig(backend=backend, fullgraph=True, mode=None)
    compiling._compile_all_devices = True  # by default only the steps on accelerators are compiled
    found = model.generate(ids, settings, cache_implementation="static", compile_config=compiling)
    assert torch.equal(found, expected)
    assert graphs.frame_count == 1
