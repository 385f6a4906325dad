"""Test tiny random models of the families that are not core: the battery that every family passes.

The core families pass the same tests, and more, in the other files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from subprocess_load import run_worker
from tiny_configs import OTHERS, REPRESENTATIVES
from tiny_models import compressed, dense, tokenizer, tokens
from torch import Tensor
from twins import dense_twin

from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.compress import compress
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.report import Report

FIRST = set(REPRESENTATIVES.values())
EVERY = pytest.mark.parametrize(
    "name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]
)
"""One variant of each family, and the further variants in the full matrix."""
METHOD = pytest.mark.parametrize("method", ["default", "paper"])
NEW = 6
TOLERANCE = 0.015
"""Of the sparsity of tiny models. A step of the width of experts can be 2 % of their weights."""
NO_STATIC_CACHE = {
    "falcon-alibi-sequential": "its alibi has another length than its mask",
    "gpt_neo": "it finds its window by the length of the cache",
}


def run(model: Any, **fields: Any) -> Report:
    windows = TokenWindows(tokens(10, 16, seed=7), {"name": "random tokens", "windows": 10})
    return compress(model, ModeGPTConfig(round_to=1, **fields), windows, device="cpu", progress=False)


def logits(model: Any, ids: Tensor, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **arguments).logits


@EVERY
@METHOD
def test_nothing_removed_is_the_dense_model(name: str, method: str) -> None:
    # The methods have different attention implementations here, so that both are compared with the dense model.
    model = dense(name, attn_implementation="eager") if method == "paper" else dense(name)
    ids = tokens(3, 16, seed=3)
    expected = logits(model, ids)
    assert run(model, sparsity=0.0, method=method).achieved_sparsity == 0
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=2e-5)


@pytest.fixture(scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """Compress the models of all selected tests by both methods, save them and run them in fresh processes.

    The first variant of each family is allocated by sensitivity, which is the slowest allocation, the others uniformly.

    Return the logits by variant and process: this one, one with the package, one with the code in the folder.
    """
    root = tmp_path_factory.mktemp("families")
    selected: list[Any] = [item for item in request.session.items if item.path == request.path]
    names = [item.callspec.params["name"] for item in selected if "saved" in item.fixturenames]
    found: dict[str, dict[str, Tensor]] = {}
    jobs: dict[str, list[dict[str, Any]]] = {"local": [], "remote": []}
    for name in names:
        found_sparsity = run(dense(name), sparsity=0.3, method="paper").achieved_sparsity
        assert found_sparsity == pytest.approx(0.3, abs=TOLERANCE), name
        model, folder = dense(name), root / name
        allocation = None if name in FIRST else "uniform"
        assert run(model, sparsity=0.3, allocation=allocation).achieved_sparsity == pytest.approx(0.3, abs=TOLERANCE), (
            name
        )
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        found[name] = {"own": logits(model, tokens())}
        for kind, listed in jobs.items():
            job = {"folder": str(folder), "auto": "AutoModelForCausalLM", "dtype": "float32"}
            listed.append(job | {"out": str(folder / f"{kind}.out")})
    for kind, listed in jobs.items():
        if listed:
            run_worker(listed, kind, root)
        for name in names:
            found[name][kind] = load_file(Path(root, name, f"{kind}.out"))["out"]
    return found


@EVERY
def test_thirty_percent_reloads_in_fresh_processes(name: str, saved: dict[str, dict[str, Tensor]]) -> None:
    # The kernel of experts depends on the alignment of their weights in memory.
    tolerance = 1e-5 if dense(name).config.to_dict().get("num_experts_per_tok") else 0.0
    for kind in ("local", "remote"):
        torch.testing.assert_close(saved[name][kind], saved[name]["own"], rtol=0, atol=tolerance)


@EVERY
def test_narrow_model_equals_its_zero_padded_dense_twin(name: str) -> None:
    model, ids = compressed(name), tokens()
    twin = dense_twin(model, name)
    for attention in ("eager", "sdpa") if model._supports_sdpa else ("eager",):
        twin.set_attn_implementation(attention)
        model.set_attn_implementation(attention)
        expected = logits(twin, ids)
        assert expected.std() > 0.5
        rounding = 2e-5 * max(1.0, float(expected.std()))
        torch.testing.assert_close(logits(model, ids), expected, atol=rounding, rtol=1e-5)


@EVERY
def test_cached_generation_matches_uncached_generation(name: str) -> None:
    model, ids = compressed(name), tokens()
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW}
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    if name in NO_STATIC_CACHE:
        pytest.skip(f"the dense class has no static cache either: {NO_STATIC_CACHE[name]}")
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, expected)


@EVERY
def test_left_padded_batch_matches_single_sequences(name: str) -> None:
    model, ids = compressed(name), tokens(2, 10)
    short = ids[:1, 4:]
    padded = torch.cat((torch.cat((torch.zeros(1, 4, dtype=torch.long), short), dim=1), ids[1:]))
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}
    found = model.generate(padded, attention_mask=mask, **options)
    for row, single in ((found[0, 4:], short), (found[1], ids[1:])):
        assert torch.equal(row, model.generate(single, attention_mask=torch.ones_like(single), **options)[0])


@EVERY
def test_bfloat16_is_close_to_float32(name: str) -> None:
    """Some models have a rotary table in float32, with queries and keys in bfloat16."""
    model, ids = compressed(name), tokens()
    expected = logits(model, ids)
    found = logits(model.to(torch.bfloat16), ids)
    assert found.dtype is torch.bfloat16
    errors = (found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() < 0.05  # of some tokens, a router chooses other experts


@EVERY
def test_training_reaches_every_parameter(name: str) -> None:
    model, ids = compressed(name).train(), tokens()
    model(ids, labels=ids).loss.backward()
    # A key bias changes no softmax without rotation and norms, so its gradient is only rounding.
    learned = [(key, each) for key, each in model.named_parameters() if each.requires_grad]
    silent = [key for key, each in learned if each.grad is None or each.grad.abs().max() < 1e-6]
    assert [key for key in silent if not key.endswith("k_proj.bias")] == []
