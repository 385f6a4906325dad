"""Test that the embedded model shows the cost of a compression and the differences between methods."""

from __future__ import annotations

from typing import Any

import pytest
from demo_model import text as demo_text
from quality import mlp_only
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_modegpt import ModeGPTConfig, demo, perplexity
from optimum_modegpt.calibration.data import calibration_windows, evaluation_windows
from optimum_modegpt.compress import compress

LENGTH = 256


@pytest.fixture(scope="module")
def scores() -> dict[str, float]:
    """Return the perplexity on held-out text of the dense model, and after removing 30 % with each recipe."""
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    text = evaluation_windows(str(demo.EVALUATION_TEXT), tokenizer, sequence_length=LENGTH, max_windows=32)
    found = {"dense": perplexity(load(), text.tokens).perplexity}
    for recipe, fields in {"default": {}, "paper": {"allocation": "uniform"}, "mlp only": {}}.items():
        method: Any = "default" if recipe == "default" else "paper"
        config = ModeGPTConfig(dataset=str(demo.CALIBRATION_TEXT), num_samples=32, method=method, round_to=1, **fields)
        model = load()
        windows = calibration_windows(config, tokenizer, sequence_length=LENGTH)
        plan = mlp_only(model, config) if recipe == "mlp only" else None
        report = compress(model, config, windows, plan=plan, progress=False)
        assert report.achieved_sparsity == pytest.approx(0.3, abs=0.005)
        found[recipe] = perplexity(model, text.tokens).perplexity
    return found


def load() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo.MODEL_DIR)


def test_thirty_percent_cost_less_than_half_of_the_perplexity(scores: dict[str, float]) -> None:
    assert scores["default"] < 1.5 * scores["dense"]


def test_the_published_method_is_clearly_worse_and_the_mlps_alone_worse_still(scores: dict[str, float]) -> None:
    assert 1.5 * scores["default"] < scores["paper"] < scores["mlp only"]


def test_the_demo_is_small() -> None:
    files = [path for path in demo.MODEL_DIR.iterdir()] + [demo.CALIBRATION_TEXT, demo.EVALUATION_TEXT]
    assert sum(path.stat().st_size for path in files) <= 3_000_000


def test_the_generator_reproduces_the_texts() -> None:
    for file, seed, held_out in ((demo.CALIBRATION_TEXT, 1, False), (demo.EVALUATION_TEXT, 2, True)):
        first_pages = demo_text.write_text(seed, 10_000, held_out=held_out)
        assert file.read_text(encoding="utf-8").startswith(first_pages.rstrip("\n"))
