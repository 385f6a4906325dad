"""Test sums over tokens: moments of 16-bit activations, token weights, slopes between two streams, block influence."""

from __future__ import annotations

import pytest
import torch
from laws import difference, linear_moments, normal
from tiny_models import dense
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from optimum_modegpt.architectures import resolve
from optimum_modegpt.architectures.norms import gain, set_gain
from optimum_modegpt.calibration.influence import InfluenceSum
from optimum_modegpt.calibration.moments import (
    HeadMomentSum,
    HeadSamples,
    LinearMomentSum,
    SlopeSum,
    token_weights,
    with_ones,
    without_gain,
)
from optimum_modegpt.decompositions import psd
from optimum_modegpt.decompositions.head_norm import row_factors
from optimum_modegpt.decompositions.least_squares import LinearMoments
from optimum_modegpt.modeling.modegpt_family import Norm

SHAPE = (2, 9)
NORMS = pytest.mark.parametrize("norm", [nn.LayerNorm(6), LlamaRMSNorm(6)], ids=["layer norm", "rms norm"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_sum_over_batches_equals_the_moments_of_all_tokens(dtype, ones, weighted):
    total, batches = LinearMomentSum(ones=ones), []
    for seed in range(3):
        inputs, target = normal(*SHAPE, 5, seed=seed).to(dtype), normal(*SHAPE, 4, seed=seed + 10).to(dtype)
        weight = normal(*SHAPE, seed=seed + 20).exp().float() if weighted else None
        total.add(inputs, target, weight)
        batches.append((inputs, target, torch.ones(SHAPE) if weight is None else weight))
    tokens = [torch.cat(parts).flatten(0, 1).double() for parts in zip(*batches, strict=True)]
    expected, found = linear_moments(*tokens, ones=ones), total.value()
    assert found.gram.dtype == found.cross.dtype == torch.float64
    assert difference(found.gram, expected.gram) < 1e-6
    assert difference(found.cross, expected.cross) < 1e-6
    assert float(found.energy) == pytest.approx(float(expected.energy), rel=1e-6)


def sums_of(inputs: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, *, ones: bool) -> LinearMoments:
    total = LinearMomentSum(ones=ones)
    total.add(inputs, target, weight)
    return total.value()


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_head_moments_are_summed_over_the_query_heads_of_a_group(groups):
    query, total = normal(*SHAPE, 4, 6), HeadMomentSum(groups)
    total.add(query[:1])
    total.add(query[1:])
    expected = torch.zeros(groups, 6, 6).double()
    for token in query.flatten(0, 1):
        for head, vector in enumerate(token):
            expected[head // (4 // groups)] += torch.outer(vector, vector)
    assert difference(total.value(), expected) < 1e-6


@pytest.mark.parametrize("width", [5, 300])
@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_16_bit_rows_are_summed_in_float32(width, ones, weighted, sums_in_float32, monkeypatch):
    monkeypatch.setattr(psd, "GRAM_WIDTH", 64)
    inputs, target = normal(*SHAPE, width).bfloat16(), normal(*SHAPE, 4, seed=1).float()
    weight = normal(*SHAPE, seed=2).exp().float() if weighted else None
    found = sums_of(inputs, target, weight, ones=ones)
    assert set(sums_in_float32) == {torch.bfloat16}
    tokens = [x.double().flatten(0, 1) for x in (inputs, target)]
    expected = linear_moments(*tokens, None if weight is None else weight.double().flatten(), ones=ones)
    rounding = torch.finfo(torch.bfloat16).eps
    assert difference(found.gram, expected.gram) < (rounding if weighted else 1e-6)
    assert torch.equal(found.gram, found.gram.T)
    assert difference(found.cross, expected.cross) < rounding
    assert float(found.energy) == pytest.approx(float(expected.energy), rel=rounding)
    assert found.gram.dtype == found.cross.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_dtypes_do_not_use_the_16_bit_kernel(dtype, request):
    inputs, target, weight = normal(*SHAPE, 5).to(dtype), normal(*SHAPE, 4, seed=1).to(dtype), normal(*SHAPE).exp()
    weight = weight.to(torch.promote_types(dtype, torch.float32))
    expected = sums_of(inputs, target, weight, ones=True)
    calls = request.getfixturevalue("sums_in_float32")
    found = sums_of(inputs, target, weight, ones=True)
    assert calls == []
    assert all(torch.equal(getattr(found, name), getattr(expected, name)) for name in ("gram", "cross", "energy"))


@pytest.mark.parametrize("weighted", [False, True])
def test_16_bit_rows_are_converted_if_the_device_cannot_sum_them_in_float32(weighted):
    inputs, target = normal(*SHAPE, 5).bfloat16(), normal(*SHAPE, 4, seed=1).float()
    weight = normal(*SHAPE, seed=2).exp().float() if weighted else None
    found = sums_of(inputs, target, weight, ones=True)
    root = 1 if weight is None else weight.flatten().sqrt()[:, None]
    rows, targets = root * with_ones(inputs.float().flatten(0, 1)), root * target.flatten(0, 1)
    assert torch.equal(found.gram, (rows.T @ rows).double())
    assert torch.equal(found.cross, (rows.T @ targets).double())
    assert torch.equal(found.energy, targets.square().sum().double())


def test_kernel_that_rounds_its_sums_is_not_used(sums_in_float32):
    assert psd.row_type(torch.device("cpu"), torch.bfloat16) == torch.bfloat16
    psd.row_type.cache_clear()
    sums_in_float32.rounds = True
    assert psd.row_type(torch.device("cpu"), torch.bfloat16) == torch.float32


def test_constant_input_is_the_last_column():
    assert with_ones(torch.zeros(3, 2)).tolist() == [[0, 0, 1]] * 3


def test_token_weight_is_the_inverse_square_of_the_next_norm():
    residual = normal(*SHAPE, 6).float() * 3 + 2
    centred = residual - residual.mean(-1, keepdim=True)
    assert difference(token_weights(residual, Norm()), 1 / residual.square().mean(-1)) < 1e-6
    assert difference(token_weights(residual, Norm(centred=True)), 1 / centred.square().mean(-1)) < 1e-6


@pytest.mark.parametrize("centred", [False, True])
def test_zero_token_has_a_finite_weight(centred):
    assert token_weights(torch.zeros(6), Norm(centred=centred)) == pytest.approx(1e8)


@NORMS
def test_slope_is_the_least_squares_slope_between_the_normalised_streams(norm):
    with torch.no_grad():
        norm.weight.copy_(normal(6) * torch.tensor([1, 1, 0, 1, 1, 1]))
        if isinstance(norm, nn.LayerNorm):
            norm.bias.copy_(normal(6, seed=1))
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    total = SlopeSum(norm, Norm())
    dense, compressed = normal(*SHAPE, 6, seed=2).float(), normal(*SHAPE, 6, seed=3).float()
    for index in range(2):
        total.add(dense[index], compressed[index])

    def bare(stream):
        centred = stream - stream.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else stream
        return (centred / centred.square().mean(-1, keepdim=True).sqrt()).flatten(0, 1)

    expected = (bare(dense) * bare(compressed)).sum(0) / bare(compressed).square().sum(0)
    assert difference(total.value(), expected) < 1e-3
    assert all(torch.equal(norm.state_dict()[name], tensor) for name, tensor in before.items())


def test_gain_of_a_norm_that_adds_one():
    norm, kind = GemmaRMSNorm(6), Norm(offset=1.0)
    with torch.no_grad():
        norm.weight.copy_(normal(6))
    stream = normal(*SHAPE, 6, seed=2).float()
    once, bare = norm(stream), without_gain(norm, kind)
    assert difference(gain(norm, kind) * bare(stream), once) < 1e-6
    set_gain(norm, kind, 2 * gain(norm, kind))
    assert difference(norm(stream), 2 * once) < 1e-6


def test_zero_channel_has_slope_one():
    total = SlopeSum(LlamaRMSNorm(6), Norm())
    stream = normal(*SHAPE, 6).float() * torch.tensor([1, 1, 0, 1, 1, 1.0])
    total.add(stream, stream)
    assert total.value().tolist() == pytest.approx([1] * 6)


def test_influence_is_one_minus_the_mean_cosine():
    before, after = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    total = InfluenceSum()
    total.add(before[:1], after[:1])
    total.add(before[1:], after[1:])
    cosines = [
        float(a @ b / a.norm() / b.norm()) for a, b in zip(before.flatten(0, 1), after.flatten(0, 1), strict=True)
    ]
    assert total.value() == pytest.approx(1 - sum(cosines) / 6, abs=1e-6)


def test_block_that_only_scales_has_zero_influence():
    total = InfluenceSum()
    total.add(normal(2, 3, 4), 7 * normal(2, 3, 4))
    assert total.value() == pytest.approx(0, abs=1e-6)


def test_a_rank_without_tokens_has_an_empty_sample_of_queries_and_keys():
    block = resolve(dense("qwen3")).blocks[0].compressible_copy(torch.device("cpu"))
    samples = HeadSamples(block, 0).value()
    assert {role: tuple(sample.shape) for role, sample in samples.items()} == {"query": (4, 0, 8), "key": (2, 0, 8)}
    maps, sums = torch.eye(8, dtype=torch.float64)[:6].expand(4, -1, -1), []

    def total(own):
        sums.append(own)
        return own + torch.ones_like(own)  # those of the other ranks

    assert torch.isfinite(row_factors(samples["query"], maps, total, rotated=False, joint=False)).all()
    assert len(sums) == 2
    assert not any(own.any() for own in sums)
