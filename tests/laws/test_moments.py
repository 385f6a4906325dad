"""Sums over tokens: moments of 16-bit activations, token weights, slopes between two streams, block influence."""

from __future__ import annotations

import pytest
import torch
from laws import difference, linear_moments, normal
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from optimum_modegpt.calibration.influence import InfluenceSum
from optimum_modegpt.calibration.moments import LinearMomentSum, SlopeSum, token_weights, with_ones

SHAPE = (2, 9)
NORMS = pytest.mark.parametrize("norm", [nn.LayerNorm(6), LlamaRMSNorm(6)], ids=["layer norm", "rms norm"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_over_batches_are_the_moments_of_all_tokens(dtype, ones, weighted):
    total, batches = LinearMomentSum(ones=ones), []
    for seed in range(3):
        inputs, target = normal(*SHAPE, 5, seed=seed).to(dtype), normal(*SHAPE, 4, seed=seed + 10).to(dtype)
        weight = normal(*SHAPE, seed=seed + 20).exp().float() if weighted else None
        total.add(inputs, target, weight)
        batches.append((inputs, target, torch.ones(SHAPE) if weight is None else weight))
    tokens = [torch.cat([batch[i].flatten(0, 1) for batch in batches]).double() for i in range(3)]
    expected, found = linear_moments(*tokens, ones=ones), total.value()
    assert found.gram.dtype == found.cross.dtype == torch.float64
    assert difference(found.gram, expected.gram) < 1e-6
    assert difference(found.cross, expected.cross) < 1e-6
    assert float(found.energy) == pytest.approx(float(expected.energy), rel=1e-6)


def test_constant_input_stands_last():
    assert with_ones(torch.zeros(3, 2)).tolist() == [[0, 0, 1]] * 3


def test_token_weight_is_what_the_next_norm_divides_by():
    residual = normal(*SHAPE, 6).float() * 3 + 2
    centred = residual - residual.mean(-1, keepdim=True)
    assert difference(token_weights(residual, LlamaRMSNorm(6)), 1 / residual.square().mean(-1)) < 1e-6
    assert difference(token_weights(residual, nn.LayerNorm(6)), 1 / centred.square().mean(-1)) < 1e-6


@NORMS
def test_silent_token_has_a_finite_weight(norm):
    assert token_weights(torch.zeros(6), norm) == pytest.approx(1e8)


@NORMS
def test_slope_is_the_least_squares_between_the_normalised_streams(norm):
    with torch.no_grad():
        norm.weight.copy_(normal(6) * torch.tensor([1, 1, 0, 1, 1, 1]))
        if isinstance(norm, nn.LayerNorm):
            norm.bias.copy_(normal(6, seed=1))
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    total = SlopeSum(norm)
    dense, compressed = normal(*SHAPE, 6, seed=2).float(), normal(*SHAPE, 6, seed=3).float()
    for index in range(2):
        total.add(dense[index], compressed[index])

    def bare(stream):
        centred = stream - stream.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else stream
        return (centred / centred.square().mean(-1, keepdim=True).sqrt()).flatten(0, 1)

    expected = (bare(dense) * bare(compressed)).sum(0) / bare(compressed).square().sum(0)
    assert difference(total.value(), expected) < 1e-3
    assert all(torch.equal(norm.state_dict()[name], tensor) for name, tensor in before.items())


def test_silent_channel_has_slope_one():
    total = SlopeSum(LlamaRMSNorm(6))
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


def test_block_that_only_scales_has_no_influence():
    total = InfluenceSum()
    total.add(normal(2, 3, 4), 7 * normal(2, 3, 4))
    assert total.value() == pytest.approx(0, abs=1e-6)
