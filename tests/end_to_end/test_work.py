"""The products that a compression computes, counted while it runs, against those that the cost model expects."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from tiny_models import fill
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from optimum_modegpt import ModeGPTConfig
from optimum_modegpt.architectures import resolve
from optimum_modegpt.architectures.shapes import shapes_of
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.compress import compress
from optimum_modegpt.decompositions.gauss_newton import _Linearised
from optimum_modegpt.decompositions.psd import products_of
from optimum_modegpt.methods.cost import Extent, product_seconds
from optimum_modegpt.methods.registry import work_of
from optimum_modegpt.stages import StageClock, product_rates

WINDOWS, LENGTH = 8, 64
SHAPE = LlamaConfig(
    hidden_size=128,
    intermediate_size=352,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=2,
    vocab_size=64,
    max_position_embeddings=LENGTH,
)


class Untracked(nullcontext[None]):
    """Attributes all products to the whole. The tracker of modules takes no inputs that are differentiated."""

    parents = ("Global",)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Count the multiply-adds of all products by stage, while a compression runs."""
    counts: dict[str, float] = {}
    timed = StageClock.stage

    @contextmanager
    def stage(clock: StageClock, name: str) -> Iterator[None]:
        counter = FlopCounterMode(display=False)
        monkeypatch.setattr(counter, "mod_tracker", Untracked())
        with counter, timed(clock, name):
            yield
        counts[name] = counter.get_total_flops() / 2

    monkeypatch.setattr(StageClock, "stage", stage)
    return counts


@pytest.fixture
def every_step_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no refit of gate and up end early."""
    measured, calls = _Linearised.true_error, itertools.count()

    def error(linearised: _Linearised, *arguments: Any) -> float:
        measured(linearised, *arguments)
        return -float(next(calls))

    monkeypatch.setattr(_Linearised, "true_error", error)


@pytest.mark.usefixtures("every_step_helps")
@pytest.mark.parametrize("refit_iterations", [0, 4])
# Solves and factorisations are not among the products that are counted.
@pytest.mark.parametrize("allocation", ["uniform", "influence", "sensitivity"])
def test_products_are_near_the_floor(allocation: str, refit_iterations: int, counted: dict[str, float]) -> None:
    model = fill(AutoModelForCausalLM.from_config(SHAPE))
    tokens = torch.randint(64, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    config = ModeGPTConfig(sparsity=0.3, allocation=allocation, refit_iterations=refit_iterations, round_to=8)
    shapes = shapes_of(resolve(model))
    report = compress(model, config, TokenWindows(tokens, {}), progress=False)
    widths = [block.parts["mlp"].rank for block in report.blocks]
    extent = Extent(WINDOWS, LENGTH, WINDOWS * LENGTH, 4)
    floor = work_of(shapes, config, extent, widths=widths)
    assert (allocation == "uniform") == (not floor["allocate"])
    for stage, name in (
        ("gradients", "gradients"),
        ("allocate", f"allocate ({allocation})"),
        ("decompose", "decompose"),
    ):
        needed = sum(sum(work.values()) - work.get("exact", 0) for work in floor[stage].values())
        # A block that is not cut, as the first may be, takes less.
        assert 0.6 * needed <= counted[name] <= 1.7 * needed, stage
    timed = {stage.name: stage.floor for stage in report.stages}
    for stage in ("gradients", "decompose"):
        assert timed[stage].keys() == floor[stage].keys()
        assert all(seconds > 0 for seconds in timed[stage].values())


def test_several_precisions_take_their_own_time() -> None:
    rates = {"own": 3, "moments": 3, "raised": 2, "exact": 0.5}
    assert product_seconds({"own": 6, "moments": 3, "raised": 4, "exact": 1}, rates) == 7
    assert product_seconds({"raised": 4}, rates) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_precision_has_a_rate(dtype: torch.dtype) -> None:
    rates = product_rates.__wrapped__(torch.device("cpu"), dtype)
    assert rates.keys() == {"own", "moments", "raised", "exact"}
    assert min(rates.values()) > 0


def test_16_bit_models_let_products_round_and_others_do_not() -> None:
    units = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [unit.fp32_precision for unit in units]
    with products_of(torch.float32):
        assert [unit.fp32_precision for unit in units] == before
    with products_of(torch.bfloat16):
        assert [unit.fp32_precision for unit in units] == ["tf32", "bf16"]
    with products_of(torch.float16):
        assert [unit.fp32_precision for unit in units] == ["tf32", before[1]]
    assert [unit.fp32_precision for unit in units] == before
