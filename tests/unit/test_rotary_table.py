"""Test the rotary parameters of a stock class whose heads keep some coordinate pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tiny_configs import EVERY_VARIANT
from torch import nn
from transformers import Gemma3TextConfig, LlamaConfig, NemotronConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.nemotron.modeling_nemotron import NemotronRotaryEmbedding

from optimum_modegpt.layouts.rotary_table import kept_rope_parameters, refusal_of_tables

PAIRS, HEAD_DIM = [0, 2, 3, 7], 16
LENGTH = 64
TYPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
}


def llama(rope: dict[str, Any], **changes: Any) -> LlamaConfig:
    values = EVERY_VARIANT["llama-gqa-tied"][1] | {"head_dim": HEAD_DIM, "rope_parameters": dict(rope)}
    return LlamaConfig(**values | changes)


def table(rotary: Any, length: int, *layer_type: str) -> torch.Tensor:
    """Return the cosines and sines of the first `length` positions, with one column for each pair."""
    cos, sin = rotary(torch.zeros(1), torch.arange(length)[None], *layer_type)
    return torch.stack((cos, sin))[..., : cos.shape[-1] // 2]


@pytest.mark.parametrize("rope", TYPES.values(), ids=list(TYPES))
def test_the_narrow_table_has_the_columns_of_the_kept_pairs(rope: dict[str, Any]) -> None:
    config = llama(rope)
    dense = LlamaRotaryEmbedding(config)
    assert refusal_of_tables(nn.ModuleList([dense]), config) is None
    kept = kept_rope_parameters(nn.ModuleList([dense]), config, PAIRS)
    narrow = LlamaRotaryEmbedding(llama(kept, head_dim=2 * len(PAIRS)))
    torch.testing.assert_close(narrow.inv_freq, dense.inv_freq[PAIRS], rtol=1e-6, atol=0)
    assert narrow.attention_scaling == dense.attention_scaling
    for length in (8, LENGTH, 2 * LENGTH, 8):  # LongRoPE may choose other factors for a long text
        torch.testing.assert_close(table(narrow, length), table(dense, length)[..., PAIRS], rtol=1e-4, atol=1e-4)
    # The names under which engines read the factor of the table.
    expected = None if rope["rope_type"] != "yarn" else dense.attention_scaling
    assert kept.get("short_mscale") == kept.get("long_mscale") == expected
    assert kept["short_factor"] == kept["long_factor"]


def test_every_layer_type_keeps_its_own_frequencies() -> None:
    config_class, values = EVERY_VARIANT["gemma3_text"]
    values = values | {"head_dim": HEAD_DIM}
    dense = Gemma3RotaryEmbedding(Gemma3TextConfig(**values))
    kept = kept_rope_parameters(nn.ModuleList([dense]), Gemma3TextConfig(**values), PAIRS)
    narrow: Any = Gemma3RotaryEmbedding(config_class(**values | {"head_dim": 2 * len(PAIRS), "rope_parameters": kept}))
    for layer_type in ("full_attention", "sliding_attention"):
        found = table(narrow, LENGTH, layer_type)
        torch.testing.assert_close(found, table(dense, LENGTH, layer_type)[..., PAIRS], rtol=1e-4, atol=1e-4)
    assert not torch.equal(table(narrow, LENGTH, "full_attention"), table(narrow, LENGTH, "sliding_attention"))


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.24"), reason="it always rotates half of a head")
def test_a_class_that_rotates_half_of_a_head_by_default_rotates_all_of_the_narrow_one() -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    values = {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": LENGTH}
    config = NemotronConfig(**values, head_dim=HEAD_DIM, rope_parameters=rope)
    dense = NemotronRotaryEmbedding(config)
    kept = kept_rope_parameters(nn.ModuleList([dense]), config, PAIRS)
    narrow = NemotronRotaryEmbedding(NemotronConfig(**values, head_dim=2 * len(PAIRS), rope_parameters=kept))
    torch.testing.assert_close(narrow.inv_freq, dense.inv_freq[PAIRS], rtol=1e-6, atol=0)


REFUSED = {
    "the rotary type dynamic has frequencies that follow the length": {
        "rope_type": "dynamic",
        "rope_theta": 10000.0,
        "factor": 2.0,
    },
    "the rotary type longrope has frequencies that follow the length": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * (HEAD_DIM // 2),
        "long_factor": [2.0] * (HEAD_DIM // 2),
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    },
    "only a part of a head rotates": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
}


@pytest.mark.parametrize(("reason", "rope"), REFUSED.items())
def test_tables_that_cannot_be_named_are_refused_with_the_reason(reason: str, rope: dict[str, Any]) -> None:
    config = llama(rope)
    found = refusal_of_tables(nn.ModuleList([LlamaRotaryEmbedding(config)]), config)
    assert found is not None
    assert reason in found


def test_two_tables_are_refused() -> None:
    config = llama(TYPES["default"])
    modules = nn.ModuleList([LlamaRotaryEmbedding(config), LlamaRotaryEmbedding(config)])
    assert refusal_of_tables(modules, config) == "ModuleList has no single module that computes its rotary table"
