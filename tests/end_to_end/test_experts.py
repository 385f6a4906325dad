"""Test models with experts: their weights stay packed, all kernels agree, and rare experts are damped and reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import compressed, dense, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from optimum_modegpt.architectures import Block, resolve
from optimum_modegpt.architectures.experts import PackedExperts, Routing
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.calibration.moments import LinearMomentSum
from optimum_modegpt.compress import compress
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.least_squares import LinearMoments
from optimum_modegpt.methods.experts import ExpertMoments, cut_experts, select_experts
from optimum_modegpt.methods.factors import ExpertsFactors

LAYOUTS = pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
"""Experts with gate above up, and transposed ones with biases, with gate and up interleaved."""
CPU = torch.device("cpu")


def student_of(name: str) -> Block:
    return resolve(dense(name)).blocks[0].compressible_copy(CPU)


def experts_of(block: Block) -> PackedExperts:
    assert block.experts is not None
    return block.experts


def routing(tokens: int, experts: PackedExperts, *, unused: int | None = None) -> Routing:
    """Route random tokens to two different experts each, none of them to `unused`."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(tokens, experts.count, generator=generator)
    if unused is not None:
        scores[:, unused] = -1
    weights, chosen = scores.topk(2)
    return Routing(torch.randn(tokens, 32, generator=generator), chosen, weights)


@LAYOUTS
def test_experts_are_read_as_they_compute(name: str) -> None:
    block = resolve(dense(name)).blocks[0]
    routed, experts = routing(40, experts_of(block)), experts_of(block)
    with torch.no_grad():
        expected = experts.module(routed.inputs, routed.chosen, routed.weights)
        torch.testing.assert_close(experts.combined(routed), expected, atol=1e-5, rtol=1e-5)


@LAYOUTS
def test_installed_channels_are_those_of_the_dense_experts(name: str) -> None:
    block = student_of(name)
    experts = experts_of(block)
    kept = [torch.randperm(experts.width)[:16].sort().values for _ in range(experts.count)]
    inputs = torch.randn(5, 32)
    with torch.no_grad():
        hidden = [experts.hidden(expert, inputs)[:, kept[expert]] for expert in range(experts.count)]
        bias = [experts.width] if experts.has_bias else []
        downs = [experts.down(expert)[[*kept[expert].tolist(), *bias]] for expert in range(experts.count)]
        outputs = [with_bias(own, experts) @ down.float() for own, down in zip(hidden, downs, strict=True)]
        experts.install(kept, downs)
        for expert in range(experts.count):
            torch.testing.assert_close(experts.hidden(expert, inputs), hidden[expert])
            found = experts.output(expert, experts.hidden(expert, inputs))
            torch.testing.assert_close(found, outputs[expert], atol=1e-5, rtol=1e-5)


def with_bias(hidden: Tensor, experts: PackedExperts) -> Tensor:
    return torch.cat((hidden, torch.ones(len(hidden), 1)), dim=1) if experts.has_bias else hidden


@LAYOUTS
def test_shares_of_the_experts_add_up_to_the_missing_difference(name: str) -> None:
    """If every expert could fit its target, the MLP's output would gain the missing difference."""
    experts = experts_of(resolve(dense(name)).blocks[0])
    routed, missing, changes = routing(30, experts), torch.randn(30, 32), torch.zeros(30, 32)
    moments = ExpertMoments(experts)
    with torch.no_grad():
        for expert, total in enumerate(moments.sums):
            chosen, gates = routed.tokens_of(expert)
            outputs = experts.output(expert, experts.hidden(expert, routed.inputs[chosen]))

            def add(hidden: Any, target: Tensor, weight: Any, own: Any = (chosen, gates, outputs)) -> None:
                torch.testing.assert_close(weight, own[1].square())
                changes.index_add_(0, own[0], (target - own[2]) * own[1][:, None])

            total.add = add  # pyright: ignore[reportAttributeAccessIssue]
        moments.add(routed, missing=missing)
    torch.testing.assert_close(changes, missing, atol=1e-5, rtol=1e-5)


@LAYOUTS
@pytest.mark.parametrize("method", ["default", "paper"])
def test_an_expert_without_tokens_keeps_its_weights_and_is_reported(name: str, method: str) -> None:
    block = student_of(name)
    experts = experts_of(block)
    moments = ExpertMoments(experts, bias=method == "default")
    config = ModeGPTConfig(sparsity=0.2)

    def cut(block: Block, moments: list[LinearMoments]) -> ExpertsFactors:
        if method == "paper":
            return select_experts(block, moments, 100, config)
        return cut_experts(block, moments, torch.eye(32, dtype=torch.float64), 100, config)

    with torch.no_grad():
        moments.add(routing(400, experts, unused=2))
        with pytest.warns(UserWarning, match=r"1 of 4 experts of a block got fewer calibration tokens than the 100"):
            factors = cut(block, moments.value())
    assert moments.sums[2].tokens == 0
    bias = [experts.width] if experts.has_bias else []
    kept = experts.down(2)[[*factors.kept[2].tolist(), *bias]]
    torch.testing.assert_close(factors.downs[2], kept)
    assert factors.relative_error < 1


def test_moments_weight_tokens_with_the_square_of_the_router() -> None:
    experts = experts_of(resolve(dense("mixtral")).blocks[0])
    routed, moments = routing(30, experts), ExpertMoments(experts)
    weight = torch.rand(30)
    expected = LinearMomentSum(ones=False)
    with torch.no_grad():
        moments.add(routed, weight=weight)
        chosen, gates = routed.tokens_of(1)
        hidden = experts.hidden(1, routed.inputs[chosen])
        rows = hidden * (gates * weight[chosen].sqrt())[:, None]
        expected.add(rows, experts.output(1, rows))
    torch.testing.assert_close(moments.value()[1].gram, expected.value().gram, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.value()[1].cross, expected.value().cross, rtol=1e-4, atol=1e-4)


def test_weights_stay_packed_and_kernels_available(tmp_path: Path) -> None:
    model = dense("mixtral")
    windows = TokenWindows(tokens(10, 16, seed=7), {"name": "random tokens", "windows": 10})
    compress(model, ModeGPTConfig(sparsity=0.3), windows, device="cpu", progress=False)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for block, widths in zip(again.model.layers, again.config.widths(), strict=True):
        assert block.mlp.experts.gate_up_proj.shape == (4, 2 * widths.mlp, 32)
        assert widths.mlp % 8 == 0
    assert again.config._experts_implementation == "grouped_mm"
    with torch.no_grad():
        expected = model(tokens()).logits
        for implementation in ("eager", "batched_mm", "grouped_mm"):
            again.set_experts_implementation(implementation)
            torch.testing.assert_close(again(tokens()).logits, expected, atol=2e-5, rtol=1e-5)


def test_a_block_without_experts_has_a_width_of_its_own() -> None:
    config: Any = compressed("qwen3_moe-dense-layers-biases").config
    first, second = config.per_layer_config[0], config.per_layer_config[1]
    assert (first.intermediate_size, second.moe_intermediate_size) == (31, 104)
    assert [config.dense_mlp_width(index) for index in range(3)] == [48, 128, 128]


def test_experts_without_a_gate_are_refused() -> None:
    module = nn.Module()
    module.has_gate = False  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    assert PackedExperts(module).refusal == "its experts have no gate"
