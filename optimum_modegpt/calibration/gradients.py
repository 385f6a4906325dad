"""Measure how the dense model's predictions depend on the outputs of every block and of its halves (ours).

For a change δ of the logits, the divergence of the next-token distribution p is ½ δᵀ (diag p − p pᵀ) δ to second
order. v = √p ∘ ε − p (√p · ε), with ε standard normal, has this covariance. If g is the gradient of v · logits with
respect to an output inside the model, an error Δ of that output therefore causes a divergence of ½ E (gᵀ Δ)². This
assumes that the errors of different tokens are uncorrelated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from optimum_modegpt import distributed
from optimum_modegpt.architectures import Architecture, Block
from optimum_modegpt.architectures.head import LogitHead
from optimum_modegpt.calibration.moments import HeadMomentSum
from optimum_modegpt.calibration.streams import (
    DENSE_ADVICE,
    BlockInputs,
    Stream,
    calls_of,
    check_dense,
    map_stream,
    not_finite,
    store_like,
    token_count,
)
from optimum_modegpt.calibration.transfers import prefetch
from optimum_modegpt.decompositions.psd import at_least_float32, damp, gram_matrix, to_float64
from optimum_modegpt.errors import NumericalError, naming
from optimum_modegpt.progress import bar

LOGITS_AT_ONCE = 2**25
"""Maximum number of logits that are computed at once."""

METRIC_RIDGE = 1.0
"""Damping of the metric, as a fraction of its mean diagonal. The gradients are exact for small errors only, and few
tokens do not show all directions that matter. Chosen on SmolLM2-135M and models of five blocks."""


@dataclass(frozen=True)
class OutputGradients:
    """The gradients g at one block, one tensor in bfloat16 for each batch.

    Attributes:
        mlp: at the output of the down projection or the experts, (batch, length, d_model).
        query: at the output of the query projection or its norm, (batch, length, heads · head_dim).
        attention: at the output of the attention's output projection, (batch, length, d_model). This and `query` are
            empty for a block whose attention stays dense.
    """

    mlp: Stream
    query: Stream = field(default_factory=list)
    attention: Stream = field(default_factory=list)


def output_gradients(
    architecture: Architecture, inputs: BlockInputs, device: torch.device, *, seed: int, progress: bool
) -> list[OutputGradients]:
    """Return the gradients at every block, on the tokens of `inputs`, in the storage of their stream.

    One direction v is drawn for each token, from `seed` and the index of its window. The blocks are differentiated one
    at a time, from the last to the first, so only one is on the device.

    Raises:
        NumericalError: the dense model's outputs, or the gradients, are not finite.
    """
    blocks, streams = architecture.blocks, [inputs.stream]
    with bar(total=2 * len(blocks), desc="gradients", unit="block", shown=progress) as shown:
        for block in blocks:
            dense, arguments = block.on(device), inputs.on(block.index, device)
            streams.append(list(map_stream(partial(dense.forward, arguments=arguments), device, streams[-1])))
            with naming(f"block {block.index}"):
                check_dense(streams[-1], inputs.windows)
            shown.update()
        after = list(
            store_like(_logit_gradients(architecture.tail(device), streams.pop(), inputs, seed), inputs.stream)
        )
        found: list[OutputGradients] = []
        for block in reversed(blocks):
            separate, arguments = block.compressible_copy(device), inputs.on(block.index, device)
            modules = [separate.mlp_end]
            if separate.attends:
                modules += [separate.query_vectors, separate.output]
            places = 1 + len(modules)
            mixed = list(store_like(_differentiated(separate, modules, streams.pop(), after, arguments), inputs.stream))
            entering, *outputs = (mixed[place::places] for place in range(places))
            with naming(f"block {block.index}"):
                _require_finite("the gradients of the dense model's predictions", entering, inputs.windows)
            found.append(OutputGradients(*outputs))
            after = entering
            shown.update()
    return found[::-1]


def query_metric(gradients: Stream, block: Block, device: torch.device) -> Tensor:
    """Compute E g gᵀ of every key-value group, summed over its heads: (kv_heads, head_dim, head_dim), in float64.

    Twice the divergence caused by an error δ of a head's query is then δᵀ E[g gᵀ] δ on average.
    """
    total = HeadMomentSum(block.kv_heads)
    for batch in prefetch(gradients, device):
        total.add(batch.unflatten(-1, (-1, block.head_dim)))
    return total.value() / _tokens(gradients)


def metric_factor(gradients: Stream, device: torch.device) -> Tensor:
    """Compute L (d_model, d_model) in float64 with L Lᵀ = E g gᵀ + λI, over the tokens of all ranks.

    Twice the divergence caused by an error Δ is then ‖Lᵀ Δ‖² on average, if it does not depend on the token which
    directions matter.
    """
    total: Any = 0.0
    for batch in prefetch(gradients, device):
        total = total + to_float64(gram_matrix(at_least_float32(batch).flatten(0, 1)))
    metric = distributed.all_reduce(total) / _tokens(gradients)
    return torch.linalg.cholesky(damp(metric, METRIC_RIDGE))


def _tokens(stream: Stream) -> int:
    """Return the number of tokens of all ranks."""
    return distributed.all_reduce(token_count(stream))


def _logit_gradients(tail: LogitHead, stream: Stream, inputs: BlockInputs, seed: int) -> Iterator[Tensor]:
    """Yield the gradients at the last block's output."""
    device = tail.output.weight.device
    rows = max(1, LOGITS_AT_ONCE // tail.output.out_features)
    numbers = iter(inputs.windows.tolist())
    for batch in prefetch(stream, device):
        found = []
        for window, number in zip(batch, numbers, strict=False):
            generator = torch.Generator().manual_seed(seed + number)
            parts = window.split(rows)
            found.append(torch.cat([_through_head(tail, part, generator) for part in parts]))
            if not found[-1].isfinite().all():
                logits = [tail(part)[None] for part in parts]
                _require_finite("the dense model's logits", logits, torch.tensor([number] * len(parts)))
        yield torch.stack(found).to(torch.bfloat16)


def _through_head(tail: LogitHead, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Return the gradient of v · logits with respect to `hidden` (tokens, d_model), with one v per token."""
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        logits = at_least_float32(tail(hidden))
    root = logits.detach().softmax(-1).sqrt()
    spread = root * torch.randn(root.shape, generator=generator).to(root)
    direction = spread - root.square() * spread.sum(-1, keepdim=True)
    return torch.autograd.grad(logits, hidden, direction)[0]


def _differentiated(
    block: Block, modules: list[nn.Module], stream: Stream, after: Stream, arguments: dict[str, Any]
) -> Iterator[Tensor]:
    """Yield the gradients at the block's input, and at the outputs of its `modules`, batch by batch."""
    device = block.device
    with ExitStack() as stack:
        calls = [stack.enter_context(calls_of(module)) for module in modules]
        for entering, gradient in zip(prefetch(stream, device), prefetch(after, device), strict=True):
            entering = entering.detach().requires_grad_()
            # The gradient of the other kernels differs from run to run.
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                output = block.forward(entering, arguments)
                outputs = (entering, *(seen.pop()[1] for seen in calls))
                gradients = torch.autograd.grad(output, outputs, gradient.to(output))
            for each in gradients:  # some blocks flatten the tokens of their MLP
                yield each.to(torch.bfloat16).reshape(*entering.shape[:2], -1)


def _require_finite(name: str, stream: Stream, windows: Tensor) -> None:
    if (window := not_finite(stream, windows)) is not None:
        raise NumericalError(f"{name} are not finite on {window}. {DENSE_ADVICE}")
