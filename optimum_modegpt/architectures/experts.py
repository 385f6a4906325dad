"""The experts of a block: read the weights of each, run it on its own tokens, and replace it by a narrower one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimum_modegpt.decompositions.psd import at_least_float32, to_float64
from optimum_modegpt.modeling.modegpt_experts import install_packed, packed_shape


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
        gate, up = torch.randn(2, self.width, generator=torch.Generator().manual_seed(0))
        found = self.module._apply_gate(self._packed(gate[::2], up[::2])[None])
        return torch.allclose(found, self.module._apply_gate(self._packed(gate, up)[None])[:, ::2])

    @property
    def activation(self) -> Any | None:
        """The activation φ if the hidden channels are φ(gate) · up, or None. It is checked on random numbers."""
        gate, up = 10 * torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
        activation = getattr(self.module, "act_fn", None)
        if activation is None:
            return None
        found = self.module._apply_gate(self._packed(gate, up)[None])[0]
        return activation if torch.allclose(found, activation(gate) * up) else None

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

    def rows(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return the rows of an expert's gate and up, (width, d_model [+ 1]) each, in at least float32.

        The last column is the bias if the experts have biases.
        """
        weight = at_least_float32(self.module.gate_up_proj[expert].detach())
        both = weight.T if self.module.is_transposed else weight
        if self.has_bias:
            both = torch.cat((both, at_least_float32(self.module.gate_up_proj_bias[expert].detach())[:, None]), dim=1)
        if self.module.is_concatenated:
            return both[: self.width], both[self.width :]
        return both[::2], both[1::2]

    def combined(self, routing: Routing) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, (tokens, d_model)."""
        total = torch.zeros_like(routing.inputs)
        for expert in range(self.count):
            tokens, weights = routing.tokens_of(expert)
            output = self.output(expert, self.hidden(expert, routing.inputs[tokens]))
            total.index_add_(0, tokens, (output * weights[:, None]).to(total))
        return total

    def install(self, rows: Sequence[tuple[Tensor, Tensor]], downs: Sequence[Tensor]) -> None:
        """Replace every expert by gate and up (rank, d_model [+ 1]) each, and down (rank [+ 1], d_model).

        Biases are the last column of gate and up, and the last row of down.
        """
        module, d_model = self.module, downs[0].shape[1]
        rank = len(rows[0][0])
        both = torch.stack([self._packed(gate, up) for gate, up in rows])
        weights = both[..., :d_model]
        install_packed(module, "gate_up_proj", (weights.mT if module.is_transposed else weights).contiguous())
        weights = torch.stack([down[:rank] for down in downs])  # (experts, rank, d_model)
        install_packed(module, "down_proj", (weights if module.is_transposed else weights.mT).contiguous())
        if self.has_bias:
            install_packed(module, "gate_up_proj_bias", both[..., d_model].contiguous())
            install_packed(module, "down_proj_bias", torch.stack([down[rank] for down in downs]))

    def _packed(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return rows of gate and up in the order of the packed projection."""
        if self.module.is_concatenated:
            return torch.cat((gate, up))
        return torch.stack((gate, up), dim=1).flatten(0, 1)


@dataclass(frozen=True)
class SharedMLP:
    """The shared expert of one block: a gated MLP that all tokens pass, in addition to their experts."""

    module: Any
    gate: nn.Module | None
    """The projection (d_model -> 1) whose sigmoid multiplies the output, or None."""

    @property
    def width(self) -> int:
        """The number of hidden channels."""
        return self.module.down_proj.in_features

    @property
    def has_bias(self) -> bool:
        """Whether the projections have biases."""
        return self.module.down_proj.bias is not None

    @property
    def activation(self) -> Any:
        """The activation φ of the hidden channels φ(gate) · up."""
        return self.module.act_fn

    def hidden(self, inputs: Tensor) -> Tensor:
        """Return the hidden channels of tokens."""
        return self.activation(self.module.gate_proj(inputs)) * self.module.up_proj(inputs)

    def gates(self, inputs: Tensor) -> Tensor:
        """Return the weight of the output of every token, (…, 1)."""
        return inputs.new_ones(*inputs.shape[:-1], 1) if self.gate is None else self.gate(inputs).sigmoid()


@contextmanager
def routed(experts: nn.Module) -> Iterator[list[tuple[Routing, Tensor]]]:
    """Record the routing and the output of every call of the experts' module within the context."""
    seen: list[tuple[Routing, Tensor]] = []
    handle = experts.register_forward_hook(lambda _, args, output: seen.append((Routing(*args), output)))  # pyright: ignore[reportArgumentType]
    try:
        yield seen
    finally:
        handle.remove()
