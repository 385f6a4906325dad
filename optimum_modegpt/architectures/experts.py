"""The experts of a block: read the weights of each, run it on its own tokens, and replace it by a narrower one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimum_modegpt.decompositions.psd import to_float64
from optimum_modegpt.modeling.modegpt_experts import channel_axis, install_packed, packed_names, packed_shape


@dataclass(frozen=True)
class Routing:
    """The tokens of a batch, and the experts that the router chose for each, as the experts received them.

    Attributes:
        inputs: (tokens, d_model).
        chosen: the chosen experts, (tokens, experts per token).
        weights: the weight of each of their outputs, (tokens, experts per token).
    """

    inputs: Tensor
    chosen: Tensor
    weights: Tensor

    def tokens_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return the indices of an expert's tokens, and the weights of its outputs, (own tokens,) each."""
        tokens, place = (self.chosen == expert).nonzero(as_tuple=True)
        return tokens, self.weights[tokens, place]


@dataclass(frozen=True)
class PackedExperts:
    """The experts of one block. Their class is that of transformers, and its attributes say how weights are packed."""

    module: Any

    @property
    def count(self) -> int:
        """The number of experts."""
        return self.module.down_proj.shape[0]

    @property
    def width(self) -> int:
        """The number of hidden channels of an expert."""
        return packed_shape(self.module)[1]

    @property
    def has_bias(self) -> bool:
        """Whether the projections have biases."""
        return self.module.has_bias

    @property
    def refusal(self) -> str | None:
        """The reason why these experts cannot be compressed, or None."""
        if not getattr(self.module, "has_gate", False):
            return "its experts have no gate"
        if getattr(self.module, "has_post_expert_norm", False):
            return "the output of its experts is normalised"
        if not self._gates_by_channel():
            return "the gate of its experts combines other channels than their layout says"
        return None

    def _gates_by_channel(self) -> bool:
        """Return whether every hidden channel depends on no other rows of gate and up than its own, on random rows."""
        rows = torch.randn(1, 2 * self.width, generator=torch.Generator().manual_seed(0))
        kept = torch.arange(0, self.width, 2)
        found = self.module._apply_gate(rows[:, self._gate_and_up(kept)])
        return torch.allclose(found, self.module._apply_gate(rows)[:, kept])

    def hidden(self, expert: int, inputs: Tensor) -> Tensor:
        """Return the hidden channels of an expert, (tokens, width), for inputs (tokens, d_model)."""
        weight = self.module.gate_up_proj[expert]
        both = inputs @ (weight if self.module.is_transposed else weight.T)
        if self.has_bias:
            both = both + self.module.gate_up_proj_bias[expert]
        return self.module._apply_gate(both)

    def output(self, expert: int, hidden: Tensor, *, bias: bool = True) -> Tensor:
        """Return the output of an expert, (tokens, d_model), from its hidden channels, with or without the bias."""
        weight = self.module.down_proj[expert]
        output = hidden @ (weight if self.module.is_transposed else weight.T)
        return output + self.module.down_proj_bias[expert] if bias and self.has_bias else output

    def down(self, expert: int) -> Tensor:
        """Return an expert's output projection as (width [+ 1], d_model), with the bias as last row, in float64."""
        weight = to_float64(self.module.down_proj[expert].detach())
        weight = weight if self.module.is_transposed else weight.T
        if not self.has_bias:
            return weight
        return torch.cat((weight, to_float64(self.module.down_proj_bias[expert].detach())[None]))

    def combined(self, routing: Routing) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, (tokens, d_model)."""
        total = torch.zeros_like(routing.inputs)
        for expert in range(self.count):
            tokens, weights = routing.tokens_of(expert)
            output = self.output(expert, self.hidden(expert, routing.inputs[tokens]))
            total.index_add_(0, tokens, (output * weights[:, None]).to(total))
        return total

    def install(self, kept: Sequence[Tensor], downs: Sequence[Tensor]) -> None:
        """Keep the hidden channels `kept` (rank,) of every expert, and replace its output by `downs` (rank [+ 1], d).

        A down projection has the bias as last row if the experts have biases.
        """
        module, rank = self.module, len(kept[0])
        both = [self._gate_and_up(channels) for channels in kept]
        for name in packed_names(module):
            if not name.startswith("gate_up"):
                continue
            axis = channel_axis(module, name) - 1  # of one expert
            narrowed = [
                one.detach().index_select(axis, rows) for one, rows in zip(getattr(module, name), both, strict=True)
            ]
            install_packed(module, name, torch.stack(narrowed))
        weights = torch.stack([down[:rank] for down in downs])  # (experts, rank, d_model)
        install_packed(module, "down_proj", (weights if module.is_transposed else weights.mT).contiguous())
        if self.has_bias:
            install_packed(module, "down_proj_bias", torch.stack([down[rank] for down in downs]))

    def _gate_and_up(self, channels: Tensor) -> Tensor:
        """Return the rows of the packed gate and up projections of these channels, (2 · rank,)."""
        if self.module.is_concatenated:
            return torch.cat((channels, channels + self.width))
        return torch.stack((2 * channels, 2 * channels + 1), dim=1).flatten()


@contextmanager
def routed(experts: nn.Module) -> Iterator[list[tuple[Routing, Tensor]]]:
    """Record the routing and the output of every call of the experts' module within the context."""
    seen: list[tuple[Routing, Tensor]] = []
    handle = experts.register_forward_hook(lambda _, args, output: seen.append((Routing(*args), output)))  # pyright: ignore[reportArgumentType]
    try:
        yield seen
    finally:
        handle.remove()
