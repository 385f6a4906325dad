"""Test models with a vision tower: the text tower is compressed in place, and everything else stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from subprocess_load import run_worker
from tiny_configs import VOCABULARY
from tiny_models import fill, tokenizer, tokens
from torch import Tensor
from transformers import AutoModelForImageTextToText, Gemma3Config, Gemma3ForConditionalGeneration

from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.compress import compress
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.report import Report

IMAGE_TOKEN, IMAGE_TOKENS = VOCABULARY - 1, 4
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 64,
    "sliding_window": 6,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "max_position_embeddings": 64,
}


def model() -> Any:
    config_class: Any = Gemma3Config
    config = config_class(
        text_config=TEXT,
        vision_config=VISION,
        mm_tokens_per_image=IMAGE_TOKENS,
        image_token_index=IMAGE_TOKEN,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return fill(Gemma3ForConditionalGeneration(config)).eval()


def run(model: Any, **fields: Any) -> Report:
    windows = TokenWindows(tokens(10, 16, seed=7), {"name": "random tokens", "windows": 10})
    return compress(model, ModeGPTConfig(round_to=1, **fields), windows, device="cpu", progress=False)


def inputs() -> dict[str, Tensor]:
    ids = tokens(2, 14)
    ids[:, 3 : 3 + IMAGE_TOKENS] = IMAGE_TOKEN
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == IMAGE_TOKEN).long()}


def logits(model: Any, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(**(inputs() | arguments)).logits


@pytest.mark.parametrize("method", ["default", "paper"])
def test_nothing_removed_is_the_dense_model_with_images_too(method: str) -> None:
    found = model()
    expected = logits(found)
    without = logits(found, pixel_values=-inputs()["pixel_values"])
    assert (without - expected).abs().max() > 1e-3  # the image matters
    run(found, sparsity=0.0, method=method)
    assert type(found).__name__ == "ModeGPTGemma3ForConditionalGeneration"
    torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    found, folder = model(), tmp_path_factory.mktemp("tower") / "model"
    assert run(found, sparsity=0.3).achieved_sparsity == pytest.approx(0.3, abs=0.01)
    found.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return found, folder


def test_only_the_blocks_of_the_text_tower_change(compressed: tuple[Any, Path]) -> None:
    found, dense = compressed[0].state_dict(), model().state_dict()
    changed = {name for name in dense if name not in found or not torch.equal(found[name], dense[name])}
    assert changed
    for name in changed:
        assert name.startswith(("model.language_model.layers.", "model.language_model.norm.")), name


def test_reload_with_images(compressed: tuple[Any, Path]) -> None:
    found, folder = compressed
    values = json.loads((folder / "config.json").read_text())
    assert values["text_config"]["model_type"] == "modegpt_gemma3_text"
    assert len(values["text_config"]["per_layer_config"]) == 3
    reloaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert torch.equal(logits(reloaded), logits(found))


def test_fresh_processes_compute_the_same(compressed: tuple[Any, Path], tmp_path: Path) -> None:
    found, folder = compressed
    with torch.no_grad():
        expected = found(tokens()).logits
    for kind in ("local", "remote"):
        jobs: list[dict[str, Any]] = []
        for auto in ("AutoModelForImageTextToText", "AutoModelForCausalLM"):
            out = str(tmp_path / f"{kind}-{auto}")
            jobs.append({"folder": str(folder), "auto": auto, "dtype": "float32", "out": out})
        run_worker(jobs, kind, tmp_path)
        for job in jobs:
            assert torch.equal(load_file(job["out"])["out"], expected)


def test_cached_generation_with_an_image(compressed: tuple[Any, Path]) -> None:
    found, options = compressed[0], {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    expected = found.generate(**inputs(), use_cache=False, **options)
    assert torch.equal(found.generate(**inputs(), **options), expected)
