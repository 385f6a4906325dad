"""Test shared experts: they are a part of their own, are refitted last, and are saved at their own width."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_dense, save_text
from tiny_models import compressed, dense, tokens
from transformers import AutoModelForCausalLM

from optimum_modegpt.allocation.plan import Plan
from optimum_modegpt.architectures import Block, resolve
from optimum_modegpt.architectures.experts import SharedMLP
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.cli.main import main
from optimum_modegpt.compress import compress
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import UnsupportedModel
from optimum_modegpt.methods.experts import shared_moments
from optimum_modegpt.methods.mlp_refit import shared_samples
from optimum_modegpt.methods.targets import DenseTargets, MLPStreams

FAMILIES = pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_next", "qwen3_5_moe_text", "glm4_moe", "ernie4_5_moe"])
GATED = pytest.mark.parametrize("name", ["qwen2_moe", "ernie4_5_moe"])
"""A shared expert with a gate, and one with biases."""
CPU = torch.device("cpu")
WINDOWS = TokenWindows(tokens(10, 16, seed=7), {"name": "random tokens", "windows": 10})
MANY = TokenWindows(tokens(40, 32, seed=7), {"name": "random tokens", "windows": 40})
CONFIG = ModeGPTConfig(sparsity=0.3, allocation="uniform", round_to=1)


def shared_of(block: Block) -> SharedMLP:
    assert block.shared is not None
    return block.shared


def block_of(name: str) -> Block:
    """Return a block that has a shared expert."""
    return next(block for block in resolve(dense(name)).blocks if block.shared is not None)


@FAMILIES
@pytest.mark.parametrize("method", ["default", "paper"])
def test_every_shared_expert_gets_a_width_of_its_own(name: str, method: Any, tmp_path: Path) -> None:
    model = dense(name)
    config = ModeGPTConfig(sparsity=0.3, method=method, allocation="uniform", round_to=1)
    report = compress(model, config, WINDOWS, device="cpu", progress=False)
    assert report.achieved_sparsity == pytest.approx(0.3, abs=0.01)
    shared = [block.parts["shared"] for block in report.blocks if "shared" in block.parts]
    assert shared
    for part in shared:
        assert part.rank == round(0.7 * part.dense_rank)
        assert part.relative_error is not None
        assert 0 <= part.relative_error < 1, "0 with fewer tokens than channels"
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [widths.shared for widths in again.config.widths() if widths.shared] == [part.rank for part in shared]
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_a_useless_shared_expert_is_cut_first() -> None:
    model = dense("qwen2_moe")
    useless = shared_of(resolve(model).blocks[2]).module
    useless.down_proj.weight.data.zero_()
    report = compress(model, ModeGPTConfig(sparsity=0.03, round_to=1), WINDOWS, device="cpu", progress=False)
    assert {key.split(".")[1] for key in report.sensitivities} == {"mlp", "qk", "vo", "shared"}
    first, without, last = (block.parts.get("shared") for block in report.blocks)
    assert without is None, "block 1 has no experts"
    assert first is not None
    assert last is not None
    assert last.sparsity > 0.9
    assert first.sparsity < 0.2


@GATED
@pytest.mark.parametrize("method", ["default", "paper"])
def test_removing_silent_channels_changes_nothing(name: str, method: Any) -> None:
    model = dense(name)
    blocks = [block for block in resolve(model).blocks if block.shared is not None]
    plan = Plan(tuple(block.dense_widths for block in resolve(model).blocks))
    for block in blocks:
        module = shared_of(block).module
        for linear in (module.gate_proj, module.up_proj):
            linear.weight.data[::2] = 0
            if linear.bias is not None:
                linear.bias.data[::2] = 0
    with torch.no_grad():
        expected = model(tokens()).logits
    half = {block.index: block.shared_width // 2 for block in blocks}
    widths = [replace(own, shared=half.get(index, 0)) for index, own in enumerate(plan.widths)]
    config = ModeGPTConfig(sparsity=0.3, method=method, allocation="uniform", round_to=1)
    compress(model, config, WINDOWS, plan=Plan(tuple(widths)), device="cpu", progress=False)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, expected, atol=1e-3, rtol=1e-3)


@GATED
def test_moments_weight_tokens_with_the_square_of_the_gate(name: str) -> None:
    block = block_of(name)
    shared, inputs = shared_of(block), torch.randn(50, block.d_model)
    with torch.no_grad(), shared_moments(block, bias=False) as total:
        assert total is not None
        shared.module(inputs)
        gates = torch.sigmoid(block.module.get_submodule("mlp.shared_expert_gate")(inputs)) if shared.gate else 1.0
        rows = gates * shared.module.act_fn(shared.module.gate_proj(inputs)) * shared.module.up_proj(inputs)
        outputs = rows @ shared.module.down_proj.weight.T
    found = total.value()
    torch.testing.assert_close(found.gram.float(), rows.T @ rows, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.cross.float(), rows.T @ outputs, atol=1e-4, rtol=1e-4)


@GATED
def test_targets_measure_the_error_of_the_whole_mlp(name: str) -> None:
    """Σ w ‖target − y‖² of the shared expert's output y is the error of the MLP's output with y."""
    block = block_of(name).compressible_copy(CPU)
    stream, wanted = torch.randn(2, 8, block.d_model), torch.randn(2, 8, block.d_model)
    weights = torch.rand(2, 8) + 0.1
    targets = DenseTargets([], [stream + wanted], [], [weights], [])
    found = list(shared_samples(block, MLPStreams([stream], [stream]), targets))
    assert [len(sample.inputs) for sample in found] == [8, 8], "window by window"
    shared = shared_of(block)
    with torch.no_grad():
        for sample, total, weight, window in zip(found, wanted, weights, stream, strict=True):
            inputs = block.residual.mlp_input(window[None])
            present, gates = block.mlp(inputs)[0], shared.gates(inputs)[0]
            other = torch.randn(8, block.d_model)
            change = gates * (other - shared.module(inputs)[0])
            expected = (weight * (total - present - change).square().sum(1)).sum()
            error = (sample.weight * (sample.target - other).square().sum(1)).sum()
            torch.testing.assert_close(error, expected, rtol=1e-4, atol=1e-4)


def test_the_refit_compensates_the_cut_of_the_experts() -> None:
    """With all its channels, the refitted shared expert makes the error of narrow experts smaller."""
    errors = {}
    for refitted in (False, True):
        model = dense("qwen2_moe")
        plan = [replace(block.dense_widths, mlp=24) for block in resolve(model).blocks]
        with pytest.MonkeyPatch.context() as patch:
            if not refitted:
                patch.setattr(Block, "install_shared", lambda *_: None)
            compress(model, CONFIG, MANY, plan=Plan(tuple(plan)), device="cpu", progress=False)
        with torch.no_grad():
            difference = model(MANY.tokens).logits - dense("qwen2_moe")(MANY.tokens).logits
        errors[refitted] = float(difference.norm())
    assert errors[True] < errors[False]


def test_a_misread_gate_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedMLP, "gates", lambda _, inputs: torch.ones_like(inputs[..., :1]))
    with pytest.raises(UnsupportedModel, match="block 0"):
        compress(dense("qwen2_moe"), CONFIG, WINDOWS, device="cpu", progress=False)


@pytest.mark.parametrize("width", [0, 41, None, "9"])
def test_a_wrong_width_in_the_configuration_is_an_error(width: Any) -> None:
    saved: Any = compressed("qwen2_moe").config
    values = saved.to_dict()
    values["per_layer_config"]["0"]["shared_expert_width"] = width
    config = type(saved)(**values)
    with pytest.raises(
        ValueError, match=r"per_layer_config\[0\].shared_expert_width is .*expected an integer in \[1, 40\]"
    ):
        config.widths()


def test_the_layout_stock_keeps_shared_experts() -> None:
    model = dense("qwen2_moe")
    report = compress(model, replace(CONFIG, layout="stock"), WINDOWS, device="cpu", progress=False)
    assert model.config.model_type == "qwen2_moe"
    assert [block.parts["shared"].rank for block in report.blocks if "shared" in block.parts] == [40, 40]
    assert any("shared" in sentence for sentence in report.uncut)


def test_commands_show_the_width_of_shared_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, text = save_dense(tmp_path / "dense", "qwen2_moe"), save_text(tmp_path / "text.txt")
    words = ["compress", str(checkpoint), "--sparsity", "0.3", "--allocation", "uniform", "--round-to", "1"]
    words += ["--dataset", str(text), "--num-samples", "8", "--sequence-length", "32", "--device", "cpu"]
    assert main([*words, "--output", str(tmp_path / "narrow")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "narrow")]) == 0
    header, first, second, *_ = capsys.readouterr().out.splitlines()[1:]
    assert header.split() == ["block", "mlp", "qk", "vo", "shared"]
    assert first.split()[-1] == "28/40"
    assert second.split()[-1] == "–"
    card = (tmp_path / "narrow" / "README.md").read_text(encoding="utf-8")
    assert "shared expert" in card
    assert "28 / 40" in card
