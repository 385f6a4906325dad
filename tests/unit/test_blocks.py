"""Test the parts of a block, cut by both methods: full rank and the removal of unused dimensions change nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from laws import difference, moment
from tiny_models import dense, tokens
from torch import Tensor

from optimum_modegpt.architectures import Block, resolve
from optimum_modegpt.calibration.gradients import output_gradients
from optimum_modegpt.calibration.streams import StreamStorage, calls_of, enter
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.methods import input_refit, published, residual_matched
from optimum_modegpt.methods.method import CalibrationInputs, StreamPair
from optimum_modegpt.methods.residual_matched import OutputMetrics

SEPARATE = [
    "llama-gqa-tied",
    "llama-mqa-biases",
    "llama-mha",
    "mistral-window",
    "qwen2",
    "opt",
    "opt-post-ln",
    "opt-bare",
]
VARIANTS = pytest.mark.parametrize("name", SEPARATE)
STRUCTURES = [*SEPARATE, "phi3-partial-window-tied", "gpt_neox", "gpt_neox-sequential-tied", "gpt2", "qwen3"]
EVERY_STRUCTURE = pytest.mark.parametrize("name", STRUCTURES)
OUTPUT_NORMS = ("gemma2", "glm4", "olmo2")
METHODS = pytest.mark.parametrize("method", ["published", "residual matched"])
CONFIG = ModeGPTConfig(refit_iterations=0)
CPU = torch.device("cpu")


class Case:
    """The second block of a tiny model with its inputs. Nothing was fitted to the tokens `other`."""

    def __init__(self, name: str) -> None:
        self.architecture = resolve(dense(name))
        self.block: Block = self.architecture.blocks[1]
        self.front, other = (
            enter(self.architecture, tokens(6, 16, seed=seed), 3, StreamStorage(CPU)) for seed in (0, 1)
        )
        self.stream, self.other, self.arguments = self.front.stream, other.stream, self.front.on(1, CPU)

    def metrics(self) -> OutputMetrics:
        """Return the metrics of errors in the block, with the model's present weights."""
        gradients = output_gradients(self.architecture, self.front, CPU, seed=0, progress=False)[1]
        return OutputMetrics.of(gradients, self.block, CPU)

    def inputs(self, streams: StreamPair) -> CalibrationInputs:
        """Return the inputs of the block with these streams."""
        return CalibrationInputs(streams, self.arguments, torch.arange(len(streams.dense)), None)

    def cut(self, method: str, **ranks: int) -> tuple[Block, dict[str, float]]:
        """Return a copy of the block, with every part cut by `method` to the given rank or kept at full rank."""
        widths = replace(self.block.dense_widths, **ranks)
        student = self.block.compressible_copy(CPU)
        with torch.no_grad():
            if method == "published":
                moments, _ = published.observe(self.block, self.stream, self.arguments)
                return student, published.compress_block(student, moments, widths, CONFIG)
            targets = residual_matched.run_dense(self.block, self.stream, self.arguments)
            errors, _ = residual_matched.compress_block(
                student,
                self.inputs(StreamPair(self.stream, self.stream)),
                targets,
                widths,
                metrics=self.metrics(),
                config=CONFIG,
                keep_derivatives=False,
            )
        return student, errors

    def error(self, student: Block, stream: list[Tensor] | None = None) -> float:
        """Return the relative difference of the two blocks' outputs."""
        with torch.no_grad():
            pairs = [
                [b.forward(batch, self.arguments) for b in (student, self.block)] for batch in stream or self.stream
            ]
        return difference(*(torch.cat(outputs) for outputs in zip(*pairs, strict=True)))

    def part(self, role: str) -> Any:
        return self.block.module.get_submodule(getattr(self.block.family.attention, role))


@pytest.mark.parametrize("name", [*STRUCTURES, *OUTPUT_NORMS])
@METHODS
def test_full_rank_changes_nothing(name, method):
    case = Case(name)
    student, errors = case.cut(method)
    assert case.error(student) < 1e-4
    assert max(errors.values()) < 1e-3
    if method == "published" and not name.startswith("opt-post"):  # 96 tokens determine all directions
        assert case.error(student, case.other) < 1e-3


@VARIANTS
@METHODS
def test_value_bias_is_exact_at_any_rank(name, method):
    case = Case(name)
    with torch.no_grad():
        case.part("value").weight.zero_()  # only the bias of every value remains: one direction per group
    student, errors = case.cut(method, vo=1)
    assert errors["vo"] < 1e-3
    assert case.error(student, case.other) < 1e-4
    assert student.attention.v_proj.out_features == case.block.kv_heads


@VARIANTS
def test_output_stays_at_the_dense_one_on_the_new_basis_where_the_tokens_do_not_count(name):
    case = Case(name)
    block, config = case.block, ModeGPTConfig(output_ridge=1e12)
    with torch.no_grad():
        targets = residual_matched.run_dense(block, case.stream, case.arguments)
        heads = residual_matched.head_outputs(block, case.stream, case.arguments)
        moments = residual_matched.observe_output(block, case.stream, heads, targets)
        factors = residual_matched.cut_value_output(block, moments, case.metrics().attention, 3, config)
        bases = (factors.value @ torch.linalg.pinv(block.head_rows("value"))).mT  # (kv_heads, head_dim, 3)
    dense_output = block.input_outputs(block.output)
    rows = dense_output[:32].unflatten(0, (4, 8))  # (heads, head_dim, d_model)
    expected = torch.linalg.pinv(bases.repeat_interleave(4 // block.kv_heads, dim=0)) @ rows
    assert difference(factors.output[:12], expected.flatten(0, 1)) < 1e-6
    assert difference(factors.output[12:], dense_output[32:]) < 1e-6


@pytest.mark.parametrize("name", ["llama-mqa-biases", "opt"])
def test_value_bias_that_is_folded_into_the_output_steers_no_basis(name):
    case, errors, cuts = Case(name), [], []
    for bias in (0.0, 100.0):
        with torch.no_grad():
            case.part("value").bias.fill_(bias)
            moments, _ = published.observe(case.block, case.stream, case.arguments)
            factors = published.cut_value_output(case.block, moments.attention.values, 4)
        errors.append(factors.relative_error)
        cuts.append(factors.value[..., :-1].mT @ factors.value[..., :-1])  # free of signs
        assert factors.value[..., -1].abs().max() == 0
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    assert difference(cuts[1], cuts[0]) < 1e-3


@VARIANTS
@METHODS
def test_pairs_that_no_query_reads_go_without_loss(name, method):
    case = Case(name)
    silent = torch.tensor([1, 3, 5, 7])  # pairs 1 and 3 of 4, or single coordinates
    with torch.no_grad():
        query = case.part("query")
        for parameter in (query.weight, query.bias):
            if parameter is not None:
                parameter.view(case.block.heads, 8, -1)[:, silent] = 0
    student, errors = case.cut(method, qk=4)
    assert errors["qk"] < 1e-3
    assert case.error(student, case.other) < 1e-3
    if student.rotary:
        assert student.attention.rope_index.tolist() == [[0, 2]] * case.block.kv_heads


@METHODS
def test_normalised_pairs_that_nothing_reads_go_without_loss(method):
    case = Case("qwen3")
    with torch.no_grad():
        for role in ("query", "key"):
            case.part(role).weight.view(-1, 8, 32)[:, [1, 3, 5, 7]] = 0
    student, errors = case.cut(method, qk=4)
    assert errors["qk"] < 1e-3
    assert case.error(student, case.other) < 1e-3
    assert student.attention.rope_index.tolist() == [[0, 2]] * case.block.kv_heads
    assert student.head_norm("query").weight.shape == (4, 4)


def test_narrow_norms_have_the_divisors_of_the_dense_ones():
    case, norm = Case("qwen3"), "self_attn.q_norm"
    with torch.no_grad():
        student, _ = case.cut("residual matched", qk=6)
        factors = student.module.get_submodule(norm).weight, case.block.module.get_submodule(norm).weight
        divisors = []
        for block, gains in zip((student, case.block), factors, strict=True):
            with calls_of(block.module.get_submodule(norm)) as calls:
                block.forward(case.stream[0], case.arguments)
            before, after = calls.pop()
            divisors.append((gains * before / after).mean(-1))
    assert difference(*divisors) < 0.3
    assert difference(divisors[0], divisors[1].mean().expand_as(divisors[1])) > 0.1


@VARIANTS
def test_twin_channels_go_without_loss(name):
    case = Case(name)
    with torch.no_grad():
        for path in case.block.family.mlp.inputs:
            linear = case.block.module.get_submodule(path)
            for parameter in (linear.weight, linear.bias):
                if parameter is not None:
                    parameter[24:] = parameter[:24]
    student, errors = case.cut("residual matched", mlp=24)
    assert errors["mlp"] < 1e-2
    assert case.error(student) < 1e-3
    assert student.down.in_features == 24


@VARIANTS
@METHODS
def test_dead_channels_go_without_loss(name, method):
    case = Case(name)
    dead = torch.arange(0, 48, 2)
    with torch.no_grad():
        linear = case.block.module.get_submodule(case.block.family.mlp.inputs[0])
        linear.weight[dead] = 0  # SiLU(0) = ReLU(0) = 0
        if linear.bias is not None:
            linear.bias[dead] = 0
    student, errors = case.cut(method, mlp=24)
    assert errors["mlp"] < 1e-3
    assert case.error(student) < 1e-4
    if method == "published":
        survivors = student.module.get_submodule(student.family.mlp.inputs[0]).weight
        assert torch.equal(survivors, linear.weight[1::2])


@EVERY_STRUCTURE
def test_reported_error_is_that_of_the_block(name):
    case = Case(name)
    student, errors = case.cut("residual matched", vo=3, mlp=20)
    with torch.no_grad():
        targets = residual_matched.run_dense(case.block, case.stream, case.arguments)
        assert targets.attention_weights is not None
        assert targets.mlp_weights is not None
        lost, total = [0.0, 0.0], [0.0, 0.0]
        for index, batch in enumerate(case.stream):
            residual = student.residual
            after = residual.add_attention(batch, student.attend(residual.attention_input(batch), case.arguments))
            middle = residual.after_attention(after)
            end = residual.add_mlp(middle, student.mlp(residual.mlp_input(residual.mlp_stream(batch, middle))))
            for part, (wanted, found, start, weight) in enumerate(
                (
                    (targets.attention[index], after, batch, targets.attention_weights[index]),
                    (targets.mlp[index], end, middle, targets.mlp_weights[index]),
                )
            ):
                lost[part] += float((weight[..., None] * (wanted - found).square()).sum())
                total[part] += float((weight[..., None] * (wanted - start).square()).sum())
    for part, (a, b) in zip(("vo", "mlp"), zip(lost, total, strict=True), strict=True):
        assert errors[part] == pytest.approx((a / b) ** 0.5, rel=1e-2)
        assert errors[part] > 0.01


@pytest.mark.parametrize("name", ["llama-gqa-tied", "opt", "opt-post-ln"])
def test_reported_error_of_the_published_output_is_that_of_the_value_vectors(name):
    case = Case(name)
    with torch.no_grad():
        moments, _ = published.observe(case.block, case.stream, case.arguments)
        factors = published.cut_value_output(case.block, moments.attention.values, 3)
    assert 0.01 < factors.relative_error < 1
    with torch.no_grad():
        whole = published.cut_value_output(case.block, moments.attention.values, 8)
    assert whole.relative_error < 1e-6


@pytest.mark.parametrize("name", [*STRUCTURES, *OUTPUT_NORMS])
def test_refit_compensates_the_errors_of_earlier_blocks(name):
    case = Case(name)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(32) + 0.1 * torch.randn(32, 32, generator=generator)
    stream = 40 * case.stream  # the ridge of a refit falls with the number of tokens
    drifted = [batch @ mixing for batch in stream]
    student = case.block.compressible_copy(CPU)
    with torch.no_grad():
        targets = residual_matched.run_dense(case.block, stream, case.arguments)
        _, after = residual_matched.compress_block(
            student,
            case.inputs(StreamPair(stream, drifted)),
            targets,
            case.block.dense_widths,
            metrics=case.metrics(),
            config=CONFIG,
            keep_derivatives=False,
        )
        untouched = [case.block.forward(batch, case.arguments) for batch in drifted]
    errors = [difference(torch.cat(result), torch.cat(targets.after)) for result in (after, untouched)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("name", ["opt", "gpt2"])
@pytest.mark.parametrize("scale", [0.0, 1e-8, 1.0, 1e8])
def test_query_and_key_have_similar_weights_in_any_unit_of_the_metric(name, scale):
    case = Case(name)
    student, metric = case.block.compressible_copy(CPU), scale * moment(8).expand(4, -1, -1)
    with torch.no_grad():
        moments = residual_matched.observe_query_key(student, case.stream, metric, {})
        factors = residual_matched.cut_query_key(student, moments, None, 4, CONFIG)
    ratio = factors.query.norm() / factors.key.norm()
    limit = 1e2 if scale else 1e5  # the metric of a silent head is its damping
    assert 1 / limit < ratio < limit


@EVERY_STRUCTURE
def test_dense_targets_are_those_of_the_blocks_own_forward_pass(name):
    case = Case(name)
    with torch.no_grad():
        targets = residual_matched.run_dense(case.block, case.stream, case.arguments)
        expected = [case.block.forward(batch, case.arguments) for batch in case.stream]
    assert difference(torch.cat(targets.after), torch.cat(expected)) < 1e-6
    for weights in (targets.attention_weights, targets.mlp_weights):
        assert weights is not None
        assert float(torch.cat(weights).mean()) == pytest.approx(1)


@EVERY_STRUCTURE
@METHODS
def test_dense_block_is_left_as_it_was(name, method):
    case = Case(name)
    before = {key: value.clone() for key, value in case.block.module.state_dict().items()}
    case.cut(method, qk=4, vo=3, mlp=20)
    after = case.block.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize(("tokens", "rank", "matrices"), [(960, 48, 2), (480, 48, 1), (480, 24, 2)])
def test_gate_and_up_are_refitted_if_there_are_enough_tokens_for_their_rows(tokens, rank, matrices, monkeypatch):
    monkeypatch.setattr(input_refit, "TOKENS_PER_ROW", 10)
    assert input_refit.refits_inputs(tokens, rank, matrices, ModeGPTConfig())
    assert not input_refit.refits_inputs(tokens - 1, rank, matrices, ModeGPTConfig())
    assert not input_refit.refits_inputs(tokens, rank, matrices, CONFIG)
    monkeypatch.setattr(input_refit, "REFIT_TOKENS", tokens - 1)
    assert not input_refit.refits_inputs(10 * tokens, rank, matrices, ModeGPTConfig())
