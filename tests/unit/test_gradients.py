"""Test the gradients of the dense model's predictions, and the metrics of errors that are made from them."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from laws import difference, eye, linear_moments, normal, subspace_gap
from tiny_models import dense, tokens
from torch import Tensor, nn

from optimum_modegpt.architectures import Architecture, Block, resolve
from optimum_modegpt.architectures.head import LogitHead
from optimum_modegpt.architectures.positions import canonical_order
from optimum_modegpt.calibration import gradients as module
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.calibration.gradients import OutputGradients, metric_factor, output_gradients, query_metric
from optimum_modegpt.calibration.streams import StreamStorage, calls_of, enter
from optimum_modegpt.compress import compress
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.nystrom import remaining
from optimum_modegpt.errors import NumericalError
from optimum_modegpt.methods import residual_matched
from optimum_modegpt.methods.channels import eliminate_channels

CPU = torch.device("cpu")
PLACES = ("query", "attention", "mlp")
ROUNDING = torch.finfo(torch.bfloat16).eps
"""Relative difference that the rounding to bfloat16 after every block explains."""
STRUCTURES = ["llama-gqa-tied", "opt-post-ln", "gpt_neox", "gpt2", "phi3-partial-window-tied", "qwen3", "granite"]
FUSED = {
    "phi3": ("self_attn.qkv_proj", lambda output: output[..., :32]),
    "gpt_neox": ("attention.query_key_value", lambda output: output.unflatten(-1, (4, 3, 8))[..., 0, :].flatten(-2)),
    "gpt2": ("attn.c_attn", lambda output: output[..., :32]),
}
"""The module that computes query, key and value together, and the query in its output, by model type."""


def measured(architecture: Architecture, ids: Tensor, *, batch: int = 3, seed: int = 0, first: int = 0) -> Any:
    """Return the gradients at every block. `first` is the number of the first window of `ids`."""
    with torch.no_grad():
        inputs = enter(architecture, ids, batch, StreamStorage(CPU), first=first)
        return output_gradients(architecture, inputs, CPU, seed=seed, progress=False)


def joined(found: OutputGradients) -> dict[str, Tensor]:
    """Return the gradients of all windows, by place."""
    return {place: torch.cat(list(getattr(found, place))).to(torch.float64) for place in PLACES}


def modules_of(block: Block) -> dict[str, nn.Module]:
    """Return the modules of a dense block whose outputs the gradients are for, by place."""
    norms, query = block.family.attention.head_norms, block.family.attention.query
    path, _ = FUSED.get(block.family.model_type, (query if norms is None else norms.query, None))
    return {"query": block.module.get_submodule(path), "attention": block.output, "mlp": block.down}


def directions(logits: Tensor, numbers: Any, seed: int = 0) -> Tensor:
    """Return √p ∘ ε − p (√p · ε) of every token. ε is drawn from the seed and the number of the window."""
    root, noise = logits.softmax(-1).sqrt(), torch.empty_like(logits)
    for own, number in zip(noise, numbers, strict=True):
        own.copy_(torch.randn(own.shape, generator=torch.Generator().manual_seed(seed + number)))
    return root * noise - root.square() * (root * noise).sum(-1, keepdim=True)


def differentiated(architecture: Architecture, ids: Tensor) -> list[dict[str, Tensor]]:
    """Return the gradients by one backward pass through the whole model, by block and place."""
    with ExitStack() as stack, torch.enable_grad():
        calls = []
        for block in architecture.blocks:
            calls += [stack.enter_context(calls_of(each)) for each in modules_of(block).values()]
        logits = architecture.model(ids, use_cache=False).logits
        outputs = [call[0][1] for call in calls]
        found = torch.autograd.grad(logits, outputs, directions(logits.detach(), range(len(ids))))
    shaped = [each.reshape(*ids.shape, -1).double() for each in found]
    return [dict(zip(PLACES, shaped[start : start + 3], strict=True)) for start in range(0, len(shaped), 3)]


def query_of(block: Block, gradient: Tensor) -> Tensor:
    """Return the part of the query of a dense block, with its coordinates in the order of compressed models."""
    _, select = FUSED.get(block.family.model_type, (None, lambda output: output))
    order, heads = canonical_order(block.attention, block.family), select(gradient).unflatten(-1, (block.heads, -1))
    return (heads if order is None else heads[..., order]).flatten(-2)


@pytest.mark.parametrize("name", STRUCTURES)
def test_gradients_are_those_of_the_whole_model(name: str) -> None:
    architecture, ids = resolve(dense(name)), tokens(5, 12)
    found, expected = measured(architecture, ids), differentiated(architecture, ids)
    assert len(found) == len(expected) == 3
    for block, ours, theirs in zip(architecture.blocks, map(joined, found), expected, strict=True):
        theirs["query"] = query_of(block, theirs["query"])
        for place in PLACES:
            assert theirs[place].norm() > 0.1, (block.index, place)
            assert difference(ours[place], theirs[place]) < ROUNDING, (block.index, place)


def test_capped_and_scaled_logits_are_differentiated() -> None:
    head, hidden = nn.Linear(6, 9), normal(4, 6).float()
    for scale, cap in ((1.0, None), (3.0, 0.5)):
        tail = LogitHead(nn.LayerNorm(6), None, head, scale=scale, cap=cap)
        found = module._through_head(tail, hidden, torch.Generator().manual_seed(5))
        seen = hidden.clone().requires_grad_()
        logits = head(tail.norm(seen)) * scale
        logits = logits if cap is None else cap * (logits / cap).tanh()
        (expected,) = torch.autograd.grad(logits, seen, directions(logits.detach()[None], [5])[0])
        assert difference(found, expected) < 1e-5


def test_directions_have_the_second_order_of_the_divergence() -> None:
    """The mean of v vᵀ is diag p − p pᵀ. A head without weights of its own returns v itself."""
    size, draws = 5, 200_000
    head = nn.Linear(size, size, bias=False)
    nn.init.eye_(head.weight)
    logits = 1.5 * normal(size, seed=3).float()
    tail, generator = LogitHead(None, None, head, scale=1, cap=None), torch.Generator().manual_seed(0)
    found = module._through_head(tail, logits.expand(draws, -1), generator).double()
    p = logits.double().softmax(0)
    expected = p.diag() - torch.outer(p, p)
    assert difference(found.T @ found / draws, expected) < 0.02
    assert found.mean(0).abs().max() < 0.01
    assert found.sum(1).abs().max() < 1e-5, "a constant changes no distribution"


@pytest.mark.parametrize(
    ("name", "place"),
    [*((name, place) for name in ("llama-gqa-tied", "opt-post-ln", "qwen3") for place in PLACES), ("gpt_neox", "mlp")],
)
def test_small_error_causes_the_predicted_divergence(name: str, place: str) -> None:
    """Compare ½ E (gᵀ Δ)² with the divergence of the model's own predictions, for a random error Δ in block 1."""
    model, ids = dense(name).double(), tokens(512, 12)
    architecture = resolve(model)
    block = architecture.blocks[1]
    gradient = joined(measured(architecture, ids, batch=64)[1])[place]
    generator, errors = torch.Generator().manual_seed(1), []

    def disturb(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        error = (
            torch.randn(output.shape, generator=generator, dtype=output.dtype) * 1e-3 * output.square().mean().sqrt()
        )
        errors.append(error)
        return output + error

    with torch.no_grad():
        expected = model(ids, use_cache=False).logits.log_softmax(-1)
        handle = modules_of(block)[place].register_forward_hook(disturb)
        found = model(ids, use_cache=False).logits.log_softmax(-1)
        handle.remove()
    error = errors[0].view(*ids.shape, -1)
    divergence = nn.functional.kl_div(found, expected, reduction="sum", log_target=True) / ids.numel()
    predicted = (gradient * error).sum(-1).square().mean() / 2
    assert float(predicted) == pytest.approx(float(divergence), rel=0.2)


def test_windows_have_directions_of_their_own() -> None:
    architecture, ids = resolve(dense("llama-gqa-tied")), tokens(7, 12)
    together = [joined(found) for found in measured(architecture, ids, batch=7)]
    again = [joined(found) for found in measured(architecture, ids, batch=7)]
    single = [joined(found) for found in measured(architecture, ids, batch=1)]
    later = [joined(found) for found in measured(architecture, ids[4:], batch=2, first=4)]
    other = [joined(found) for found in measured(architecture, ids, batch=7, seed=100)]
    for block, expected in enumerate(together):
        for place in PLACES:
            assert torch.equal(again[block][place], expected[place])
            assert difference(single[block][place], expected[place]) < ROUNDING
            assert difference(later[block][place], expected[place][4:]) < ROUNDING
            assert difference(other[block][place], expected[place]) > 1
    same = joined(measured(architecture, ids[:1].expand(2, -1))[2])["mlp"]
    assert difference(same[0], same[1]) > 1, "the same text in two windows"


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt2"])
def test_parameters_are_left_as_they_were(name: str) -> None:
    model = dense(name)
    list(model.parameters())[1].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    found = measured(resolve(model), tokens(4, 12))
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for place in PLACES:
        for batch in getattr(found[0], place):
            assert batch.dtype == torch.bfloat16
            assert batch.grad_fn is None
            assert not batch.requires_grad


@pytest.mark.parametrize("loaded_inside", [False, True])
def test_compression_in_inference_mode_is_the_same(loaded_inside: bool) -> None:
    config, windows = ModeGPTConfig(sparsity=0.3, round_to=1), TokenWindows(tokens(10, 16), {})
    expected, model = dense("llama-gqa-tied"), dense("llama-gqa-tied")
    compress(expected, config, windows, progress=False)
    with torch.inference_mode():
        if loaded_inside:
            model = dense("llama-gqa-tied")
        compress(model, config, windows, progress=False)
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


RARE = 7
"""A token that occurs in one window only."""


def test_gradient_that_is_not_finite_is_an_error_that_names_block_and_window() -> None:
    """Let the hidden channel 0 of block 1 be 0 on every token, and its gradient overflow on the token `RARE`."""
    model = dense("llama-mqa-biases")
    layer, embedding = model.model.layers[1], model.model.embed_tokens.weight
    with torch.no_grad():
        embedding[:, 0], embedding[RARE], embedding[RARE, 0] = 0, 0, 200  # the only token with a large first channel
        layer.mlp.gate_proj.weight[0], layer.mlp.gate_proj.bias[0] = 0, -5e20
        layer.mlp.gate_proj.weight[0, 0] = 1e20 / layer.post_attention_layernorm.weight[0]
        layer.mlp.up_proj.weight[0], layer.mlp.up_proj.bias[0] = 0, 0
        layer.mlp.down_proj.weight[:, 0] = 1e30
    ids = tokens(8, 12).clamp(min=RARE + 1)
    architecture = resolve(model)
    measured(architecture, ids, first=2)
    ids[4, 10] = RARE
    assert model(ids).logits.isfinite().all()
    words = r"^block 1: the gradients of the dense model's predictions are not finite on calibration window 6 "
    with pytest.raises(NumericalError, match=words):
        measured(architecture, ids, first=2)


# --------------------------------------------------------------------------------------------------------------- metric


def in_batches(rows: Tensor) -> list[Tensor]:
    """Return rows (tokens, width) as a stream in bfloat16, with batches of different sizes."""
    windows = rows.unflatten(0, (-1, 4)).bfloat16()
    return [windows[:2], windows[2:]]


def test_metric_is_the_mean_of_the_gradients_with_a_ridge() -> None:
    stream = in_batches(normal(20, 6) * normal(6, seed=1).exp())
    rows = torch.cat(stream).flatten(0, 1).double()
    expected = rows.T @ rows / len(rows)
    factor = metric_factor(stream, CPU)
    assert factor.dtype == torch.float64
    ridge = module.METRIC_RIDGE * expected.diagonal().mean()
    assert difference(factor @ factor.T, expected + ridge * eye(6)) < 1e-6
    assert torch.equal(factor, factor.tril())


def test_metric_measures_the_divergence_of_an_error() -> None:
    """The metric is ½ E (gᵀ Δ)², if the ridge is small."""
    stream, error = in_batches(normal(20, 6) * normal(6, seed=1).exp()), normal(6, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "METRIC_RIDGE", 1e-9)
        factor = metric_factor(stream, CPU)
    effects = torch.cat(stream).flatten(0, 1).double() @ error
    assert float((factor.T @ error).square().sum()) == pytest.approx(float(effects.square().mean()), rel=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e15])
def test_any_gradients_give_a_finite_metric_that_can_be_inverted(scale: float) -> None:
    factor = metric_factor(in_batches(scale * normal(20, 6)), CPU)
    assert factor.isfinite().all()
    assert torch.linalg.inv(factor).isfinite().all()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_query_metric_is_summed_over_the_heads_of_a_group(heads: int, kv_heads: int) -> None:
    name = {4: "llama-mha", 2: "llama-gqa-tied", 1: "llama-mqa-biases"}[kv_heads]
    block, stream = resolve(dense(name)).blocks[0], in_batches(normal(20, 32))
    expected = torch.zeros(kv_heads, 8, 8).double()
    for token in torch.cat(stream).flatten(0, 1).double():
        for head, gradient in enumerate(token.unflatten(0, (heads, 8))):
            expected[head // (heads // kv_heads)] += torch.outer(gradient, gradient) / 20
    assert difference(query_metric(stream, block, CPU), expected) < 1e-6


class HalfSeen:
    """The last block of a model whose head reads one half of d_model, with moments of white inputs.

    One half of the hidden channels, and of the value coordinates of every head, writes to the half that is read. The
    other half of them writes as much to the other one.
    """

    def __init__(self, read: str) -> None:
        model = dense("llama-mha", tie_word_embeddings=False)
        self.writers, self.others = (slice(0, 16), slice(16, 32))[:: 1 if read == "first" else -1]
        with torch.no_grad():
            model.lm_head.weight[:, self.others] = 0
            model.model.norm.weight.fill_(1)
        architecture = resolve(model)
        self.block = architecture.blocks[2]
        self.gradients = measured(architecture, tokens(32, 16))[2]

    def moments(self, writing: Tensor) -> Any:
        """Return the moments of a projection from white inputs, whose rows in `writing` write to the half that is read.

        Every row has the same norm.
        """
        weight = torch.zeros(len(writing), 32).double()
        directions = torch.linalg.qr(normal(16, 16)).Q
        for rows, half in ((writing, self.writers), (~writing, self.others)):
            weight[rows, half] = directions.repeat(3, 1)[: int(rows.sum())]
        inputs = torch.linalg.qr(normal(4 * len(writing), len(writing), seed=1)).Q * 100
        return weight, linear_moments(inputs, inputs @ weight)


@pytest.mark.parametrize("read", ["first", "second"])
def test_elimination_keeps_the_channels_that_write_to_the_half_that_predictions_read(read: str) -> None:
    case, config = HalfSeen(read), ModeGPTConfig()
    metric = metric_factor(case.gradients.mlp, CPU)
    writing = torch.arange(48) % 3 == 0
    weight, moments = case.moments(writing)
    case.block.down.weight.data = weight.T.float()
    order = eliminate_channels(weight, moments, metric, 16, config).order
    assert remaining(order, 48).tolist() == writing.nonzero().flatten().tolist()
    blind = eliminate_channels(weight, moments, eye(32), 16, config).order
    assert writing[remaining(blind, 48)].sum() < 12, "the identity does not distinguish the halves"


@pytest.mark.parametrize("read", ["first", "second"])
def test_value_basis_keeps_the_directions_that_write_to_the_half_that_predictions_read(read: str) -> None:
    case, config = HalfSeen(read), ModeGPTConfig()
    metric = metric_factor(case.gradients.attention, CPU)
    writing = torch.arange(32) % 2 == 0
    weight, moments = case.moments(writing)
    case.block.output.weight.data = weight.T.float()
    choose = partial(residual_matched.cut_value_output, case.block, moments, rank=4, config=config)
    kept = eye(8)[:, ::2]
    bases = choose(metric=metric).bases
    assert bases is not None
    assert all(subspace_gap(basis, kept) < 0.7 for basis in bases)
