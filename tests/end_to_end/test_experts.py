"""Test models with experts: their weights stay packed, all kernels agree, and rare experts are damped and reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_dense, save_text
from tiny_models import compressed, dense, tokenizer, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from optimum_modegpt.architectures import Block, resolve
from optimum_modegpt.architectures.experts import PackedExperts, Routing
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.calibration.moments import LinearMomentSum
from optimum_modegpt.cli.main import FAILED, main
from optimum_modegpt.compress import compress
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.least_squares import LinearMoments
from optimum_modegpt.errors import InvalidConfig, UnsupportedModel
from optimum_modegpt.integration.quantizer import ModeGPTQuantizer
from optimum_modegpt.methods.experts import ExpertMoments, RoutedTokens, cut_experts, refits_experts, select_experts
from optimum_modegpt.methods.factors import ExpertsFactors
from optimum_modegpt.methods.whole_experts import ExpertUse, ExpertUseSum, kept_experts
from optimum_modegpt.report import Report

LAYOUTS = pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
"""Experts with gate above up, and transposed ones with biases, with gate and up interleaved."""
CPU = torch.device("cpu")
WINDOWS = TokenWindows(tokens(10, 16, seed=7), {"name": "random tokens", "windows": 10})


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
        rows = [tuple(row[channels] for row in experts.rows(expert)) for expert, channels in enumerate(kept)]
        experts.install(rows, downs)
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
        moments.add(RoutedTokens(routed, missing))
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
        moments.add(RoutedTokens(routing(400, experts, unused=2)))
        with pytest.warns(UserWarning, match=r"1 of 4 experts of a block got fewer calibration tokens than the 100"):
            factors = cut(block, moments.value())
    assert moments.sums[2].tokens == 0
    gates, (gate, _) = experts.rows(2)[0], factors.rows[2]
    kept = [int((gates == row).all(1).nonzero()) for row in gate]
    bias = [experts.width] if experts.has_bias else []
    torch.testing.assert_close(factors.downs[2], experts.down(2)[[*kept, *bias]])
    assert factors.relative_error < 1


def test_moments_weight_tokens_with_the_square_of_the_router() -> None:
    experts = experts_of(resolve(dense("mixtral")).blocks[0])
    routed, moments = routing(30, experts), ExpertMoments(experts)
    weight = torch.rand(30)
    expected = LinearMomentSum(ones=False)
    with torch.no_grad():
        moments.add(RoutedTokens(routed, weight=weight))
        chosen, gates = routed.tokens_of(1)
        hidden = experts.hidden(1, routed.inputs[chosen])
        rows = hidden * (gates * weight[chosen].sqrt())[:, None]
        expected.add(rows, experts.output(1, rows))
    torch.testing.assert_close(moments.value()[1].gram, expected.value().gram, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.value()[1].cross, expected.value().cross, rtol=1e-4, atol=1e-4)


def test_gate_and_up_of_every_expert_are_refitted() -> None:
    """On other tokens, the error of the MLP's output is less than without the refit."""
    experts = experts_of(student_of("mixtral"))
    seen, unseen = (routing(tokens, experts) for tokens in (6000, 400))
    with torch.no_grad():
        wanted, errors = experts.combined(unseen), []
        for iterations in (0, 4):
            block, config = student_of("mixtral"), ModeGPTConfig(sparsity=0.3, refit_iterations=iterations)
            experts, tokens = experts_of(block), RoutedTokens(seen, torch.zeros(6000, 32), torch.ones(6000))
            moments, rank = ExpertMoments(experts), experts.width // 2
            moments.add(tokens)
            assert refits_experts(block, moments.value(), rank, config) == bool(iterations)
            windows = list(tokens.windows(300)) if iterations else None
            metric = torch.eye(32, dtype=torch.float64)
            cut_experts(block, moments.value(), metric, rank, config, windows).install(block)
            errors.append(float((experts.combined(unseen) - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.98 * errors[0]


def test_experts_without_separable_gate_are_not_refitted() -> None:
    experts = experts_of(resolve(dense("gpt_oss")).blocks[0])
    assert experts.activation is None


def test_weights_stay_packed_and_kernels_available(tmp_path: Path) -> None:
    model = dense("mixtral")
    compress(model, ModeGPTConfig(sparsity=0.3), WINDOWS, device="cpu", progress=False)
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


WHOLE = pytest.mark.parametrize(
    "name",
    ["mixtral", "qwen3_moe-dense-layers-biases", "gpt_oss", "granitemoe", "ernie4_5_moe", "qwen2_moe", "qwen3_next"],
)


def test_groups_of_experts_stay_equal(tmp_path: Path) -> None:
    model = dense("glm4_moe", n_routed_experts=8)
    router: Any = model.get_submodule("model.layers.1.mlp.gate")
    router.e_score_correction_bias[:] = torch.arange(8.0)
    before = router.weight.detach().clone()
    config = ModeGPTConfig(sparsity=0.0, expert_sparsity=0.5)
    report = compress(model, config, WINDOWS, device="cpu", progress=False)
    assert model.config.n_routed_experts == 4
    for kept in report.kept_experts:
        assert [expert < 4 for expert in kept] == [True, True, False, False]
    router = model.get_submodule("model.layers.1.mlp.gate")
    kept = list(report.kept_experts[0])
    assert torch.equal(router.weight, before[kept])
    assert router.e_score_correction_bias.tolist() == kept
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)


@WHOLE
def test_without_whole_experts_the_result_is_a_stock_model(name: str, tmp_path: Path) -> None:
    model, stock = dense(name), type(dense(name))
    parameters = sum(each.numel() for each in model.parameters())
    report = compress(model, ModeGPTConfig(sparsity=0.0, expert_sparsity=0.5), WINDOWS, device="cpu", progress=False)
    assert type(model) is stock
    assert report.parameters.total_before == parameters
    assert report.parameters.total_after == sum(each.numel() for each in model.parameters()) < parameters
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is stock
    with torch.no_grad():
        torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits, atol=1e-5, rtol=1e-5)
    # The removed experts can no longer be chosen, and the others compute as before.
    own, experts = resolve(dense(name)), iter(report.kept_experts)
    for block, left in zip(own.blocks, resolve(model).blocks, strict=True):
        if block.experts is None or left.experts is None:
            continue
        kept = list(next(experts))
        assert left.experts.count == len(kept) == 2
        described = block.family.mlp.experts
        assert described is not None
        routers = [one.module.get_submodule(described.router) for one in (block, left)]
        weights = [router.get_parameter("weight") for router in routers]
        assert torch.equal(weights[0][kept], weights[1])
        assert torch.equal(block.experts.module.down_proj[kept], left.experts.module.down_proj)


def test_a_stock_result_is_saved_with_its_report(tmp_path: Path) -> None:
    model = dense("mixtral")
    quantizer = ModeGPTQuantizer(sparsity=0.0, expert_sparsity=0.5, dataset=tokens(10, 16, seed=7), sequence_length=16)
    quantizer.quantize_model(model, tokenizer(), device="cpu")
    quantizer.save(model, tmp_path)
    assert Report.load(tmp_path / "report.json").kept_experts == quantizer.report.kept_experts  # pyright: ignore[reportOptionalMemberAccess]
    assert "optimum_modegpt" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.num_local_experts == 2


def test_channels_and_whole_experts_are_removed_together() -> None:
    model = dense("mixtral")
    report = compress(model, ModeGPTConfig(sparsity=0.3, expert_sparsity=0.25), WINDOWS, device="cpu", progress=False)
    assert model.config.model_type == "modegpt_mixtral"
    assert model.config.num_local_experts == 3
    assert all(len(kept) == 3 for kept in report.kept_experts)
    for block, widths in zip(model.model.layers, model.config.widths(), strict=True):
        assert block.mlp.experts.down_proj.shape == (3, 32, widths.mlp)
    assert torch.isfinite(model(tokens()).logits).all()


@pytest.mark.parametrize(
    ("name", "sparsity", "message"),
    [
        ("llama-mha", 0.5, "no experts"),
        ("mixtral", 0.75, r"leaves 1 of 4 experts, but the router chooses 2 .* at most 0.500"),
        ("mixtral", 0.1, "removes none of 4 experts, because a block loses a multiple of 1; expected 0.250 or more"),
        ("glm4_moe", 0.2, "removes none of 4 experts, because a block loses a multiple of 2; expected 0.500 or more"),
        ("glm4_moe", 0.5, r"leaves 1 of 2 experts in each of 2 groups, .* so it needs 2 in each .* at most 0.000"),
    ],
)
def test_experts_that_cannot_be_removed_are_an_error(name: str, sparsity: float, message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        compress(dense(name), ModeGPTConfig(expert_sparsity=sparsity), WINDOWS, device="cpu", progress=False)


def test_the_saliency_of_an_expert_is_the_mean_of_its_weighted_outputs() -> None:
    experts = experts_of(resolve(dense("mixtral")).blocks[0])
    routed, total = routing(30, experts, unused=3), ExpertUseSum(experts)
    with torch.no_grad():
        for part in (slice(0, 10), slice(10, 30)):
            total.add(Routing(routed.inputs[part], routed.chosen[part], routed.weights[part]))
        chosen, gates = routed.tokens_of(1)
        outputs = experts.output(1, experts.hidden(1, routed.inputs[chosen]))
    use = total.value()
    assert float(use.saliency[1]) == pytest.approx(float((gates * outputs.norm(dim=1)).mean()), rel=1e-5)
    assert float(use.peak[1]) == pytest.approx(float(outputs.abs().max()))
    assert float(use.saliency[3]) == 0


def test_experts_with_massive_activations_are_kept() -> None:
    ones = torch.ones(8, dtype=torch.float64)
    quiet = ExpertUse(torch.arange(8.0, dtype=torch.float64), ones)
    massive = ExpertUse(quiet.saliency, ones.index_fill(0, torch.tensor([1]), 500.0))
    kept = kept_experts([massive, quiet], 4)
    assert [one.tolist() for one in kept] == [[1, 5, 6, 7], [4, 5, 6, 7]]


@LAYOUTS
def test_a_wrong_layout_is_refused(name: str) -> None:
    model = dense(name)
    experts = experts_of(resolve(model).blocks[1]).module
    experts.is_concatenated = not experts.is_concatenated
    with pytest.raises(UnsupportedModel, match="block 1: the gate of its experts combines other channels"):
        resolve(model)


def test_experts_without_a_gate_are_refused() -> None:
    module = nn.Module()
    module.has_gate = False  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    assert PackedExperts(module).refusal == "its experts have no gate"


def test_the_commands_read_a_stock_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, text = save_dense(tmp_path / "dense", "mixtral"), save_text(tmp_path / "text.txt")
    fewer = tmp_path / "fewer"
    flags = ["--dataset", str(text), "--num-samples", "8", "--sequence-length", "32", "--device", "cpu", "--output"]
    words = ["compress", str(checkpoint), "--sparsity", "0", "--expert-sparsity", "0.5", *flags, str(fewer)]
    assert main(words) == 0
    assert "kept 2 experts in each of 3 blocks" in capsys.readouterr().out
    assert main(["inspect", str(fewer)]) == 0
    shown = capsys.readouterr().out
    assert [line.split() for line in shown.splitlines()[2:5]] == [
        [str(index), "128/128", "8/8", "8/8"] for index in range(3)
    ]
    assert "removed 0.00% of the block projections" in shown
    assert "expert_sparsity = 0.5" in shown
    assert main(["recover", str(checkpoint), *flags, str(tmp_path / "recovered")]) == FAILED
    assert "expected a compressed model, found a dense one (mixtral)" in capsys.readouterr().err
    words = ["compress", str(fewer), "--method", "paper", "--allocation", "uniform", *flags, str(tmp_path / "narrow")]
    assert main(words) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "narrow").config.modegpt["recipe"]["expert_sparsity"] == 0
