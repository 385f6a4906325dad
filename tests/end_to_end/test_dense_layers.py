"""Test blocks whose attention, or the module in its place, stays dense: they have no query, key, value and output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_configs import EVERY_VARIANT
from tiny_models import compressed, dense, fill, tokenizer, tokens
from torch import Tensor
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

from optimum_modegpt.allocation.plan import Plan
from optimum_modegpt.architectures import resolve
from optimum_modegpt.budget.estimate import estimate
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.cli.tables import inspection_table
from optimum_modegpt.compress import compress
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import InvalidConfig, UnsupportedModel
from optimum_modegpt.evaluation.inspection import inspection
from optimum_modegpt.hub.card import save_report, write_card
from optimum_modegpt.loading.models import load_config, load_model
from optimum_modegpt.loading.safetensors_index import read_headers
from optimum_modegpt.loading.source import Source
from optimum_modegpt.modeling.modegpt_family import Widths
from optimum_modegpt.report import Report

NAME = "qwen3_5_text"


def run(model: Any, **arguments: Any) -> Report:
    record = {"name": "random tokens", "windows": 10, "sequence_length": 16, "tokens": 160, "sha256": "digest"}
    windows = TokenWindows(tokens(10, 16, seed=7), record)
    config = ModeGPTConfig(sparsity=0.3, allocation="uniform", round_to=1)
    return compress(model, config, windows, device="cpu", progress=False, **arguments)


def test_reports_show_only_the_parts_of_a_block(tmp_path: Path) -> None:
    model = dense(NAME)
    report = run(model)
    assert [set(block.parts) for block in report.blocks] == [{"mlp"}, {"mlp", "qk", "vo"}, {"mlp"}]
    assert report.summary().splitlines()[1].split()[-2:] == ["–", "–"]
    assert report.uncut
    for sentence in report.uncut:
        assert "layers of type linear_attention are cut in the MLP only" in sentence
        assert sentence in report.summary()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    save_report(tmp_path, report)
    write_card(tmp_path)
    row = next(line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("| 0 |"))
    assert row.startswith("| 0 | 34 / 48 | 0.")
    assert row.endswith("| – | – | – | – |")
    found = inspection(load_config(Source(str(tmp_path))), read_headers(Source(str(tmp_path))))
    assert [set(block.ranks) for block in found.blocks] == [{"mlp"}, {"mlp", "qk", "vo"}, {"mlp"}]
    assert [block.ranks["mlp"] for block in found.blocks] == [widths.mlp for widths in model.config.widths()]
    assert found.sparsity == pytest.approx(report.achieved_sparsity)
    assert inspection_table(found, {}).splitlines()[2].split() == ["0", "34/48", "–", "–"]
    report.plot(tmp_path / "ranks.svg")


class PlainNorm(torch.nn.Module):
    """Computes as a norm of Qwen3.5 does, but with the gain itself as its weight."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(1 + norm.weight.detach()), norm.eps

    def forward(self, values: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(values, self.weight.shape, self.weight, self.eps)


def test_norms_of_heads_are_checked_where_the_first_block_has_none() -> None:
    model = dense(NAME)
    attention = model.model.layers[1].self_attn
    attention.q_norm = PlainNorm(attention.q_norm)
    with pytest.raises(UnsupportedModel, match="PlainNorm computes its gain or its mean in another way"):
        run(model)


def test_a_block_has_a_reason_for_each_absent_part() -> None:
    config = dense(NAME).config
    family = resolve(dense(NAME)).family
    assert set(family.absent(config, 0)) == {"qk", "vo"}
    assert "linear_attention" in family.absent(config, 0)["qk"]
    assert family.absent(config, 1) == {}


@pytest.mark.parametrize("field", ["qk_head_dim", "v_head_dim", "head_dim"])
def test_a_configuration_with_a_width_of_an_absent_part_is_refused(field: str) -> None:
    config = compressed(NAME).config
    values = config.to_dict()
    values["per_layer_config"]["2"][field] = 6
    with pytest.raises(ValueError, match=field):
        type(config)(**values).widths()


def test_a_configuration_with_an_impossible_size_of_a_layer_is_refused() -> None:
    config = compressed("gemma4_text").config
    values = config.to_dict()
    values["per_layer_config"]["1"]["head_dim"] = 2**40
    with pytest.raises(ValueError, match="head_dim is 1099511627776"):
        type(config)(**values)


@pytest.mark.parametrize("name", ["hidden_size_per_layer_input", "num_kv_shared_layers"])
def test_blocks_that_read_more_than_the_stream_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"{name}=1, which changes its blocks; expected 0"):
        resolve(dense("gemma4_text", **{name: 1}))


def test_a_plan_for_an_absent_part_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="the block has no qk, expected 0"):
        run(dense(NAME), plan=Plan((Widths(0, 0, 40), Widths(8, 8, 40), Widths(8, 0, 40))))


def test_an_estimate_counts_only_the_projections_of_parts() -> None:
    found = estimate(dense(NAME), ModeGPTConfig(sparsity=0.3), 16)
    assert found.block_parameters == 3 * 3 * 32 * 48 + 2 * 32 * 8 * (4 + 2) + 32 * 8 * 4
    assert found.parameters > found.block_parameters


COMPOSITE = {
    NAME: (Qwen3_5Config, Qwen3_5ForConditionalGeneration),
    "qwen3_5_moe_text": (Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration),
}


@pytest.mark.parametrize("name", COMPOSITE)
def test_the_language_model_of_a_composite_checkpoint_is_compressed(name: str, tmp_path: Path) -> None:
    (composite, model_class), text = COMPOSITE[name], EVERY_VARIANT[name][1]
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 32}
    tied = text.get("tie_word_embeddings", False)
    whole = fill(model_class(composite(text_config=text, vision_config=vision, tie_word_embeddings=tied))).eval()
    whole.save_pretrained(tmp_path / "dense")
    source = Source(str(tmp_path / "dense"))
    assert load_config(source).model_type == name
    model, ids = load_model(source, "float32").eval(), tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits)
        run(model)
        expected = model(ids).logits
        model.save_pretrained(tmp_path / "compressed")
        found = load_model(Source(str(tmp_path / "compressed")), "float32").eval()(ids).logits
    assert torch.equal(found, expected)
