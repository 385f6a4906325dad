"""The placement of the residual streams and the batch size, by the free memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from optimum_modegpt import ModeGPTConfig
from optimum_modegpt.architectures import resolve
from optimum_modegpt.architectures.shapes import Shapes, shapes_of
from optimum_modegpt.budget.placement import MARGIN, MOST_TOKENS, Free, Needs, Placement, choose_placement
from optimum_modegpt.methods.cost import Extent, attention_scores
from optimum_modegpt.methods.registry import peaks_of
from optimum_modegpt.methods.sensitivity import budget
from optimum_modegpt.stages import StageClock

SHAPES = Shapes(
    d_model=4096,
    heads=4096,
    head_count=32,
    mlp=11008,
    mlp_inputs=2,
    weights=4 * 4096**2 + 3 * 4096 * 11008,
    vocabulary=32000,
    blocks=32,
)
"""Llama-2-7B."""

GIB = 2**30
PLENTY = 2**50


def placed(
    *, host: int = PLENTY, device: int | None = None, length: int = 2048, held: Needs | None = None, **recipe: object
) -> Placement:
    return choose_placement(
        SHAPES,
        ModeGPTConfig(allocation="uniform", **recipe),
        extent=Extent(128, length, length, 2),
        accelerated=device is not None,
        free=Free(host, device),
        held=held or Needs(),
    )


def needed(host: int, device: int | None = None, **recipe: object) -> tuple[int, int]:
    """Return the needed bytes on the host and on the accelerator."""
    needs = placed(host=host, device=device, **recipe).needs
    return sum(needs.host.values()), sum(needs.device.values())


def test_streams_are_near_the_computation() -> None:
    assert placed(device=PLENTY).streams == "device"
    assert placed(device=20 * GIB).streams == "host"
    assert placed(device=20 * GIB, host=4 * GIB).streams == "files"
    assert placed().streams == "host"
    assert placed(host=20 * GIB).streams == "files"


@pytest.mark.parametrize("device", [None, PLENTY, 30 * GIB, 20 * GIB])
@pytest.mark.parametrize("host", [PLENTY, 60 * GIB, 20 * GIB])
def test_the_placement_fits_with_a_margin(device: int | None, host: int) -> None:
    on_host, on_device = needed(host, device)
    assert on_host * MARGIN <= host
    assert device is None or on_device * MARGIN <= device


def test_a_placement_that_fits_without_the_margin_is_used_if_none_fits_with_it() -> None:
    barely = placed(device=int(1.01 * needed(PLENTY, 8 * GIB)[1]))
    assert (barely.streams, barely.batch_size) == ("host", placed(device=8 * GIB).batch_size)


def test_the_batch_is_as_large_as_it_helps() -> None:
    assert placed().batch_size == 2
    assert placed(length=100).batch_size == 40
    assert placed(length=8192).batch_size == 1
    assert placed(device=PLENTY).batch_size == MOST_TOKENS // 2048
    assert placed(device=PLENTY, length=64).batch_size == 128, "there are no more windows"
    assert placed(device=8 * GIB).batch_size < placed(device=15 * GIB).batch_size


def test_the_scores_of_an_eager_attention_count() -> None:
    windows, length, heads = 4, 512, 16
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=heads,
        vocab_size=300,
        attn_implementation="eager",
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    shapes = shapes_of(resolve(model))
    clock, ids = StageClock(torch.device("cpu")), torch.zeros(windows, length, dtype=torch.int64)
    before = clock.in_use()
    with torch.no_grad(), clock.stage("forward"):
        model(ids, use_cache=False, logits_to_keep=1)
    extent = Extent(windows, length, windows * length, 4)
    scores = attention_scores(shapes, extent)
    assert scores == heads * length**2 * windows * 8
    assert clock.stages[0].peak_memory - before == pytest.approx(scores, rel=0.2)
    fused = replace(shapes, eager=False)
    most = [
        max(sum(work.values()) for work, _ in peaks_of(each, ModeGPTConfig(method="paper"), extent, False))
        for each in (shapes, fused)
    ]
    assert most[0] > scores > most[1]


def test_gradients_count_the_scores_of_any_attention() -> None:
    """The gradients use plain products, so that they are the same in every run."""
    extent = Extent(128, 512, 4 * 512, 2)
    scores = 4 * 512 * 512 * SHAPES.head_count * 4
    default, paper = (
        max(sum(needed.values()) for needed, _ in peaks_of(SHAPES, ModeGPTConfig(method=method), extent, False))
        for method in ("default", "paper")
    )
    assert default > paper
    assert default > 2 * scores, "the scores and their gradients"


def test_gradients_of_all_blocks_count_as_streams() -> None:
    extent = Extent(128, 2048, 2048, 2)
    used = budget(SHAPES, 128, 2048)
    tokens = used.gradient_windows * used.length
    expected = 32 * tokens * (4096 + 2 * 4096) * 2
    for recipe in ({}, {"allocation": "uniform"}, {"method": "paper", "allocation": "sensitivity"}):
        for _, streams in peaks_of(SHAPES, ModeGPTConfig(**recipe), extent, False):
            assert streams["gradients"] == expected
    for recipe in ({"method": "paper"}, {"sparsity": 0.0}):
        for _, streams in peaks_of(SHAPES, ModeGPTConfig(**recipe), extent, False):
            assert "gradients" not in streams


def test_a_batch_size_that_was_asked_for_is_kept() -> None:
    assert placed(batch_size=7, host=0).batch_size == 7
    assert placed(batch_size=7, device=PLENTY).batch_size == 7


def test_the_smallest_placement_is_used_if_nothing_fits() -> None:
    for device in (None, 0):
        least = placed(host=0, device=device)
        assert (least.streams, least.batch_size) == ("files", 1)


def test_memory_that_is_held_counts() -> None:
    host = int(1.05 * MARGIN * needed(PLENTY)[0])
    assert placed(host=host).streams == "host"
    crowded = placed(host=host, held=Needs(host={"weights": 10 * GIB}))
    assert crowded.streams == "files"
    assert crowded.needs.host["weights"] == 10 * GIB
    blocks = {"finished blocks": 10 * GIB}
    assert placed(host=PLENTY, held=Needs(files=blocks)).needs.host.items() > blocks.items()
    spilled = placed(host=host, held=Needs(files=blocks)).needs
    assert spilled.files.items() > blocks.items()
    assert not spilled.host.keys() & blocks.keys()


def test_batches_in_transfer_count_if_streams_are_not_on_the_accelerator() -> None:
    assert "batches on their way" not in placed(device=PLENTY).needs.device
    for host in (PLENTY, 4 * GIB):
        found = placed(device=20 * GIB, host=host)
        batch = found.batch_size * 2048 * SHAPES.d_model * 2
        assert found.needs.device["batches on their way"] == 4 * batch, "two streams come, and two batches go"


def test_streams_on_an_accelerator_are_written_through_the_host() -> None:
    needs = placed(device=PLENTY).needs
    assert needs.host == {"streams to be written": 2 * 128 * 2048 * 4096 * 2}
    assert needs.device["residual streams"] > needs.host["streams to be written"]
    assert not needs.files
