"""Test the layouts "stock" and "mlp": the classes, widths and logits of their results, and the models they refuse."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from subprocess_load import run_worker
from tiny_configs import EVERY_VARIANT
from tiny_models import dense, fill, tokenizer, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3Config, PreTrainedModel

from optimum_modegpt.allocation.plan import Plan
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.calibration.streams import StreamStorage
from optimum_modegpt.compress import compress
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import AlreadyCompressed, InvalidConfig, UnsupportedModel
from optimum_modegpt.layouts import limits, stock
from optimum_modegpt.methods import residual_matched
from optimum_modegpt.modeling.modegpt_config import head_dim
from optimum_modegpt.report import Report
from optimum_modegpt.walk import checkpoint as checkpoints
from optimum_modegpt.walk.checkpoint import Checkpoint

story = importlib.import_module("optimum_modegpt.compress")
CONTEXT = 64
"""Tokens of the longest text. The calibration windows are much shorter."""
NARROW = {
    name: model_class
    for name, model_class in {
        "llama-gqa-tied": "LlamaForCausalLM",
        "llama-mqa-biases": "LlamaForCausalLM",
        "qwen2": "LlamaForCausalLM",
        "phi3": "LlamaForCausalLM",
        "qwen3-mixed-window-biases": "Qwen3ForCausalLM",
        "gemma3_text": "Gemma3ForCausalLM",
        "granite-mha-biases": "GraniteForCausalLM",
        "hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM",
        "olmo2-mha-biases-tied": "Olmo2ForCausalLM",
        "smollm3": "SmolLM3ForCausalLM",
        "exaone4": "Exaone4ForCausalLM",
        "exaone": "LlamaForCausalLM",
        "gpt_oss": "GptOssForCausalLM",
        "mixtral": "MixtralForCausalLM",
        "qwen3_moe-dense-layers-biases": "Qwen3MoeForCausalLM",
    }.items()
    if name in EVERY_VARIANT
}
"""Models whose heads become narrow, and the class of the result."""
WIDE = {
    name: reason
    for name, reason in {
        "phi3-partial-window-tied": "has a sliding window, which a llama model has not",
        "cohere": "rotates adjacent coordinates, or a part of a head",
        "gpt2": "derives the width of a head from other sizes",
        "gpt_neo": "derives the width of a head from other sizes",
        "opt-post-ln": "derives the width of a head from other sizes",
        "falcon-multi-query": "derives the width of a head from other sizes",
        "ministral3": "computes a factor of the queries",
        "gemma4_text": "has blocks whose heads cannot be cut alike",
    }.items()
    if name in EVERY_VARIANT
}
"""Models whose heads keep their width, and the reason in the report."""
EVERY = pytest.mark.parametrize("name", [*NARROW, *WIDE])


class Result(NamedTuple):
    """A result with its report, and the compressed model that it was made from."""

    model: Any
    report: Report
    compressed: Any


def run(model: PreTrainedModel, **options: Any) -> Result:
    """Compress a model in place. Options of `compress` are `plan` and `checkpoint`, the others are settings."""
    windows, made = TokenWindows(tokens(10, 16, seed=7), {"name": "random tokens", "windows": 10}), []
    others = {name: options.pop(name) for name in ("plan", "checkpoint") if name in options}
    settings = {"sparsity": 0.3, "round_to": 1, "allocation": "uniform", "layout": "stock"} | options
    with pytest.MonkeyPatch.context() as patch:
        check = story.check_same
        patch.setattr(story, "check_same", lambda new, old, ids: (made.append(old), check(new, old, ids)))
        report = compress(model, ModeGPTConfig(**settings), windows, device="cpu", progress=False, **others)
    return Result(model, report, made[0] if made else None)


RESULTS: dict[str, Result] = {}


def result(name: str) -> Result:
    """Return the result of a model with the layout stock. Tests must not change it."""
    if name not in RESULTS:
        RESULTS[name] = run(dense(name))
    return RESULTS[name]


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def longest(model: Any) -> Tensor:
    """Return a text as long as the context of a model."""
    return tokens(1, CONTEXT, seed=5)


def check_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * max(1.0, float(expected.std())))


def keeps_heads(report: Report) -> bool:
    return all(
        part.rank == part.dense_rank for block in report.blocks for name, part in block.parts.items() if name != "mlp"
    )


def test_the_limits_of_the_layout_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, ask = [], limits.check_stock
    monkeypatch.setattr(limits, "check_stock", lambda architecture: asked.append(1) or ask(architecture))
    run(dense("llama-gqa-tied"), sparsity=None, target_parameters=25_000)
    assert len(asked) == 1


# ------------------------------------------------------------------------------------------------- results of one class


@EVERY
def test_result_is_a_plain_model_of_one_width(name: str) -> None:
    model, report, _ = result(name)
    values = model.config.to_dict()
    assert type(model).__module__.startswith("transformers.models.")
    assert type(model).__name__ == NARROW.get(name, type(dense(name)).__name__)
    assert "auto_map" not in values
    assert set(values) - set(type(model.config)().to_dict()) <= {"modegpt", "head_dim"}
    if name != "gemma4_text":  # its own widths differ between layer types
        assert "per_layer_config" not in values
    assert report.achieved_sparsity == pytest.approx(0.3, abs=0.005) or any(
        "sparsity" in one for one in report.warnings
    )
    widths = {part.rank for block in report.blocks for key, part in block.parts.items() if key != "mlp"}
    for full in {block.parts["mlp"].dense_rank for block in report.blocks}:
        own = {block.parts["mlp"].rank for block in report.blocks if block.parts["mlp"].dense_rank == full}
        assert len(own) == 1
        assert own < {*range(full)}
    if name in NARROW:
        assert widths == {model.config.head_dim}
        assert model.config.head_dim < head_dim(dense(name).config)
        assert report.uncut == ()
    else:
        assert keeps_heads(report)
        assert any(WIDE[name] in sentence for sentence in report.uncut) or not widths


@pytest.mark.parametrize("name", NARROW)
def test_a_text_of_the_whole_context_has_the_logits_of_the_compressed_model(name: str) -> None:
    model, _, compressed = result(name)
    expected = logits(compressed, longest(model))
    assert expected.std() > 0.5
    check_equal(logits(model, longest(model)), expected)
    batch, mask = tokens(2, 12, seed=6), torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        found, expected = (each(batch, attention_mask=mask).logits for each in (model, compressed))
    check_equal(found[1], expected[1])
    check_equal(found[0, 4:], expected[0, 4:])


@EVERY
def test_generation_is_that_of_single_texts_without_a_cache(name: str) -> None:
    model, ids = result(name).model, tokens(2, 10)
    short = ids[:1, 4:]
    padded = torch.cat((torch.cat((torch.zeros(1, 4, dtype=torch.long), short), dim=1), ids[1:]))
    mask = (padded != 0).long()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    found = model.generate(padded, attention_mask=mask, **options)
    for row, single in ((found[0, 4:], short), (found[1], ids[1:])):
        expected = model.generate(single, attention_mask=torch.ones_like(single), use_cache=False, **options)
        assert torch.equal(row, expected[0])


@pytest.fixture(scope="module")
def reloaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Save the results of all selected tests, and return their logits in one fresh process without the package."""
    root = tmp_path_factory.mktemp("stock")
    selected: list[Any] = [item for item in request.session.items if item.path == request.path]
    names = [item.callspec.params["name"] for item in selected if "reloaded" in item.fixturenames]
    jobs = []
    for name in names:
        result(name).model.save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
        assert list((root / name).glob("*.py")) == []
        job = {"folder": str(root / name), "auto": "AutoModelForCausalLM", "dtype": "float32"}
        jobs.append(job | {"out": str(root / f"{name}.out")})
    run_worker(jobs, "stock", root)
    return {name: load_file(Path(root, f"{name}.out"))["out"] for name in names}


@EVERY
def test_transformers_alone_loads_the_same_model(name: str, reloaded: dict[str, Tensor]) -> None:
    # The kernel of experts depends on the alignment of their weights in memory.
    tolerance = 1e-5 if dense(name).config.to_dict().get("num_experts_per_tok") else 0.0
    torch.testing.assert_close(reloaded[name], logits(result(name).model, tokens()), rtol=0, atol=tolerance)


ROPES: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=list(ROPES))
def test_scaled_tables_are_right_beyond_their_original_context(rope: dict[str, Any], tmp_path: Path) -> None:
    model, _, compressed = run(dense("llama-gqa-tied", rope_parameters=rope))
    assert model.config.rope_parameters["rope_type"] == "longrope"
    ids = longest(model)
    check_equal(logits(model, ids), logits(compressed, ids))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(model, ids))


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_tables_that_follow_the_length_keep_the_heads(rope_type: str) -> None:
    rope: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 1000.0, "factor": 4.0}
    if rope_type == "longrope":
        factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
        rope |= {**factors, "original_max_position_embeddings": 16}
    _, report, _ = run(dense("llama-gqa-tied", rope_parameters=rope), method="paper")
    assert keeps_heads(report)
    assert f"the rotary type {rope_type} has frequencies that follow the length of the text" in report.uncut[0]
    assert report.achieved_sparsity == pytest.approx(0.3, abs=0.005)


@pytest.mark.parametrize("windows", ["all", "most"])
def test_windows_of_qwen2_are_not_lost(windows: str) -> None:
    """A Llama model has no windows, and 64 tokens of the self-check may be shorter than one."""
    layers = ["sliding_attention"] * 3
    if windows == "most":
        layers[0] = "full_attention"
    changes = {"use_sliding_window": True, "sliding_window": 40, "layer_types": layers}
    model, report, _ = run(dense("qwen2", **changes), method="paper")
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert keeps_heads(report)
    assert "sliding window" in report.uncut[0]


@pytest.mark.parametrize("name", ["llama-gqa-tied", "qwen3"])
def test_a_16_bit_model_has_the_logits_of_the_compressed_model(name: str) -> None:
    model, _, compressed = run(dense(name).to(torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    ids = longest(model)
    expected = logits(copy.deepcopy(compressed).float(), ids)
    errors = (logits(copy.deepcopy(model).float(), ids) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.max() < 0.02  # the rounding of the scaled queries


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gemma3_text", "hunyuan_v1_dense", "smollm3"])
def test_the_published_method_makes_stock_models_too(name: str) -> None:
    model, report, compressed = run(dense(name), method="paper", allocation=None)
    assert report.config["allocation"] is None
    assert {part.rank for block in report.blocks for key, part in block.parts.items() if key != "mlp"} == {
        model.config.head_dim
    }
    assert not keeps_heads(report)
    check_equal(logits(model, longest(model)), logits(compressed, longest(model)))


def test_sensitivities_choose_the_widths() -> None:
    model, report, _ = run(dense("llama-gqa-tied", num_hidden_layers=2), allocation=None, round_to="auto")
    assert set(report.sensitivities) == {f"{block}.{part}" for block in range(2) for part in ("mlp", "qk", "vo")}
    assert len({tuple(part.rank for part in block.parts.values()) for block in report.blocks}) == 1
    assert report.achieved_sparsity == pytest.approx(0.3, abs=0.01)
    assert type(model).__name__ == "LlamaForCausalLM"


def test_nothing_removed_is_the_dense_model() -> None:
    model, expected = dense("qwen3"), logits(dense("qwen3"), tokens())
    run(model, sparsity=0.0)
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=1e-5, atol=2e-5)
    assert type(model) is type(dense("qwen3"))


def test_heads_share_their_pairs_and_gains() -> None:
    model, report, compressed = result("gemma3_text")
    pairs = {tuple(row) for layer in compressed.model.layers for row in layer.self_attn.rope_index.tolist()}
    assert len(pairs) == 1
    assert len(next(iter(pairs))) == model.config.head_dim // 2
    for layer, own in zip(model.model.layers, compressed.model.layers, strict=True):
        for norm in ("q_norm", "k_norm"):
            gains = getattr(own.self_attn, norm).weight
            assert torch.equal(gains, gains[:1].expand_as(gains))
            assert getattr(layer.self_attn, norm).weight.shape == (model.config.head_dim,)
    assert report.blocks[0].parts["qk"].relative_error > 0


def test_whole_experts_are_removed_first(tmp_path: Path) -> None:
    model, report, compressed = run(dense("qwen3_moe-dense-layers-biases"), expert_sparsity=0.5)
    assert model.config.num_experts == 2
    assert {len(kept) for kept in report.kept_experts} == {2}
    assert not keeps_heads(report)
    check_equal(logits(model, longest(model)), logits(compressed, longest(model)))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens()), logits(model, tokens())
    )
    with pytest.raises(AlreadyCompressed, match="layout stock of qwen3_moe"):
        run(model)


def test_a_model_that_lost_only_experts_can_be_compressed() -> None:
    model, _, _ = run(dense("mixtral"), expert_sparsity=0.5, sparsity=0.0)
    assert model.config.num_local_experts == 2
    _, report, _ = run(model, method="paper")
    assert not keeps_heads(report)


def test_a_text_tower_becomes_narrow_in_its_model(tmp_path: Path) -> None:
    text = EVERY_VARIANT["gemma3_text-mqa-capped"][1]
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 2}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = fill(AutoModelForImageTextToText.from_config(config).eval(), gain=0.0)
    run(model, method="paper")
    assert type(model).__module__.startswith("transformers.models.")
    assert model.config.text_config.head_dim == 6
    with pytest.raises(AlreadyCompressed, match="the layout stock of gemma3"):
        run(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, longest(model)), logits(model, longest(model)))


# ------------------------------------------------------------------------------------------------- refusals and faults


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bloom", "BloomForCausalLM, which derives the width of its MLPs from other sizes"),
        ("mpt", "MptForCausalLM, which derives the width of its MLPs from other sizes"),
        ("glm4_moe", "mlp.shared_experts.gate_proj.weight has the width of the experts"),
    ],
)
def test_models_without_a_stock_result_are_refused_before_any_work(
    name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StreamStorage, "keep", lambda *_: pytest.fail("the work had begun"))
    with pytest.raises(UnsupportedModel, match=f"{reason}.*use layout='per_layer' or layout='mlp'"):
        run(dense(name))


@pytest.mark.parametrize(
    ("part", "width", "found"),
    [
        ("mlp", 30, "plan, block 1: mlp width 30; expected 32, because .* one intermediate_size"),
        ("qk", 4, "plan, block 1: qk width 4; expected 6, because .* one head dim"),
        ("vo", 8, "plan, block 1: vo width 8; expected 6, because .* the same head dim"),
    ],
)
def test_unequal_widths_of_a_plan_are_refused_before_any_work(
    part: str, width: int, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StreamStorage, "keep", lambda *_: pytest.fail("the work had begun"))
    blocks = [{"mlp": 32, "qk": 6, "vo": 6} for _ in range(3)]
    blocks[1][part] = width
    with pytest.raises(InvalidConfig, match=found):
        run(dense("llama-gqa-tied"), plan=Plan.from_list(blocks))


def test_equal_widths_of_a_plan_are_those_of_the_result() -> None:
    plan = Plan.from_list([{"mlp": 20, "qk": 4, "vo": 4}] * 3)
    model, report, _ = run(dense("llama-gqa-tied"), plan=plan, method="paper")
    assert (model.config.head_dim, model.config.intermediate_size) == (4, 20)
    assert model.config.modegpt["dense_widths"] == {"head_dim": 8, "intermediate_size": 48}
    assert report.requested_sparsity == report.achieved_sparsity


@pytest.mark.parametrize(("name", "dtype"), [("llama-gqa-tied", torch.float32), ("qwen3", torch.bfloat16)])
def test_a_wrong_rotary_table_is_found(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits, the tolerance of the logits hides this fault, but not that of the first blocks in float32."""
    original, model, untouched = stock.kept_rope_parameters, dense(name).to(dtype), dense(name).to(dtype)

    def wrong(*args: Any) -> dict[str, Any]:
        kept = original(*args)
        factors = [1.2 * factor for factor in kept["short_factor"]]
        return kept | {"short_factor": factors, "long_factor": factors}

    monkeypatch.setattr(stock, "kept_rope_parameters", wrong)
    with pytest.raises(UnsupportedModel, match="differs from the compressed model by"):
        run(model)
    assert type(model) is type(untouched)
    assert torch.equal(logits(model, tokens()), logits(untouched, tokens()))


# ------------------------------------------------------------------------------------------------------------- resuming


class Killed(BaseException):
    """Simulate a kill signal inside the process."""


KILLS = {"before the pairs": (story, "choose_pairs"), "after the pairs": (story, "cut_blocks")}


@pytest.mark.parametrize("moment", [*KILLS, "in block 1"])
def test_a_resumed_run_is_bit_identical(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "STREAM_SECONDS", 0)
    name = "qwen3-mixed-window-biases"
    target, function = KILLS.get(moment, (residual_matched, "compress_block"))
    original = getattr(target, function)

    def dies(*args: Any, **kwargs: Any) -> Any:
        if moment in KILLS or args[0].index == 1:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(target, function, dies)
        with pytest.raises(Killed):
            run(dense(name), checkpoint=Checkpoint(tmp_path / "kept"))
    measured: list[Any] = []
    shared = importlib.import_module("optimum_modegpt.walk.shared_pairs")
    measure = shared.measure_moments
    monkeypatch.setattr(shared, "measure_moments", lambda *args: measured.append(args) or measure(*args))
    checkpoint = Checkpoint(tmp_path / "kept")
    resumed = run(dense(name), checkpoint=checkpoint).model
    assert len(measured) == (moment == "before the pairs")
    expected = result(name).model.state_dict()
    assert resumed.state_dict().keys() == expected.keys()
    for key, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    assert resumed.config.rope_parameters == result(name).model.config.rope_parameters
    checkpoint.remove()


# ------------------------------------------------------------------------------------------------------- the layout mlp


@pytest.mark.parametrize(("name", "method"), [("llama-gqa-tied", "default"), ("gpt2", "paper"), ("bloom", "paper")])
def test_layout_mlp_keeps_the_heads_of_every_block(name: str, method: str, tmp_path: Path) -> None:
    model, report, _ = run(dense(name, num_hidden_layers=2), layout="mlp", allocation=None, method=method)
    assert type(model).__module__.startswith("optimum_modegpt.")
    assert keeps_heads(report)
    assert report.uncut == ("qk and vo stay at full width: the layout mlp cuts MLPs only",)
    assert report.achieved_sparsity == pytest.approx(0.3, abs=0.005)
    for block, widths in zip(report.blocks, model.config.widths(), strict=True):
        assert widths.qk == widths.vo == block.parts["qk"].dense_rank
        assert widths.mlp == block.parts["mlp"].rank
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens()), logits(model, tokens()))
