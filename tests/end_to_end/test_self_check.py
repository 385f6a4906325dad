"""Test the self-check: compression fails, and `inspect --check` reports an error, if the result does not work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_configs import FAMILIES, VARIANTS
from tiny_models import compressed, dense, tokenizer, tokens
from torch import Tensor
from transformers.cache_utils import DynamicCache

from optimum_modegpt import ModeGPTConfig, NumericalError, UnsupportedModel
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.cli.main import main
from optimum_modegpt.compress import compress
from optimum_modegpt.walk.self_check import PREFILL, STEPS, check_reloads, self_check

CONFIG = ModeGPTConfig(sparsity=0.25, allocation="uniform", round_to=1)


def windows() -> TokenWindows:
    return TokenWindows(tokens(8, 24), {"name": "random"})


@pytest.fixture
def forgetful_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Patch the key-value cache to return only the new keys and values."""
    update = DynamicCache.update

    def forget(self: Any, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        update(self, key, value, *args, **kwargs)
        return key, value

    with monkeypatch.context() as patch:
        patch.setattr(DynamicCache, "update", forget)
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", VARIANTS)
def test_working_models_pass(name: str, dtype: torch.dtype) -> None:
    model = compressed(name).to(dtype)
    check_reloads(model)
    found = self_check(model, tokens(1, 40)[0])
    assert found.tokens == PREFILL + STEPS
    assert 0 < found.difference < found.tolerance / 2


def test_self_check_costs_less_than_one_window() -> None:
    model, seen = compressed("llama-mha"), []
    model.base_model.register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state.shape[1]))
    self_check(model, tokens(1, 60)[0])
    assert seen == [PREFILL + STEPS, PREFILL, *[1] * STEPS]
    assert sum(seen) < 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_cache_that_drops_decoded_tokens_fails(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    update = DynamicCache.update

    def keep_prefill(self: Any, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        if key.shape[2] > 1:
            return update(self, key, value, layer, *args, **kwargs)
        kept = self.layers[layer]
        return torch.cat((kept.keys, key), dim=2), torch.cat((kept.values, value), dim=2)

    monkeypatch.setattr(DynamicCache, "update", keep_prefill)
    with pytest.raises(UnsupportedModel, match="results with the key-value cache differ"):
        self_check(compressed(name).to(dtype), tokens(1, 40)[0])


def test_output_without_a_cache_fails() -> None:
    model = compressed("llama-mha")
    model.register_forward_hook(lambda module, arguments, output: output.__class__(logits=output.logits))
    with pytest.raises(UnsupportedModel, match="output has no key-value cache, only logits"):
        self_check(model, tokens(1, 40)[0])


@pytest.mark.usefixtures("forgetful_cache")
def test_failed_check_does_not_change_the_model() -> None:
    model = dense("llama-gqa-tied")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModel, match="results with the key-value cache differ from those without by 1"):
        compress(model, CONFIG, windows())
    assert type(model).__name__ == "LlamaForCausalLM"
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.usefixtures("forgetful_cache")
def test_failed_check_writes_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense("llama-gqa-tied").save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog, twice. " * 40)
    arguments = ["compress", str(tmp_path / "dense"), "--output", str(tmp_path / "small"), "--sparsity", "0.2"]
    arguments += ["--dataset", str(tmp_path / "text.txt"), "--num-samples", "8", "--sequence-length", "32"]
    assert main([*arguments, "--allocation", "uniform"]) == 2
    assert "error: self-check: results with the key-value cache differ" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_non_finite_logits_fail() -> None:
    model = compressed("llama-mha")
    model.lm_head.weight.data[5, 3] = torch.nan
    with pytest.raises(NumericalError, match="logits are not finite"):
        self_check(model, tokens(1, 12)[0])


def test_configuration_that_does_not_match_the_model_fails() -> None:
    model = compressed("qwen2")
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 9, bias=False)
    with pytest.raises(UnsupportedModel, match=r"would not find the tensors.*layers\.1\.mlp\.up_proj\.weight"):
        check_reloads(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_report_contains_the_self_check(name: str) -> None:
    report = compress(dense(name), CONFIG, windows())
    assert report.self_check["tokens"] == PREFILL + STEPS
    assert 0 < report.self_check["difference"] < 1e-4
    assert "self-check" in [stage.name for stage in report.stages]


@pytest.mark.parametrize("kind", ["compressed", "dense"])
def test_inspect_checks_compressed_and_dense_models(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = compressed("opt") if kind == "compressed" else dense("opt")
    model.save_pretrained(tmp_path / "model")
    assert main(["inspect", str(tmp_path / "model"), "--check", "--json", str(tmp_path / "found.json")]) == 0
    assert "self-check: logits of 12 tokens are finite, and equal with and without" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["self_check"]["difference"] < 1e-4


@pytest.mark.usefixtures("forgetful_cache")
def test_inspect_reports_a_wrong_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compressed("llama-mha").save_pretrained(tmp_path / "model")
    assert main(["inspect", str(tmp_path / "model"), "--check"]) == 2
    assert "The model would generate nonsense" in capsys.readouterr().err
