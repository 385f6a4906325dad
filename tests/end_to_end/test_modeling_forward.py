"""Test the results of the compressed classes: against dense ones, across attention kernels, dtypes and training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_configs import FAMILIES, VARIANTS
from tiny_models import classes, compressed, dense, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from twins import CPU, adopt, blocks_of, dense_twin

from optimum_modegpt.architectures import resolve
from optimum_modegpt.modeling.adoption import become, built
from optimum_modegpt.modeling.modegpt_attention import ModeGPTAttentionMixin
from optimum_modegpt.modeling.modegpt_blocks import install_head_gains, install_linear, install_rope_index

EVERY = pytest.mark.parametrize("name", VARIANTS)
FAMILY = pytest.mark.parametrize("name", FAMILIES)


def adopted(name: str, **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a dense model, and a copy of it adopted at full width."""
    reference = dense(name, **changes)
    reference.set_attn_implementation("eager")  # the one that returns attention weights
    model = copy.deepcopy(reference)
    adopt(model, name)
    return reference, model


@EVERY
def test_narrow_model_equals_its_zero_padded_dense_twin(name: str) -> None:
    model, ids = compressed(name), tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for attention in ("eager", "sdpa"):
        twin = dense_twin(model, name)
        twin.set_attn_implementation(attention)
        model.set_attn_implementation(attention)
        for attention_mask in (None, mask):
            expected = twin(ids, attention_mask=attention_mask).logits
            assert expected.std() > 0.5
            torch.testing.assert_close(model(ids, attention_mask=attention_mask).logits, expected, atol=2e-5, rtol=1e-5)


@EVERY
def test_adoption_at_full_width_changes_nothing(name: str) -> None:
    reference, model = adopted(name)
    ids = tokens()
    expected = reference(ids, output_attentions=True, output_hidden_states=True)
    found = model(ids, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(found.logits, expected.logits, atol=5e-5, rtol=1e-5)
    assert len(found.attentions) == len(found.hidden_states) - 1 == 3
    for a, b in zip(found.attentions + found.hidden_states, expected.attentions + expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-5)


@EVERY
def test_adoption_keeps_the_object_and_its_attributes(name: str) -> None:
    model_class = classes(name)["AutoModelForCausalLM"]
    family = model_class.config_class.family
    model = dense(name)
    identity, storage = id(model), model.get_input_embeddings().weight.data_ptr()
    model.generation_config.max_new_tokens = 5
    model.get_input_embeddings().requires_grad_(False)
    frozen = blocks_of(model, name)[1].get_submodule(family.projections[0].dense_path).requires_grad_(False)
    assert not frozen.weight.requires_grad
    outside = {key: value for key, value in model.state_dict().items() if f"{family.blocks}." not in key}
    adopt(model, name)
    assert id(model) == identity
    assert type(model) is model_class
    assert not model.training
    assert model.generation_config.max_new_tokens == 5
    assert model.get_input_embeddings().weight.data_ptr() == storage, "weights are moved, not copied"
    tied = model.config.tie_word_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert not model.get_input_embeddings().weight.requires_grad
    for index, trained in ((0, True), (1, False)):
        query = blocks_of(model, name)[index].get_submodule(family.attention.query)
        assert query.weight.requires_grad == trained
        assert not query.training
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    after = model.state_dict()
    assert all(after[key].data_ptr() == value.data_ptr() for key, value in outside.items())


def test_adoption_in_half_precision_saves_half_precision(tmp_path: Path) -> None:
    name = "llama-gqa-tied"
    dense(name).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    adopt(model, name)
    expected = model(tokens()).logits
    assert model.dtype is model.config.dtype is expected.dtype is torch.bfloat16
    model.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert again.dtype is torch.bfloat16
    assert torch.equal(again(tokens()).logits, expected), "the rotary table stays in float32 on both ways"


@FAMILY
def test_adoption_takes_narrowed_blocks(name: str) -> None:
    """Narrow copies of a dense model's blocks, then change its class, as compression does."""
    target = compressed(name)
    model = dense(name)
    family, architecture = target.config.family, resolve(model)
    copies = {}
    for block, source in zip(architecture.blocks, blocks_of(target, name), strict=True):
        student, wanted = block.compressible_copy(CPU), source.get_submodule(family.attention.module)
        student.attention.set_widths(wanted.qk_head_dim, wanted.v_head_dim)
        for projection in family.projections:
            linear = source.get_submodule(projection.path)
            bias = None if linear.bias is None else linear.bias.detach()
            install_linear(student.module, projection.path, linear.weight.detach(), bias)
        if student.rotary:
            install_rope_index(student.attention, wanted.rope_index.clone())
        if student.normalised:
            gains = {role: wanted.head_norm(role).weight.detach().clone() for role in ("query", "key")}
            install_head_gains(student.attention, gains)
        copies[architecture.block_paths[block.index]] = student.module
        architecture.block_list[block.index] = student.module
    ids = tokens()
    half_done = model(ids).logits
    config = type(target).config_class.from_dense(model.config, target.config.widths(), {"format_version": 1})
    become(model, built(model, type(target), config, copies))
    assert torch.equal(model(ids).logits, half_done)
    target.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(target(ids).logits, half_done)


@EVERY
def test_kernels_agree(name: str) -> None:
    model, ids = compressed(name), tokens(3, 14)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    model.set_attn_implementation("sdpa")
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask.bool()], expected, atol=3e-5, rtol=1e-5)


@FAMILY
def test_flash_kernels_get_one_width(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the missing kernel by eager attention, and check the arguments that it receives."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, ids = compressed(name), tokens()
    model.set_attn_implementation("eager")
    expected = model(ids).logits
    windows, seen = [], []

    def kernel(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        seen.append((query.shape[-1], key.shape[-1], value.shape[-1]))
        windows.append(kwargs.get("sliding_window"))
        length = query.shape[2]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        window = kwargs.pop("sliding_window", None) or length
        bias = torch.where((distance >= 0) & (distance < window), 0.0, float("-inf"))
        return module.eager_function()(module, query, key, value, bias, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", kernel)
    model.config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    widest = [max(width.qk, width.vo) for width in model.config.widths()]
    assert seen == [(width, width, width) for width in widest]
    expected_windows = {"mistral-window": [6] * 3, "qwen2-mixed-window": [None, 6, None]}
    assert windows == expected_windows.get(name, [None] * 3)


def test_a_stray_window_in_a_llama_configuration_is_ignored_as_in_the_dense_class() -> None:
    model = compressed("llama-gqa-tied", sliding_window=3)
    assert "sliding_window" not in blocks_of(model, "llama-gqa-tied")[0].self_attn.score_arguments()


@EVERY
def test_training_reaches_every_parameter(name: str) -> None:
    model, ids = compressed(name), tokens()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {key: parameter.grad.clone() for key, parameter in model.named_parameters()}

    model.train()
    plain = gradients()
    # A key bias changes no softmax without rotation and norms, so its gradient is only rounding.
    assert all(grad.abs().max() > 1e-6 for key, grad in plain.items() if not key.endswith("k_proj.bias"))
    # Renamed in transformers 5.20.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    checkpointed = gradients()
    for key, grad in plain.items():
        torch.testing.assert_close(checkpointed[key], grad, atol=1e-6, rtol=1e-5)


@FAMILY
def test_compiled_whole_equals_eager_mode(name: str) -> None:
    model, ids = compressed(name), tokens()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch._dynamo.reset()
        found = torch.compile(model, backend="eager", fullgraph=True)(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@EVERY
def test_copies_and_casts(name: str) -> None:
    model, ids = compressed(name), tokens()
    expected = model(ids).logits
    clone = copy.deepcopy(model)
    assert torch.equal(clone(ids).logits, expected)
    assert clone.config == model.config
    assert clone.config is not model.config
    for dtype in (torch.bfloat16, torch.float16):
        clone = copy.deepcopy(model).half() if dtype is torch.float16 else copy.deepcopy(model).to(dtype)
        indices = [buffer for key, buffer in clone.named_buffers() if key.endswith("rope_index")]
        assert all(buffer.dtype is torch.int32 for buffer in indices)
        found = clone(ids).logits
        assert found.dtype is dtype
        error = (found.float() - expected).norm() / expected.norm()
        assert error < (0.1 if dtype is torch.bfloat16 else 0.02)


@FAMILY
def test_resized_embeddings(name: str) -> None:
    model, ids = compressed(name), tokens()
    expected = model(ids).logits
    model.resize_token_embeddings(270, mean_resizing=False)
    found = model(ids).logits
    assert found.shape[-1] == 270
    torch.testing.assert_close(found[..., :260], expected)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (
        model.config.tie_word_embeddings
    )


@EVERY
def test_a_new_model_is_initialised_like_a_dense_one(name: str) -> None:
    config = compressed(name).config
    model = classes(name)["AutoModelForCausalLM"](config)
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            spread = module.weight.std().item()
            assert spread == pytest.approx(0.02, rel=0.3), path
            assert module.bias is None or not module.bias.any(), path


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("seed_oss", {"residual_dropout": 0.3}),
        ("starcoder2", {"residual_dropout": 0.3}),
        ("gpt2", {"resid_pdrop": 0.3}),
    ],
)
def test_dropout_after_the_output_projection_is_that_of_the_dense_model(name: str, rates: dict[str, float]) -> None:
    ids = tokens()
    reference, model = adopted(name, attention_dropout=0.0, **rates)
    found = []
    for each in (reference.train(), model.train()):
        torch.manual_seed(0)
        found.append(each(ids).logits)
    torch.testing.assert_close(found[1], found[0], atol=5e-5, rtol=1e-5)
    assert not torch.allclose(found[0], reference.eval()(ids).logits, atol=0.1)


@pytest.mark.parametrize("arguments", [{"softcap": 3.0}, {"s_aux": torch.zeros(4)}])
def test_a_single_token_is_not_attended_without_its_soft_cap_or_sinks(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short way for one token knows only the mask, so other arguments go to the attention function."""
    model, seen = compressed("llama-mha"), []

    def function(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **given: Any) -> Any:
        seen.append(given)
        return value.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", function)
    model.set_attn_implementation("sdpa")
    model(tokens(1, 1))
    assert seen == []
    monkeypatch.setattr(ModeGPTAttentionMixin, "score_arguments", lambda self: {"sliding_window": 6, **arguments})
    model(tokens(1, 1))
    assert len(seen) == model.config.num_hidden_layers
    assert all(given[name] is value for given in seen for name, value in arguments.items())
