"""Test that rotary tables are those of the dense model, also if all blocks of a layer type have the same width.

transformers computes a scaled table from the widths of its layer type if they are equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from subprocess_load import run_worker
from tiny_models import classes, compressed, dense, tokens
from torch import Tensor

from optimum_modegpt.modeling.modegpt_config import head_dim
from optimum_modegpt.modeling.modegpt_family import Family, Widths

SCALED = ("gemma3_text", "olmo3")
"""Variants with a scaled rotary table for one of their layer types."""
EACH = pytest.mark.parametrize("name", SCALED)


def tables_of(model: Any) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.base_model.rotary_emb.named_buffers() if name.endswith("inv_freq")}


def equal(name: str, qk: int) -> Any:
    return compressed(name, widths=[Widths(qk, 4, 31)] * 3)


@EACH
def test_narrow_heads_do_not_change_the_table(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Family, "uncut", lambda *_: {})
    model, expected = equal(name, 4), tables_of(dense(name))
    assert len(expected) == 4
    model.save_pretrained(tmp_path)
    reloaded = classes(name)["AutoModelForCausalLM"].from_pretrained(tmp_path)
    for each in (model, reloaded):
        found = tables_of(each)
        assert found.keys() == expected.keys()
        for key, table in expected.items():
            assert torch.equal(found[key], table), key


@EACH
def test_configuration_of_a_layer_type_has_the_dense_widths(name: str) -> None:
    config = equal(name, head_dim(dense(name).config)).config
    of_type = config.per_layer_config["full_attention"]
    assert (of_type.intermediate_size, head_dim(of_type)) == (48, config.dense_head_dim)
    assert [each.intermediate_size for each in config.per_layer_config] == [31] * 3


def test_equal_widths_reload_in_a_fresh_process(tmp_path: Path) -> None:
    jobs: list[dict[str, Any]] = []
    expected = {}
    for name in SCALED:
        model, folder = equal(name, head_dim(dense(name).config)), tmp_path / name
        model.save_pretrained(folder)
        with torch.no_grad():
            expected[name] = model(tokens()).logits
        jobs.append({"folder": str(folder), "auto": "AutoModelForCausalLM", "dtype": "float32"})
        jobs[-1]["out"] = str(tmp_path / f"{name}.out")
    run_worker(jobs, "local", tmp_path)
    for name in SCALED:
        assert torch.equal(load_file(tmp_path / f"{name}.out")["out"], expected[name])
