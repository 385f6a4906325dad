"""Test models with a vision tower: the text tower is compressed in place, and everything else stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from subprocess_load import run_worker
from tiny_configs import TOO_NEW, TOWERS, VOCABULARY
from tiny_models import fill, tokenizer, tokens
from torch import Tensor
from transformers import AutoModelForImageTextToText

from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.cli import main as cli
from optimum_modegpt.compress import compress
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import UnsupportedModel
from optimum_modegpt.report import Report

IMAGE_TOKEN, IMAGE_TOKENS = VOCABULARY - 1, 4
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 6, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8}
QWEN_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "depth": 2,
    "num_heads": 2,
    "patch_size": 2,
    "out_hidden_size": 32,
}
QWEN_TOKENS = {"image_token_id": IMAGE_TOKEN, "video_token_id": 0, "vision_start_token_id": 1, "vision_end_token_id": 2}


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def qwen_images(ids: Tensor) -> dict[str, Tensor]:
    """Return two images of 4 x 4 patches. Each gives 2 x 2 tokens, whose positions differ in height and width."""
    grid = torch.tensor([[1, 4, 4]] * 2)
    return {
        "pixel_values": images(32, 24),
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
    }


@dataclass(frozen=True)
class Tower:
    """A tiny model: the start of its class names, its configuration, and its inputs in addition to token ids."""

    name: str
    text: dict[str, Any]
    vision: dict[str, Any]
    more: dict[str, Any]
    images: Callable[[Tensor], dict[str, Tensor]] = field(default=qwen_images)

    def config(self, **text: Any) -> Any:
        config_class: Any = getattr(transformers, f"{self.name}Config")
        return config_class(text_config=TEXT | self.text | text, vision_config=self.vision, **self.more)


EVERY = {
    "gemma3": Tower(
        "Gemma3",
        WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 64},
        VISION | {"patch_size": 4},
        {"mm_tokens_per_image": IMAGE_TOKENS, "image_token_index": IMAGE_TOKEN, "bos_token_id": 1, "eos_token_id": 2},
        lambda ids: {"pixel_values": images(2, 3, 8, 8), "token_type_ids": (ids == IMAGE_TOKEN).long()},
    ),
    "mistral3": Tower(
        "Mistral3",
        {"model_type": "mistral", "head_dim": 12, "sliding_window": 6},
        VISION | {"model_type": "pixtral", "patch_size": 2, "head_dim": 8},
        {"image_token_index": IMAGE_TOKEN, "spatial_merge_size": 2},
        lambda _: {"pixel_values": images(2, 3, 8, 8), "image_sizes": torch.tensor([[8, 8]] * 2)},
    ),
    "qwen2_5_vl": Tower(
        "Qwen2_5_VL",
        WINDOW
        | {
            "use_sliding_window": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        QWEN_VISION | {"window_size": 8, "fullatt_block_indexes": [1]},
        QWEN_TOKENS,
    ),
    "qwen3_vl": Tower(
        "Qwen3VL",
        {
            "head_dim": 12,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
        },
        QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        QWEN_TOKENS,
    ),
}
INSTALLED = [name for name in TOWERS if name not in TOO_NEW]
TOWER = pytest.mark.parametrize("name", INSTALLED)


def model(name: str, **text: Any) -> Any:
    config = EVERY[name].config(**text)
    return fill(getattr(transformers, f"{EVERY[name].name}ForConditionalGeneration")(config)).eval()


def run(model: Any, **fields: Any) -> Report:
    windows = TokenWindows(tokens(10, 16, seed=7), {"name": "random tokens", "windows": 10})
    return compress(model, ModeGPTConfig(round_to=1, **fields), windows, device="cpu", progress=False)


def inputs(name: str) -> dict[str, Tensor]:
    ids = tokens(2, 14)
    for row, start in enumerate((3, 5)):
        ids[row, start : start + IMAGE_TOKENS] = IMAGE_TOKEN
    return {"input_ids": ids, **EVERY[name].images(ids)}


def logits(model: Any, arguments: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**arguments).logits


@TOWER
@pytest.mark.parametrize("method", ["default", "paper"])
def test_nothing_removed_is_the_dense_model_with_images_too(name: str, method: str) -> None:
    found, given = model(name), inputs(name)
    expected = logits(found, given)
    without = logits(found, given | {"pixel_values": -given["pixel_values"]})
    assert (without - expected).abs().max() > 1e-3  # the image matters
    run(found, sparsity=0.0, method=method)
    assert type(found).__name__ == f"ModeGPT{EVERY[name].name}ForConditionalGeneration"
    torch.testing.assert_close(logits(found, given), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Compress and save every model."""
    root, made = tmp_path_factory.mktemp("towers"), {}
    for name in INSTALLED:
        found = model(name)
        assert run(found, sparsity=0.3).achieved_sparsity == pytest.approx(0.3, abs=0.01)
        found.save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
        made[name] = found, root / name
    return made


@TOWER
def test_only_the_blocks_of_the_text_tower_change(name: str, compressed: dict[str, tuple[Any, Path]]) -> None:
    found, dense = compressed[name][0].state_dict(), model(name).state_dict()
    changed = {key for key in dense if key not in found or not torch.equal(found[key], dense[key])}
    assert changed
    for key in changed:
        assert key.startswith(("model.language_model.layers.", "model.language_model.norm.")), key


@TOWER
def test_reload_with_images(name: str, compressed: dict[str, tuple[Any, Path]]) -> None:
    found, folder = compressed[name]
    values = json.loads((folder / "config.json").read_text())["text_config"]
    assert values["model_type"] == f"modegpt_{model(name).config.get_text_config().model_type}"
    assert len(values["per_layer_config"]) == 3
    reloaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert torch.equal(logits(reloaded, inputs(name)), logits(found, inputs(name)))


def test_fresh_processes_compute_the_same(compressed: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    for kind in ("local", "remote"):
        jobs: list[dict[str, Any]] = []
        for name, (_, folder) in compressed.items():
            for auto in ("AutoModelForImageTextToText", "AutoModelForCausalLM"):
                out = str(tmp_path / f"{kind}-{name}-{auto}")
                jobs.append({"folder": str(folder), "auto": auto, "dtype": "float32", "out": out})
        run_worker(jobs, kind, tmp_path)
        for job in jobs:
            found, _ = compressed[Path(job["folder"]).name]
            assert torch.equal(load_file(job["out"])["out"], logits(found, {"input_ids": tokens()})), job


@TOWER
def test_cached_generation_with_an_image(name: str, compressed: dict[str, tuple[Any, Path]]) -> None:
    found, options = compressed[name][0], {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    expected = found.generate(**inputs(name), use_cache=False, **options)
    assert torch.equal(found.generate(**inputs(name), **options), expected)


def test_a_text_tower_of_another_type_is_refused() -> None:
    found = model("mistral3", model_type="ministral3")
    with pytest.raises(UnsupportedModel, match=r"text tower of type 'ministral3'; .* only with one of type 'mistral'"):
        run(found, sparsity=0.3)


def test_the_commands_handle_a_model_with_a_vision_tower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, small, text = tmp_path / "dense", tmp_path / "small", tmp_path / "text.txt"
    model("qwen3_vl").save_pretrained(dense)
    tokenizer().save_pretrained(dense)
    (dense / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessor"}')
    text.write_text("a picture of a small model with a vision tower. " * 20)
    options = ["--sparsity", "0.3", "--dataset", str(text), "--num-samples", "8", "--sequence-length", "32"]
    assert cli.main(["compress", str(dense), "--output", str(small), *options]) == 0
    for name in ("preprocessor_config.json", "tokenizer.json"):
        assert (small / name).read_bytes() == (dense / name).read_bytes()
    capsys.readouterr()
    assert cli.main(["inspect", str(small), "--check"]) == 0
    assert "self-check" in capsys.readouterr().out
