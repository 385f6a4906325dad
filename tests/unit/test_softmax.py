"""Test the Newton steps for the gain before a softmax: they converge, and the divergence never increases."""

from __future__ import annotations

import pytest
import torch
from laws import difference, normal
from torch import Tensor

from optimum_modegpt.decompositions.softmax import SoftmaxSample, match_softmax, split_sample

TOKENS, D_MODEL, VOCABULARY = 40, 6, 15
WANTED = 1 + 0.3 * normal(D_MODEL, seed=9)
OFFSET, HEAD = 0.5 * normal(VOCABULARY, seed=8), normal(VOCABULARY, D_MODEL, seed=7)


def sample(gain: Tensor, seed: int, loudness: Tensor | float = 1.0) -> SoftmaxSample:
    """Return tokens whose target distribution is that of `gain`."""
    features = loudness * normal(TOKENS, D_MODEL, seed=seed)
    return SoftmaxSample(features, ((gain * features) @ HEAD.T + OFFSET).softmax(-1))


def divergence(gain: Tensor, tokens: SoftmaxSample) -> float:
    log_q = ((gain * tokens.features) @ HEAD.T + OFFSET).log_softmax(-1)
    return float((tokens.target * (tokens.target.log() - log_q)).sum(-1).mean())


def test_steps_converge_to_the_gain_of_the_target_distribution():
    gain, divergences = torch.ones(D_MODEL).double(), []
    for _ in range(6):
        divergences.append(divergence(gain, sample(WANTED, 0)))
        gain = match_softmax(gain, OFFSET, HEAD, sample(WANTED, 0), sample(WANTED, 1))
    assert divergences[1] < 0.2 * divergences[0]
    assert difference(gain, WANTED) < 1e-5


def test_gain_that_meets_the_target_is_not_changed():
    assert torch.equal(match_softmax(WANTED, OFFSET, HEAD, sample(WANTED, 0), sample(WANTED, 1)), WANTED)


def test_step_that_does_not_help_on_held_back_tokens_is_rejected():
    start = torch.ones(D_MODEL).double()
    against = sample(2 * start - WANTED, 1)
    assert torch.equal(match_softmax(start, OFFSET, HEAD, sample(WANTED, 0), against), start)


@pytest.mark.parametrize("start", [0.01, 10.0])
def test_step_far_from_the_solution_reduces_the_divergence(start):
    gain = torch.full((D_MODEL,), start, dtype=torch.float64)
    moved = match_softmax(gain, OFFSET, HEAD, sample(WANTED, 0), sample(WANTED, 1))
    for seed in (0, 1):
        assert divergence(moved, sample(WANTED, seed)) < divergence(gain, sample(WANTED, seed))


def test_zero_channels_keep_their_gain():
    loud = torch.tensor([1.0, 0, 1, 1, 1, 1])
    fitted, held_back = (sample(WANTED, seed, loud) for seed in (0, 1))
    moved = match_softmax(torch.ones(D_MODEL).double(), OFFSET, HEAD, fitted, held_back)
    assert moved[1] == 1
    assert (moved != 1).sum() == D_MODEL - 1


@pytest.mark.parametrize(("count", "held"), [(1, [0]), (2, [1]), (8, [4]), (9, [2, 4]), (17, [2, 5, 15])])
def test_one_of_eight_windows_is_held_back(count, held):
    samples = [SoftmaxSample(torch.full((2, 1), float(i)), torch.zeros(2, 3)) for i in range(count)]
    fitted, held_back = split_sample(samples)
    assert held_back.features[::2, 0].tolist() == held
    expected = [0]  # the only window is used twice
    if count > 1:
        expected = [i for i in range(count) if i not in held]
    assert fitted.features[::2, 0].tolist() == expected
    assert len(fitted.target) == len(fitted.features)
