"""Test values of a family's description that no supported family has, on models of transformers that have them.

Each literal would be the description of that family. A wrong one must be refused, not compressed to a wrong model.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_configs import EVERY_VARIANT, INSTALLED
from tiny_models import fill, tokens
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from optimum_modegpt.architectures import FamilyClasses, family_of, resolve
from optimum_modegpt.architectures.families import FAMILIES
from optimum_modegpt.architectures.head import LogitHead
from optimum_modegpt.architectures.positions import pair_coordinates
from optimum_modegpt.architectures.storage import dense_weights
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.compress import compress
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import UnsupportedModel
from optimum_modegpt.modeling import modegpt_gemma2
from optimum_modegpt.modeling.modegpt_attention import ModeGPTAttentionMixin
from optimum_modegpt.modeling.modegpt_blocks import ModeGPTMLPMixin
from optimum_modegpt.modeling.modegpt_common import ModeGPTModelMixin, register
from optimum_modegpt.modeling.modegpt_config import ModeGPTConfigMixin
from optimum_modegpt.modeling.modegpt_family import (
    Attention,
    Family,
    Head,
    Norm,
    Positions,
    Residual,
    Storage,
)

WINDOW = ("sliding_window", "sliding_window")
LITERALS = {
    "ministral": Family(
        "ministral",
        attention=Attention(layers=("full_attention",), mixers=("self_attn",), score_arguments=(WINDOW,)),
    ),
    "vaultgemma": Family(
        "vaultgemma",
        attention=Attention(score_arguments=(WINDOW, ("softcap", "attn_logit_softcapping"))),
        norm=Norm(offset=1.0),
        residual=Residual("input_layernorm", "pre_feedforward_layernorm"),
        head=Head(cap="final_logit_softcapping"),
    ),
}
CHANGES: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.25},
    "glm": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "granite": {"residual_multiplier": 0.4, "logits_scaling": 3.0, "attention_multiplier": 0.3},
    "ministral3": EVERY_VARIANT["ministral3"][1],
    "olmo": {"clip_qkv": 0.7},
    "ministral": {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 6},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "vaultgemma": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0, "sliding_window": 6},
}
NAMES = pytest.mark.parametrize("name", LITERALS)
SUPPORTED = [classes for classes in map(family_of, INSTALLED) if classes is not None]
FAMILY = {classes.family.model_type: classes.family for classes in SUPPORTED}


@pytest.fixture(autouse=True)
def _registered_classes() -> Iterator[None]:
    """Register the classes of the supported families again, because a test may have replaced them."""
    yield
    for classes in SUPPORTED:
        AutoConfig.register(classes.config.model_type, classes.config, exist_ok=True)


def model_of(name: str) -> PreTrainedModel:
    values = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(name, **(values | CHANGES.get(name, {})))
    return fill(AutoModelForCausalLM.from_config(config, attn_implementation="eager")).eval()


def classes_of(family: Family) -> FamilyClasses:
    """Create the compressed classes that the file of a family would have."""
    module = importlib.import_module(f"transformers.models.{family.model_type}.modeling_{family.model_type}")
    model = type(model_of(family.model_type))
    prefix = model.__name__.removesuffix("ForCausalLM")

    def extended(mixin: type, dense: type) -> Any:
        return type(f"ModeGPT{dense.__name__}", (mixin, dense), {"__module__": __name__})

    stacked = not family.mlp.storage.plain
    models = register(
        family,
        extended(ModeGPTConfigMixin, model.config_class),
        extended(ModeGPTAttentionMixin, getattr(module, f"{prefix}Attention")),
        extended(ModeGPTMLPMixin, getattr(module, f"{prefix}MLP")) if stacked else None,
        AutoModelForCausalLM=extended(ModeGPTModelMixin, model),
    )
    return FamilyClasses(family, models)


def compressed_with(family: Family, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[PreTrainedModel, Any]:
    monkeypatch.setitem(FAMILIES, family.model_type, classes_of(family))
    model = model_of(family.model_type)
    windows = TokenWindows(tokens(24, 24), {"name": "random"})
    report = compress(model, ModeGPTConfig(round_to=2, **settings), windows, device="cpu", progress=False)
    return model, report


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(tokens(3, 20, seed=9)).logits


@NAMES
def test_nothing_changes_at_sparsity_zero(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = compressed_with(LITERALS[name], monkeypatch, sparsity=0.0)
    torch.testing.assert_close(logits(model), logits(model_of(name)), atol=1e-4, rtol=1e-4)


@NAMES
def test_both_methods_reach_the_sparsity(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = logits(model_of(name)).log_softmax(-1)
    divergences = {}
    for method in ("default", "paper"):
        model, report = compressed_with(LITERALS[name], monkeypatch, sparsity=0.2, method=method)
        assert abs(report.achieved_sparsity - 0.2) < 0.01
        found = logits(model).log_softmax(-1)
        divergences[method] = float(nn.functional.kl_div(found, reference, reduction="batchmean", log_target=True))
        for widths in model.config.widths():
            assert widths.qk == 8 or "qk" not in LITERALS[name].uncut(model.config)
    assert divergences["default"] < divergences["paper"]


WRONG: dict[str, tuple[Family, str]] = {
    "norm offset": (replace(FAMILY["gemma"], norm=Norm()), "computes its gain or its mean"),
    "norm centred": (replace(FAMILY["cohere"], norm=Norm()), "computes its gain or its mean"),
    "head scale": (replace(FAMILY["cohere"], head=Head()), "computes its logits in another way"),
    "head divisor": (replace(FAMILY["granite"], head=Head()), "computes its logits in another way"),
    "head cap": (replace(LITERALS["vaultgemma"], head=Head()), "computes its logits in another way"),
    "multiplier": (replace(FAMILY["granite"], residual=Residual()), "block 0 computes something else"),
    "topology": (
        replace(FAMILY["cohere"], residual=Residual("input_layernorm", "input_layernorm")),
        "block 0 computes something else",
    ),
    "pairs": (
        replace(FAMILY["cohere"], attention=Attention(positions=Positions(table="repeated"))),
        "block 0 computes something else",
    ),
    "partial pairs": (
        replace(FAMILY["glm"], attention=Attention(positions=Positions(partial=True))),
        "block 0 computes something else",
    ),
    "layer flag": (replace(FAMILY["smollm3"], attention=Attention()), "block 1 computes something else"),
    "query factor": (
        replace(FAMILY["ministral3"], attention=replace(FAMILY["ministral3"].attention, positions=Positions())),
        "block 0 computes something else",
    ),
    "clip": (replace(FAMILY["olmo"], attention=Attention()), "block 0 computes something else"),
    "soft cap": (
        replace(LITERALS["vaultgemma"], attention=Attention(score_arguments=(WINDOW,))),
        "block 0 computes something else",
    ),
    "output norms": (
        replace(modegpt_gemma2.FAMILY, residual=Residual(mlp_norm="pre_feedforward_layernorm")),
        "block 0 computes something else",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_description_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, message = WRONG[case]
    with pytest.raises(UnsupportedModel, match=message):
        compressed_with(family, monkeypatch, sparsity=0.2, allocation="uniform")


@pytest.mark.parametrize("method", ["default", "paper"])
def test_values_that_are_coordinates_are_selected(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = replace(FAMILY["gemma"], attention=Attention(values="coordinates"))
    before = model_of("gemma").model.layers
    model, _ = compressed_with(family, monkeypatch, sparsity=0.5, method=method, allocation="uniform")
    for block, own in zip(model.model.layers, before, strict=True):
        rows, dense = block.self_attn.v_proj.weight.view(2, -1, 32), own.self_attn.v_proj.weight.view(2, -1, 32)
        assert rows.shape[1] == 4
        equal = (rows[:, :, None] == dense[:, None]).all(-1)  # (kv_heads, kept, dense)
        assert bool((equal.sum(-1) == 1).all())


@pytest.mark.parametrize("method", ["default", "paper"])
def test_the_attention_of_other_layers_stays_dense(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = model_of("ministral").model.layers[1].self_attn
    model, report = compressed_with(LITERALS["ministral"], monkeypatch, sparsity=0.4, method=method)
    layer = model.model.layers[1]
    assert type(layer.self_attn) is type(own)
    for found, expected in zip(layer.self_attn.parameters(), own.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert [set(block.parts) for block in report.blocks] == [{"mlp", "qk", "vo"}, {"mlp"}, {"mlp", "qk", "vo"}]
    widths = model.config.widths()
    assert (widths[1].qk, widths[1].vo) == (0, 0)
    assert min(widths[0].qk, widths[0].vo, widths[2].qk, widths[2].vo) in (2, 4, 6)
    ids = tokens(2, 12)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 4}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def resolve_with(family: Family, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(FAMILIES, family.model_type, classes_of(family))
    return resolve(model_of(family.model_type))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", ["stacked", "per head", "per group"])
def test_stored_projections_are_read_row_by_row(layout: Any, transposed: bool) -> None:
    heads, kv_heads, head_dim, d_model = (4, 4, 6, 10) if layout == "per head" else (4, 2, 6, 10)
    query, key, value = (torch.randn(count * head_dim, d_model + 1) for count in (heads, kv_heads, kv_heads))
    if layout == "stacked":
        rows = torch.cat((query, key, value))
    else:
        parts = [part.view(kv_heads, -1, d_model + 1) for part in (query, key, value)]
        rows = torch.cat(parts, dim=1).flatten(0, 1)
    block, config = nn.Module(), nn.Module()
    config.num_attention_heads, config.num_key_value_heads = heads, kv_heads  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    block.self_attn, block.mlp = nn.Module(), nn.Module()
    block.self_attn.config, block.self_attn.head_dim = config, head_dim  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    weight = rows[:, :-1].T if transposed else rows[:, :-1]
    block.self_attn.qkv = nn.Module()
    block.self_attn.qkv.weight, block.self_attn.qkv.bias = nn.Parameter(weight), nn.Parameter(rows[:, -1])
    block.self_attn.o_proj = nn.Linear(heads * head_dim, d_model)
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(block.mlp, name, nn.Linear(d_model, d_model))
    storage = Storage(layout, "self_attn.qkv", transposed=transposed)
    family = Family("test", attention=Attention(storage=storage, positions=Positions("none")))
    found = dense_weights(block, family, config)
    for path, expected in zip(("q_proj", "k_proj", "v_proj"), (query, key, value), strict=True):
        weights = found[f"self_attn.{path}"]
        assert weights.bias is not None
        assert torch.equal(torch.cat((weights.weight, weights.bias[:, None]), dim=1), expected)
    stored = block.self_attn.o_proj.weight.T if transposed else block.self_attn.o_proj.weight
    assert torch.equal(found["self_attn.o_proj"].weight, stored)


def test_pairs_of_coordinates() -> None:
    assert pair_coordinates(6, 6, interleaved=False).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert pair_coordinates(6, 6, interleaved=True).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert pair_coordinates(8, 4, interleaved=False).tolist() == [[0, 2], [1, 3], [4, 5], [6, 7]]
    assert pair_coordinates(8, 4, interleaved=True).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_head_scales_and_caps_logits() -> None:
    norm, output, stream = nn.LayerNorm(4), nn.Linear(4, 9, bias=False), torch.randn(2, 3, 4)
    plain = output(norm(stream))
    scaled = LogitHead(norm, None, output, scale=3.0, cap=None)(stream)
    capped = LogitHead(norm, None, output, scale=3.0, cap=2.0)(stream)
    assert torch.equal(scaled, 3 * plain)
    assert torch.equal(capped, 2 * (3 * plain / 2).tanh())
