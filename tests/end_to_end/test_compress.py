"""Test compressions of tiny random models of every family: results, resources and refusals."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_configs import FAMILIES, VARIANTS
from tiny_models import classes, dense, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, XGLMConfig, XGLMForCausalLM

from optimum_modegpt.allocation.plan import Plan
from optimum_modegpt.architectures import Architecture, Block, resolve
from optimum_modegpt.budget import compute_dtype
from optimum_modegpt.budget.sizes import part_sizes
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.calibration.gradients import output_gradients
from optimum_modegpt.calibration.streams import StreamStorage, enter
from optimum_modegpt.compress import compress
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import (
    AlreadyCompressed,
    CalibrationDataError,
    InvalidConfig,
    NumericalError,
    UnsupportedModel,
)
from optimum_modegpt.methods import sensitivity
from optimum_modegpt.modeling import DENSE_TYPES
from optimum_modegpt.modeling.modegpt_common import ModeGPTModelMixin
from optimum_modegpt.report import Report, count_parameters
from optimum_modegpt.walk.checks import check_result
from optimum_modegpt.walk.precision import Precision
from optimum_modegpt.walk.request import Request

WINDOWS, LENGTH = 10, 16
METHODS = [("default", None), ("paper", None)]
RECIPES = [*METHODS, ("default", "influence"), ("paper", "sensitivity"), ("paper", "uniform")]


def windows(count: int = WINDOWS, length: int = LENGTH) -> TokenWindows:
    return TokenWindows(tokens(count, length, seed=7), {"name": "random tokens", "windows": count})


def run(model: Any, **fields: Any) -> Report:
    return compress(model, ModeGPTConfig(round_to=1, **fields), windows(), progress=False)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens(3, LENGTH, seed=3)).logits


@pytest.mark.parametrize("method", ["default", "paper"])
@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_removed_is_the_dense_model(name: str, method: str) -> None:
    model = dense(name)
    expected = logits(model)
    report = run(model, sparsity=0.0, method=method)
    assert report.achieved_sparsity == 0
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def untied(name: str) -> Any:
    """Return a model whose configuration says tied, but whose head is a copy of the embeddings."""
    model = dense(name, tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def untied_with_another_head(name: str) -> Any:
    model = untied(name)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    return model


def tied(name: str) -> Any:
    """Return a model whose configuration says untied, but whose head is the embeddings."""
    model = dense(name, tie_word_embeddings=False)
    model.lm_head.weight = model.get_input_embeddings().weight
    return model


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("make", [untied, untied_with_another_head, tied])
def test_a_head_of_its_own_stays_one_and_a_tied_head_stays_tied(make: Any, name: str, tmp_path: Any) -> None:
    model = make(name)
    expected, parameters = logits(model), count_parameters(model)
    report = run(model, sparsity=0.0)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    is_tied = make is tied
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == is_tied
    assert model.config.tie_word_embeddings == is_tied
    assert report.parameters.total_before == report.parameters.total_after == parameters
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != is_tied  # noqa: SIM118 - not a mapping
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(reloaded), logits(model))
    assert count_parameters(reloaded) == parameters


def test_a_class_that_would_lose_a_head_leaves_the_model_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = untied_with_another_head("llama-gqa-tied")
    expected = logits(model)
    monkeypatch.setattr(Architecture, "head_is_tied", True)
    with pytest.raises(RuntimeError, match=r"replaced lm_head\.weight when it tied its weights"):
        run(model, sparsity=0.0)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_thirty_percent_by_every_recipe(name: str, tmp_path: Any) -> None:
    """Try both methods with their own allocations on every variant, and with other allocations on two families."""
    reference = logits(dense(name))
    for method, allocation in RECIPES if name in ("llama-gqa-tied", "opt") else METHODS:
        model = dense(name)
        before = sum(p.numel() for p in model.parameters())
        report = run(model, sparsity=0.3, method=method, allocation=allocation)
        assert isinstance(model, ModeGPTModelMixin)
        assert abs(report.achieved_sparsity - 0.3) <= 0.005
        assert removed_by_hand(model, name) == pytest.approx(report.achieved_sparsity)
        assert report.parameters.total_before == before
        assert report.parameters.total_after == sum(p.numel() for p in model.parameters())
        assert bool(report.sensitivities) == (
            report.config["allocation"] == "sensitivity" or (method == "default" and not allocation)
        )
        after = logits(model)
        assert after.isfinite().all()
        assert not torch.allclose(after, reference, atol=1e-3)
        model.save_pretrained(tmp_path / method)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / method)
        assert torch.equal(logits(again), after)


def removed_by_hand(model: Any, name: str) -> float:
    """Return 1 − Σ new / Σ dense over all matrices of the blocks. The gains of narrow heads are none."""

    def count(of: Any) -> int:
        blocks = of.base_model.get_submodule(model.config.family.blocks)
        return sum(
            tensor.numel() for key, tensor in blocks.named_parameters() if tensor.ndim == 2 and "norm" not in key
        )

    return 1 - count(model) / count(dense(name))


def test_no_row_is_masked_and_nothing_grows() -> None:
    before, model = dense("llama-gqa-tied"), dense("llama-gqa-tied")
    run(model, sparsity=0.4)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            old = before.get_submodule(path)
            assert module.in_features <= old.in_features
            assert module.out_features <= old.out_features
            assert module.weight.abs().sum(1).min() > 0


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_global_generator_alone() -> None:
    first, second = dense("llama-gqa-tied"), dense("llama-gqa-tied")
    state = torch.random.get_rng_state()
    run(first, sparsity=0.3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    run(second, sparsity=0.3)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def test_the_batch_size_does_not_matter() -> None:
    one, all_at_once = dense("qwen2"), dense("qwen2")
    run(one, sparsity=0.3, allocation="uniform", batch_size=1)
    run(all_at_once, sparsity=0.3, allocation="uniform", batch_size=WINDOWS)
    torch.testing.assert_close(logits(one), logits(all_at_once), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["default", "paper"])
@pytest.mark.parametrize("sums", ["raised", "in 16 bits"])
@pytest.mark.usefixtures("fast_in_16_bits")
def test_bfloat16_stays_bfloat16_and_loses_little(method: str, sums: str, request: pytest.FixtureRequest) -> None:
    exact, rounded = dense("llama-mqa-biases"), dense("llama-mqa-biases").to(torch.bfloat16)
    calls = request.getfixturevalue("sums_in_float32") if sums == "in 16 bits" else None
    expected = run(exact, sparsity=0.3, allocation="uniform", method=method)
    assert not calls, "of a model in float32"
    report = run(rounded, sparsity=0.3, allocation="uniform", method=method)
    assert calls is None or len(calls) > len(report.blocks)
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    for ours, theirs in zip(report.blocks, expected.blocks, strict=True):
        for part in ("mlp", "qk", "vo"):
            assert ours.parts[part].relative_error == pytest.approx(theirs.parts[part].relative_error, abs=0.05)


@pytest.mark.usefixtures("fast_in_16_bits")
def test_float16_is_compressed_too() -> None:
    model = dense("llama-gqa-tied").half()
    report = run(model, sparsity=0.3, allocation="uniform")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert all(part.relative_error < 1 for block in report.blocks for part in block.parts.values())
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", [{}, {"method": "paper"}, {"layout": "stock"}])
@pytest.mark.usefixtures("slow_in_16_bits")
def test_a_model_of_slow_16_bits_is_computed_in_float32(dtype: torch.dtype, fields: dict[str, Any]) -> None:
    """The result is that of the same weights in float32, rounded."""
    model, exact = dense("llama-gqa-tied"), dense("llama-gqa-tied")
    for own, of_exact in zip(model.parameters(), exact.parameters(), strict=True):
        own.data = own.data.to(dtype)
        of_exact.data = own.data.float()
    embedded = model.get_input_embeddings().weight.data_ptr()
    expected, found = run(exact, sparsity=0.3, **fields), run(model, sparsity=0.3, **fields)
    assert (found.compute_dtype, expected.compute_dtype) == ("float32", "float32")
    assert model.config.modegpt["dtype"] == str(dtype).removeprefix("torch.")
    assert model.get_input_embeddings().weight.data_ptr() == embedded
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert found.blocks == expected.blocks
    # The stock layout rounds its queries twice, because it scales them after they are stored.
    rounding = 2 * torch.finfo(dtype).eps if fields.get("layout") == "stock" else 0
    rounded = dict(model.named_parameters())
    for name, parameter in exact.named_parameters():
        torch.testing.assert_close(rounded[name], parameter.to(dtype), rtol=rounding, atol=0)


@pytest.mark.usefixtures("slow_in_16_bits")
def test_slow_16_bits_are_a_warning_if_float32_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_dtype, "LARGEST", 0)
    report = run(dense("llama-gqa-tied").bfloat16(), sparsity=0.3, allocation="uniform")
    assert report.compute_dtype == "bfloat16"
    (warning,) = (each for each in report.warnings if "float32" in each)
    assert warning.startswith("products in torch.bfloat16 take 7 times as long as in float32 on cpu. To compute in")


@pytest.mark.usefixtures("slow_in_16_bits")
def test_the_model_has_its_own_tensors_again_if_the_compression_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense("llama-gqa-tied").bfloat16()
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    seen: list[torch.dtype] = []

    def fails(request: Request, state: Any) -> None:
        seen.extend(parameter.dtype for parameter in request.architecture.model.parameters())
        raise KeyboardInterrupt

    monkeypatch.setattr("optimum_modegpt.compress.measure_gradients", fails)
    with pytest.raises(KeyboardInterrupt):
        run(model, sparsity=0.3)
    assert set(seen) == {torch.float32}
    for name, parameter in model.named_parameters():
        assert parameter.dtype is torch.bfloat16
        assert parameter.data_ptr() == before[name].data_ptr()


@pytest.mark.usefixtures("slow_in_16_bits")
def test_parameters_in_another_dtype_keep_it() -> None:
    model = dense("mixtral").bfloat16()
    for block in model.model.layers:
        block.mlp.gate.weight.data = block.mlp.gate.weight.data.double()
    precision = Precision.of(model, torch.float32)
    with precision.applied(model):
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        block = copy.deepcopy(model.model.layers[0])
    assert {dtypes.pop(f"model.layers.{index}.mlp.gate.weight") for index in range(len(model.model.layers))} == {
        torch.float64
    }
    assert set(dtypes.values()) == {torch.float32}
    precision.to_stored(block, "model.layers.0")
    expected = {name: parameter.dtype for name, parameter in model.model.layers[0].named_parameters()}
    assert {name: parameter.dtype for name, parameter in block.named_parameters()} == expected


def test_modes_and_frozen_parameters_are_kept() -> None:
    model = dense("llama-mha").train()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    model.model.layers[1].eval()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    run(model, sparsity=0.3, allocation="uniform")
    assert model.training
    assert [layer.training for layer in model.model.layers] == [True, False, True]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert model.is_gradient_checkpointing
    assert model(tokens(1, LENGTH)).logits.isfinite().all()


def test_the_refit_may_see_a_part_of_the_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from optimum_modegpt.methods import input_refit

    monkeypatch.setattr(input_refit, "REFIT_TOKENS", 5 * LENGTH)
    report = run(dense("llama-mqa-biases"), sparsity=0.3, allocation="uniform")
    whole = run(dense("llama-mqa-biases"), sparsity=0.3, allocation="uniform")
    assert report.blocks[0].parts["mlp"].relative_error == pytest.approx(
        whole.blocks[0].parts["mlp"].relative_error, rel=0.5
    )


def test_every_window_has_a_say_in_the_final_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    from optimum_modegpt.methods import residual_matched

    seen: list[int] = []
    split = residual_matched.split_sample

    def counted(samples: Any, **shared: Any) -> Any:
        seen.extend(len(sample.features) for sample in samples)
        return split(samples, **shared)

    monkeypatch.setattr(residual_matched, "split_sample", counted)
    monkeypatch.setattr(residual_matched, "GAIN_TOKENS", 2)
    run(dense("llama-gqa-tied"), sparsity=0.3, allocation="uniform")
    assert seen == [1] * WINDOWS


@pytest.mark.parametrize("recipe", [("default", "sensitivity"), ("paper", "influence")])
def test_copies_on_the_device_do_not_grow_with_depth(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the copies of dense blocks that exist. The device "cpu:0" counts as another one than that of the model."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most: list[int] = []
    on = Block.on

    def counted(block: Block, device: torch.device) -> Block:
        copied = on(block, device)
        assert copied is not block
        alive.add(copied.module)
        gc.collect()
        most.append(len(alive))
        return copied

    monkeypatch.setattr(Block, "on", counted)
    gc.freeze()  # the garbage collector need not search objects that are older than the test
    peaks = []
    for depth in (4, 8):
        model = dense("llama-gqa-tied", num_hidden_layers=depth)
        most.clear()
        config = ModeGPTConfig(round_to=1, method=recipe[0], allocation=recipe[1])
        compress(model, config, windows(), device="cpu:0", progress=False)
        peaks.append(max(most))
    assert peaks[0] == peaks[1] <= 3


def test_record_and_report_describe_the_compression(tmp_path: Any) -> None:
    model = dense("llama-gqa-tied")
    report = run(model, sparsity=0.3)
    record = model.config.modegpt
    assert record["recipe"]["sparsity"] == 0.3
    assert record["achieved"]["sparsity"] == report.achieved_sparsity
    assert record["calibration"]["name"] == "random tokens"
    for block, layer in zip(report.blocks, model.model.layers, strict=True):
        assert set(block.parts) == {"mlp", "qk", "vo"}
        assert block.parts["qk"].rank == layer.self_attn.qk_head_dim
        assert block.parts["vo"].rank == layer.self_attn.v_head_dim
        assert block.parts["mlp"].rank == layer.mlp.down_proj.in_features
        assert all(0 <= part.relative_error < 1 for part in block.parts.values())
    assert [stage.name for stage in report.stages] == [
        "embed",
        "gradients",
        "allocate (sensitivity)",
        "decompose",
        "adopt",
        "self-check",
    ]
    assert all(stage.peak_memory > 0 for stage in report.stages)
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    assert json.loads(json.dumps(record)) == record


def measured(
    architecture: Architecture, *, windows: int, gradient_windows: int, divergence_windows: int, blocks: tuple[int, ...]
) -> sensitivity.Measured:
    """Return the sensitivities of all parts, with exact divergences of `blocks`."""
    config, host = ModeGPTConfig(sparsity=0.3, round_to=1), torch.device("cpu")
    used = sensitivity.Budget(windows, gradient_windows, divergence_windows, 24, blocks)
    with torch.no_grad():
        first, second = (
            enter(architecture, tokens(count, 24, seed=seed), 4, StreamStorage(host))
            for seed, count in enumerate((windows, gradient_windows))
        )
        gradients = output_gradients(architecture, second, host, seed=0, progress=False)
        sizes = part_sizes(architecture, config)
        sweeps = sensitivity.Sweeps(architecture, sizes, config, used, first, second, gradients, host)
        return {name: part for found in sweeps.measured({}, progress=False) for name, part in found.items()}


def test_sensitivities_bring_a_block_to_the_device_once_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = resolve(dense("llama-gqa-tied", num_hidden_layers=6))
    brought, on = [], Block.on
    monkeypatch.setattr(Block, "on", lambda block, device: (brought.append(block.index), on(block, device))[1])

    def found(sweeps: int, blocks: tuple[int, ...]) -> sensitivity.Measured:
        monkeypatch.setattr(sensitivity, "SWEEPS", sweeps)
        result = measured(architecture, windows=8, gradient_windows=6, divergence_windows=3, blocks=blocks)
        del brought[:6]  # for the gradients
        return result

    together = found(1, (0, 5))
    assert brought == list(range(6))
    brought.clear()
    assert found(3, (0, 5)) == together, "the number of sweeps changes no result"
    assert brought == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5], "a sweep without a measured block ends with its own blocks"
    brought.clear()
    found(3, (0, 2, 5))
    assert brought == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 4, 5]


def test_divergence_of_a_block_does_not_depend_on_the_other_measured_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "SMALLEST", 0)
    architecture = resolve(dense("gpt_neox"))
    sizes = {"windows": 8, "gradient_windows": 6, "divergence_windows": 3}
    few, all_blocks = (measured(architecture, **sizes, blocks=blocks) for blocks in ((1,), (0, 1, 2)))
    for (block, part), found in few.items():
        expected = all_blocks[block, part]
        assert (found.losses, found.second_order) == (expected.losses, expected.second_order)
        assert found.ratios == (expected.ratios if block == 1 else [])
        assert [at for at, _ in expected.ratios] == [at for at, _ in expected.second_order]


@pytest.mark.parametrize("name", ["opt-post-ln", "gpt_neox", "gpt2"])
def test_second_order_is_near_the_divergence_of_a_small_cut(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "SMALLEST", 0)
    found = measured(resolve(dense(name)), windows=64, gradient_windows=64, divergence_windows=64, blocks=(0, 1, 2))
    for key, part in found.items():
        (_, second_order), (_, ratio) = min(part.second_order), min(part.ratios)
        assert 0 < second_order < 0.1, key
        assert 0.7 < ratio < 1.4, key


def test_part_that_no_prediction_depends_on_is_cut_first() -> None:
    """Without value weights, neither values nor scores of block 1 matter. Its queries and keys are as large as ever."""
    model = dense("llama-gqa-tied")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.zero_()
    ids = tokens(2, LENGTH)
    expected = model(ids).logits
    report = run(model, sparsity=0.11, refit_iterations=0)
    ranks = {(block.index, part): block.parts[part].rank for block in report.blocks for part in ("qk", "vo")}
    assert (ranks[1, "qk"], ranks[1, "vo"]) == (2, 1), "the narrowest widths"
    for part in ("qk", "vo"):
        assert max(divergence for _, divergence in report.sensitivities[f"1.{part}"]) < 1e-6
        assert min(ranks[0, part], ranks[2, part]) > ranks[1, part]
    before = nn.functional.log_softmax(expected, -1)
    after = nn.functional.log_softmax(model(ids).logits, -1)
    assert nn.functional.kl_div(after, before, reduction="sum", log_target=True) / ids.numel() < 0.1


@pytest.mark.parametrize("allocation", ["uniform", "influence", "sensitivity"])
def test_a_failure_names_the_block_and_leaves_the_model_untouched(allocation: Any) -> None:
    model = dense("llama-gqa-tied")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NumericalError, match="block 1"):
        run(model, sparsity=0.3, allocation=allocation)
    assert type(model).__name__ == "LlamaForCausalLM"
    for key, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[key].nan_to_num()), key


RARE = 7
"""A token that occurs in one calibration window only."""


def overflowing(place: str) -> LlamaForCausalLM:
    """Return a model whose values after `place` are not finite, but only in texts with the token `RARE`."""
    model = dense("llama-mqa-biases")
    assert isinstance(model, LlamaForCausalLM)
    embedding, mlp, norm = model.model.embed_tokens.weight, model.model.layers[1].mlp, model.model.norm
    with torch.no_grad():
        embedding[:, 0], embedding[RARE], embedding[RARE, 0] = 0, 0, 200  # the only token with a large first channel
        if place == "embedding":
            embedding[RARE] = torch.nan
        elif place == "block 1":
            mlp.gate_proj.weight[0], mlp.gate_proj.bias[0] = 0, -5e30
            mlp.gate_proj.weight[0, 0] = 1e30 / model.model.layers[1].post_attention_layernorm.weight[0]
            mlp.up_proj.weight[0] = mlp.gate_proj.weight[0]
        else:
            model.lm_head.weight[0], model.lm_head.weight[0, 0] = 0, 1e38 / norm.weight[0]
    return model


@pytest.mark.parametrize("window", [3, 6])  # the sensitivities use the first five for moments, the others later
@pytest.mark.parametrize(
    "fields", [{}, {"allocation": "uniform"}, {"allocation": "influence"}, {"method": "paper", "allocation": "uniform"}]
)
@pytest.mark.parametrize("place", ["embedding", "block 1"])
def test_a_dense_model_that_overflows_on_a_late_window_is_named(place: str, fields: Any, window: int) -> None:
    ids = tokens(8, LENGTH).clamp(min=RARE + 1)
    ids[window, 10] = RARE
    words = f"^{place}: the dense model's output is not finite on calibration window {window} "
    with pytest.raises(NumericalError, match=words):
        compress(
            overflowing(place),
            ModeGPTConfig(sparsity=0.3, **fields),
            TokenWindows(ids, windows().record),
            progress=False,
        )


def test_dense_logits_that_overflow_on_a_late_window_are_named() -> None:
    ids = tokens(8, LENGTH).clamp(min=RARE + 1)
    ids[6, 10] = RARE
    with pytest.raises(NumericalError, match=r"^the dense model's logits are not finite on calibration window 6 "):
        compress(overflowing("head"), ModeGPTConfig(sparsity=0.3), TokenWindows(ids, windows().record), progress=False)


def test_a_compressed_block_that_is_not_finite_is_not_blamed_on_the_dense_model() -> None:
    stream = [torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)]
    check_result({"mlp": 0.1}, stream, torch.arange(4, 8))
    stream[1][0, 2, 1] = torch.inf
    with pytest.raises(NumericalError, match="the compressed block's output is not finite on calibration window 6 "):
        check_result({"mlp": 0.1}, stream, torch.arange(4, 8))


@pytest.mark.parametrize("method", ["default", "paper"])
def test_moments_that_overflow_are_an_error_that_names_block_and_part(method: Any) -> None:
    model = dense("llama-gqa-tied")
    with torch.no_grad():  # finite activations, but their squares are not
        model.model.layers[1].mlp.up_proj.weight.mul_(1e20)
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-20)
    with pytest.raises(NumericalError, match="block 1: mlp: a second moment is not finite"):
        run(model, sparsity=0.3, allocation="uniform", method=method)


@pytest.mark.parametrize("allocation", ["uniform", "sensitivity"])
def test_a_head_that_is_not_finite_is_refused(allocation: Any) -> None:
    model = dense("llama-mha")
    with torch.no_grad():
        model.lm_head.weight[3, 0] = torch.nan
    for method in ("default", "paper"):
        with pytest.raises(NumericalError, match="the dense model's logits are not finite on calibration window 0"):
            run(model, sparsity=0.3, allocation=allocation, method=method)


def test_a_failure_at_the_very_end_leaves_the_model_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense("opt")
    expected, tensors = logits(model), dict(model.named_parameters())

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(classes("opt")["AutoModelForCausalLM"], "load_state_dict", fail)
    with pytest.raises(KeyboardInterrupt):
        run(model, sparsity=0.3, allocation="uniform")
    assert torch.equal(logits(model), expected)
    assert all(parameter is tensors[name] for name, parameter in model.named_parameters())


def test_a_model_with_tensors_of_its_own_is_refused() -> None:
    model = dense("llama-gqa-tied")
    model.extra = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModel, match=r"extra\.bias, extra\.weight"):
        run(model)


def test_an_interrupt_leaves_the_model_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    from optimum_modegpt.methods import residual_matched

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    model = dense("llama-gqa-tied")
    expected = logits(model)
    monkeypatch.setattr(residual_matched, "refit_mlp", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, sparsity=0.3, allocation="uniform")
    assert torch.equal(logits(model), expected)


def test_compressing_twice_is_refused() -> None:
    model = dense("llama-gqa-tied")
    run(model, sparsity=0.2, allocation="uniform")
    with pytest.raises(AlreadyCompressed, match="already compressed"):
        run(model, sparsity=0.2)


def test_an_unknown_family_is_refused_with_those_that_are_known() -> None:
    model = XGLMForCausalLM(XGLMConfig(num_layers=1, attention_heads=2, d_model=8, ffn_dim=8, vocab_size=260))
    with pytest.raises(UnsupportedModel, match=f"xglm.*known: {', '.join(DENSE_TYPES)}"):
        run(model)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no language-model head"):
        run(dense("llama-gqa-tied").base_model)


def test_a_model_with_replaced_projections_is_refused() -> None:
    model = dense("llama-gqa-tied")

    class Adapter(nn.Linear):
        pass

    model.model.layers[1].mlp.up_proj.__class__ = Adapter
    with pytest.raises(UnsupportedModel, match=r"block 1: mlp.up_proj is Adapter; expected a plain nn.Linear"):
        run(model)


def test_a_model_spread_over_devices_is_refused() -> None:
    from accelerate import cpu_offload

    model = cpu_offload(dense("llama-gqa-tied"), execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match="spread over devices"):
        run(model)


def test_a_model_without_its_weights_is_refused() -> None:
    with torch.device("meta"):
        model = type(dense("llama-gqa-tied"))(dense("llama-gqa-tied").config)
    with pytest.raises(UnsupportedModel, match="without its weights in memory"):
        run(model)


@pytest.mark.parametrize("path", ["model.layers.0", "model.layers.2", "model.layers.1.self_attn"])
def test_a_variant_that_computes_something_else_is_refused(path: str) -> None:
    model = dense("llama-gqa-tied")
    module: Any = model.get_submodule(path)

    class Changed(type(module)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            return (0.5 * output[0], *output[1:]) if isinstance(output, tuple) else 0.5 * output

    module.__class__ = Changed
    with pytest.raises(UnsupportedModel, match="variant is not supported"):
        run(model)


def test_a_head_that_computes_something_else_is_refused() -> None:
    class Scaled(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 0.5 * output.logits
            return output

    model = dense("llama-gqa-tied")
    model.__class__ = Scaled
    with pytest.raises(UnsupportedModel, match="Scaled computes its logits in another way than its family"):
        run(model)


def test_a_model_that_embeds_in_another_way_is_refused() -> None:
    class Scaled(type(dense("llama-gqa-tied").model)):
        def forward(self, input_ids: Any = None, **arguments: Any) -> Any:
            return super().forward(**{**arguments, "inputs_embeds": 3 * self.embed_tokens(input_ids)})

    model = dense("llama-gqa-tied")
    model.model.__class__ = Scaled
    with pytest.raises(UnsupportedModel, match="computes other logits than LlamaForCausalLM with the same weights"):
        run(model)


def test_a_model_with_another_mask_is_refused() -> None:
    class Windowed(type(dense("llama-gqa-tied").model)):
        def forward(self, input_ids: Any = None, **arguments: Any) -> Any:
            length = input_ids.shape[1]
            seen = torch.ones(length, length, dtype=torch.bool).tril().triu(-3)
            return super().forward(input_ids=input_ids, **{**arguments, "attention_mask": seen[None, None]})

    model = dense("llama-gqa-tied")
    model.model.__class__ = Windowed
    with pytest.raises(UnsupportedModel, match="it changes embeddings, masks, positions"):
        run(model)


def test_a_model_with_a_hook_is_refused() -> None:
    model = dense("opt")
    model.get_input_embeddings().register_forward_hook(lambda module, arguments, output: 3 * output)
    with pytest.raises(UnsupportedModel, match="or has hooks"):
        run(model)


def test_rotary_frequencies_that_were_changed_in_memory_are_refused() -> None:
    model = dense("qwen2")
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq / 4
    with pytest.raises(UnsupportedModel, match=r"rotary_emb\.inv_freq was changed in memory and is not saved"):
        run(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_frequencies_that_were_rounded_to_the_dtype_of_the_model_pass(dtype: torch.dtype) -> None:
    model = dense("qwen2").to(dtype)
    assert model.model.rotary_emb.inv_freq.dtype == dtype
    run(model)


def test_windows_longer_than_the_context_are_refused() -> None:
    model = dense("llama-gqa-tied")
    with pytest.raises(CalibrationDataError, match="65 tokens, the model's context is 64"):
        compress(model, ModeGPTConfig(), windows(2, 65), progress=False)


def test_a_sparsity_out_of_reach_is_refused_before_work() -> None:
    model = dense("llama-gqa-tied")
    with pytest.raises(InvalidConfig, match="cannot be reached"):
        compress(model, ModeGPTConfig(sparsity=0.9, max_sparsity=0.91, round_to=7), windows(), progress=False)


def test_coarse_widths_that_miss_the_target_are_a_warning() -> None:
    report = compress(
        dense("llama-gqa-tied"),
        ModeGPTConfig(sparsity=0.07, round_to=24, allocation="uniform"),
        windows(),
        progress=False,
    )
    assert abs(report.achieved_sparsity - 0.07) > 0.005
    assert any("round_to=24" in warning for warning in report.warnings)


def test_text_that_repeats_itself_is_a_warning_and_harms_no_weight() -> None:
    model = dense("llama-gqa-tied")
    same = TokenWindows(tokens(1, LENGTH, seed=1).expand(WINDOWS, -1).contiguous(), {})
    largest = max(float(p.detach().abs().max()) for p in model.parameters())
    report = compress(model, ModeGPTConfig(round_to=1, allocation="uniform"), same, progress=False)
    assert any("only 1 of the 10 calibration windows differ" in warning for warning in report.warnings)
    assert max(float(p.detach().abs().max()) for p in model.parameters()) < 10 * largest


def test_windows_of_one_token_are_a_warning() -> None:
    text = windows()
    text.tokens[2:5] = 7
    report = compress(dense("llama-gqa-tied"), ModeGPTConfig(round_to=1, allocation="uniform"), text, progress=False)
    assert any("3 of the 10 windows contain fewer than 2 distinct tokens" in warning for warning in report.warnings)


def test_few_tokens_are_a_warning_that_says_how_many_are_needed() -> None:
    report = compress(
        dense("llama-gqa-tied"), ModeGPTConfig(allocation="uniform", round_to=1), windows(2, 8), progress=False
    )
    assert any("at least 48 tokens" in warning for warning in report.warnings)


def test_a_plan_of_ones_own_is_followed() -> None:
    model = dense("llama-gqa-tied")
    plan = [{"mlp": 40, "qk": 8, "vo": 5}, {"mlp": 48, "qk": 4, "vo": 8}, {"mlp": 30, "qk": 6, "vo": 8}]
    report = compress(model, ModeGPTConfig(round_to=1), windows(), plan=Plan.from_list(plan), progress=False)
    assert [{part: each.rank for part, each in block.parts.items()} for block in report.blocks] == plan
    assert report.requested_sparsity == report.achieved_sparsity
    assert report.achieved_sparsity == pytest.approx(removed_by_hand(model, "llama-gqa-tied"))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([{"mlp": 48, "qk": 8, "vo": 8}], "1 blocks, the model 3"),
        ([{"mlp": 48, "qk": 7, "vo": 8}] * 3, "qk width 7; allowed are 8 and the multiples of 2"),
        ([{"mlp": 49, "qk": 8, "vo": 8}] * 3, "mlp width 49"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan: Any, message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        compress(
            dense("llama-gqa-tied"), ModeGPTConfig(round_to=1), windows(), plan=Plan.from_list(plan), progress=False
        )
