"""Test the contract with transformers and serving engines: renamed arguments, and sources that engines read."""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from forks import run_forked
from tiny_configs import FAMILIES, INSTALLED, TOO_NEW
from tiny_models import compressed, dense, tokens
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from optimum_modegpt.architectures import check_model_type, family_of
from optimum_modegpt.modeling.modegpt_contract import (
    CACHE_NAMES,
    KNOWN_VERSIONS,
    cache_field,
    check_attention,
    check_loading,
)

FAMILY = pytest.mark.parametrize("name", FAMILIES)

# Renames the cache argument of Llama's attention, as transformers 5.24 did, before our package is imported.
RENAMED = """
import functools, inspect, sys
import torch
from transformers.models.llama import modeling_llama as llama
from transformers import AutoModelForCausalLM, LlamaConfig

parameters = inspect.signature(llama.LlamaAttention.forward).parameters
name = next(each for each in ("cache", "past_key_values") if each in parameters)
own = llama.LlamaAttention.forward

if sys.argv[2] == "declared":
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, kv_store=None, **kwargs):
        return own(self, hidden_states, position_embeddings, attention_mask, **{name: kv_store}, **kwargs)
else:
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        cache = kwargs.pop("kv_store", None)
        return own(self, hidden_states, position_embeddings, attention_mask, **{name: cache}, **kwargs)

layer = llama.LlamaDecoderLayer.forward

def layer_forward(self, *args, **kwargs):
    attend = self.self_attn.forward
    def renamed(**given):
        if name in given:
            given["kv_store"] = given.pop(name)
        return attend(**given)
    self.self_attn.forward = renamed
    try:
        return layer(self, *args, **kwargs)
    finally:
        del self.self_attn.forward

llama.LlamaAttention.forward = forward
llama.LlamaDecoderLayer.forward = layer_forward

dense = AutoModelForCausalLM.from_config(LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64,
)).eval()
ids = torch.arange(3, 15)[None]
cached, plain = (dense.generate(
    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, min_new_tokens=6, pad_token_id=0,
    use_cache=use_cache,
) for use_cache in (True, False))
assert torch.equal(cached, plain), "the renamed dense class does not work by itself"
print("dense works")

import optimum_modegpt
from optimum_modegpt import ModeGPTConfig, ModeGPTQuantizer

for work in (
    lambda: AutoModelForCausalLM.from_pretrained(sys.argv[1]),
    lambda: ModeGPTQuantizer(ModeGPTConfig(
        sparsity=0.2, dataset=[list(range(3, 35))] * 8, num_samples=8, sequence_length=32
    )).compress_model(dense),
):
    try:
        work()
    except ImportError as error:
        print("refused:", error)
"""


@pytest.mark.parametrize("renamed", ["declared", "hidden"])
def test_a_renamed_cache_argument_is_refused(renamed: str, tmp_path: Path) -> None:
    compressed("llama-gqa-tied").save_pretrained(tmp_path / "small")
    done = run_forked(RENAMED, [str(tmp_path / "small"), renamed])
    assert done.returncode == 0, done.stderr[-3000:]
    first, *refusals = done.stdout.splitlines()
    assert first == "dense works"
    assert len(refusals) == 2
    found = {"declared": "declares 'kv_store'", "hidden": "has the arguments attention_mask, hidden_states, "}[renamed]
    for refusal in refusals:
        assert refusal.startswith(f"refused: LlamaAttention.forward {found}")
        assert f"Installed: transformers {transformers.__version__}" in refusal
        assert f"tested: {', '.join(KNOWN_VERSIONS)}" in refusal


@FAMILY
def test_a_cache_under_another_name_is_refused(name: str) -> None:
    """An attention must not ignore a cache that its decoder layer passes under an unknown name."""
    model = compressed(name)
    attention = next(module for module in model.modules() if hasattr(module, "qk_head_dim"))
    width = attention.dense_head_dim
    embeddings = torch.ones(1, 4, width), torch.zeros(1, 4, width)
    other = next(each for each in CACHE_NAMES if each != attention.cache_argument)
    hidden = torch.zeros(1, 4, model.config.hidden_size)
    for foreign in ("kv_store", other):
        with pytest.raises(TypeError, match=f"received a key-value cache as '{foreign}'"):
            attention(hidden, position_embeddings=embeddings, **{foreign: DynamicCache()})


@pytest.mark.parametrize("family", TOO_NEW)
def test_a_family_that_needs_a_newer_transformers_is_refused(family: str) -> None:
    with pytest.raises(ImportError, match="transformers"):
        check_model_type(family)


@pytest.mark.parametrize("family", INSTALLED)
def test_the_installed_transformers_fits_the_contract(family: str) -> None:
    classes = family_of(family)
    assert classes is not None
    if classes.attention_class is None:
        pytest.skip("the attention of this family stays dense")
    dense_class = classes.attention_class.dense_class()
    [expected] = set(CACHE_NAMES) & set(inspect.signature(dense_class.forward).parameters)
    passed_on = classes.family.attention.passed_on
    assert check_attention(dense_class, passed_on) == expected
    for name in passed_on:
        with pytest.raises(ImportError, match=f"declares '{name}'"):
            check_attention(dense_class, [other for other in passed_on if other != name])


def test_an_output_with_an_unknown_cache_field_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_field() in CACHE_NAMES
    monkeypatch.setattr("optimum_modegpt.modeling.modegpt_contract.CACHE_NAMES", ("kv_store",))
    with pytest.raises(ImportError, match=r"CausalLMOutputWithPast has the fields attentions, .*'kv_store'.*Installed"):
        cache_field()


def test_a_changed_hook_of_loading_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_loading()
    monkeypatch.setattr(
        transformers.PreTrainedModel, "mark_tied_weights_as_initialized", lambda self, loading_info, strict: None
    )
    with pytest.raises(ImportError, match="mark_tied_weights_as_initialized declares 'strict'"):
        compressed("llama-mha")
    monkeypatch.delattr(transformers.PreTrainedModel, "mark_tied_weights_as_initialized")
    with pytest.raises(ImportError, match="mark_tied_weights_as_initialized does not exist"):
        compressed("llama-mha")


# ---------------------------------------------------------------------------------------------------------- engines


def interface_calls(forward: Any) -> list[ast.Call]:
    """Return the calls of the attention interface that vLLM's Transformers backend finds in a `forward`.

    It looks for a local name that is assigned from ALL_ATTENTION_FUNCTIONS, and for calls of that name.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    names = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == "ALL_ATTENTION_FUNCTIONS.get_interface"
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in names]


@FAMILY
def test_vllm_finds_one_interface_call_and_its_scale(name: str) -> None:
    attention = next(module for module in compressed(name).modules() if hasattr(module, "qk_head_dim"))
    [call] = interface_calls(type(attention).forward)
    [scaling] = [keyword.value for keyword in call.keywords if keyword.arg == "scaling"]
    assert ast.unparse(scaling) == "self.scaling"
    [own, *_] = (module for module in dense(name).modules() if type(module) is attention.dense_class())
    assert attention.scaling == own.scaling
    assert isinstance(attention.layer_idx, int)


@FAMILY
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_engines_get_the_widths_that_they_allocate(name: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM allocates the head dimension in each block's `per_layer_config`, SGLang the dense model's."""
    model, ids = compressed(name), tokens()
    model.set_attn_implementation("eager")
    expected = model(ids).logits
    seen = []

    def kernel(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        seen.append((query.shape[-1], key.shape[-1], value.shape[-1]))
        length = query.shape[2]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        window = kwargs.pop("sliding_window", None) or length
        bias = torch.where((distance >= 0) & (distance < window), 0.0, float("-inf"))
        output, weights = module.eager_function()(module, query, key, value, bias, **kwargs)
        return output.flatten(0, 1).flatten(1), weights  # engines return (tokens, heads * width)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, engine, kernel)
    model.config._attn_implementation = engine
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
    layers = [model.config.per_layer_config[index] for index in range(model.config.num_hidden_layers)]
    allocated = [layer.head_dim if engine == "vllm" else model.config.dense_head_dim for layer in layers]
    padded = any(width.vo > width.qk for width in model.config.widths())
    assert padded, "the case in which query and key are padded"
    assert seen == [(width, width, width) for width in allocated]
