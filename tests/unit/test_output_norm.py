"""Test the targets of outputs that are normalised before they are added to the stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

from optimum_modegpt.calibration.moments import token_weights
from optimum_modegpt.methods.output_norm import before_norm
from optimum_modegpt.modeling.modegpt_family import Norm

D = 16
KINDS = {
    "rms": (nn.RMSNorm(D), Norm()),
    "gemma": (Gemma2RMSNorm(D), Norm(offset=1.0)),
    "layer norm": (nn.LayerNorm(D), Norm(centred=True)),
}
EACH = pytest.mark.parametrize(("norm", "kind"), KINDS.values(), ids=list(KINDS))


@pytest.fixture(autouse=True)
def _random_norms() -> None:
    torch.manual_seed(0)
    for norm, _ in KINDS.values():
        for parameter in norm.parameters():
            nn.init.normal_(parameter, std=0.3)
        if not isinstance(norm, Gemma2RMSNorm):
            nn.init.normal_(norm.weight, mean=1.0, std=0.3)


@EACH
@torch.no_grad()
def test_an_output_without_errors_is_its_own_target(norm: Any, kind: Norm) -> None:
    output, weight = 3 * torch.randn(2, 5, D), torch.rand(2, 5)
    target, found = before_norm(output, norm(output), weight, norm, kind)
    torch.testing.assert_close(target, output)
    torch.testing.assert_close(found, weight * token_weights(output, kind))


@EACH
@torch.no_grad()
def test_the_norm_of_the_target_is_nearly_the_wanted_one(norm: Any, kind: Norm) -> None:
    output = 3 * torch.randn(2, 5, D)
    wanted = norm(output + 0.01 * torch.randn(2, 5, D))
    target, _ = before_norm(output, wanted, torch.ones(2, 5), norm, kind)
    error = (norm(target) - wanted).norm() / (norm(output) - wanted).norm()
    assert error < 0.1


@EACH
@torch.no_grad()
def test_the_change_has_no_part_that_the_norm_removes(norm: Any, kind: Norm) -> None:
    output, wanted = 3 * torch.randn(2, 5, D), torch.randn(2, 5, D)
    target, _ = before_norm(output, wanted, torch.ones(2, 5), norm, kind)
    change = target - output
    centred = output - output.mean(-1, keepdim=True) if kind.centred else output
    cosine = nn.functional.cosine_similarity(change, centred, dim=-1)
    assert cosine.abs().max() < 1e-5
    if kind.centred:
        assert change.mean(-1).abs().max() < 1e-5
