"""A decoder block as the walk sees it: weights by role, halves to run, parts to install; no names of a family."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimum_modegpt.architectures.classes import FamilyClasses
from optimum_modegpt.decompositions.psd import at_least_float32, to_float64
from optimum_modegpt.modeling import modegpt_common as modeling
from optimum_modegpt.modeling.modegpt_family import Family


@dataclass(frozen=True)
class Block:
    """One decoder block of a known family.

    Rows of a projection are its weight (out, in) with the bias, where there is one, as a last column: a map of the
    outputs acts on both alike.
    """

    module: nn.Module
    classes: FamilyClasses
    index: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_first: bool

    @property
    def family(self) -> Family:
        """The description of the block's family."""
        return self.classes.family

    @property
    def attention(self) -> Any:
        """The attention module."""
        return self.module.get_submodule(self.family.attention.module)

    @property
    def query(self) -> nn.Linear:
        """The query projection."""
        return self._linear(self.family.attention.query)

    @property
    def key(self) -> nn.Linear:
        """The key projection."""
        return self._linear(self.family.attention.key)

    @property
    def value(self) -> nn.Linear:
        """The value projection."""
        return self._linear(self.family.attention.value)

    @property
    def output(self) -> nn.Linear:
        """The attention's output projection."""
        return self._linear(self.family.attention.output)

    @property
    def mlp_inputs(self) -> tuple[nn.Linear, ...]:
        """The MLP's input projections: (gate, up), or one."""
        return tuple(self._linear(path) for path in self.family.mlp.inputs)

    @property
    def down(self) -> nn.Linear:
        """The MLP's output projection."""
        return self._linear(self.family.mlp.output)

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        """All projections that compression narrows."""
        return tuple(self._linear(projection.path) for projection in self.family.projections)

    @property
    def attention_norm(self) -> Any:
        """The norm before the attention, or after it in a post-norm block."""
        return self.module.get_submodule(self.family.residual.attention_norm)

    @property
    def mlp_norm(self) -> Any:
        """The norm before the MLP, or after it in a post-norm block."""
        return self.module.get_submodule(self.family.residual.mlp_norm)

    @property
    def activation(self) -> Any:
        """The MLP's activation φ."""
        return self.module.get_submodule(self.family.mlp.activation)

    @property
    def rotary(self) -> bool:
        """Whether query and key are rotated by position."""
        return self.family.attention.rotary

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate beside up."""
        return len(self.family.mlp.inputs) == 2

    @property
    def dense_widths(self) -> modeling.Widths:
        """The widths of the uncompressed block."""
        return modeling.Widths(self.head_dim, self.head_dim, self.down.in_features)

    def _linear(self, path: str) -> nn.Linear:
        return self.module.get_submodule(path)  # pyright: ignore[reportReturnType]

    # ------------------------------------------------------------------------------------------------------- weights

    def head_rows(self, role: str) -> Tensor:
        """Rows of the "query", "key" or "value" projection by head, (heads, head_dim, in [+ 1]); float64."""
        return _rows(self._linear(getattr(self.family.attention, role))).unflatten(0, (-1, self.head_dim))

    def mlp_rows(self) -> tuple[Tensor, ...]:
        """Rows of the MLP's input projections, (width, d_model [+ 1]) each: (gate, up) or one; float32 or wider."""
        return tuple(_rows(linear, at_least_float32) for linear in self.mlp_inputs)

    def input_outputs(self, linear: nn.Linear) -> Tensor:
        """A projection's weight as (in [+ 1], out): inputs as rows, the bias as the last one; float64."""
        return _rows(linear).T

    # ------------------------------------------------------------------------------------------------------- forward

    def attention_input(self, stream: Tensor) -> Tensor:
        """What the attention reads of the residual stream at the block's input."""
        return self.attention_norm(stream) if self.norm_first else stream

    def attend(self, inputs: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The attention's output, (batch, length, d_model) to the same shape."""
        return self.attention(hidden_states=inputs, **arguments)[0]

    def after_attention(self, total: Tensor) -> Tensor:
        """The residual stream after the attention, from the sum of stream and attention output."""
        return total if self.norm_first else self.attention_norm(total)

    def mlp_input(self, stream: Tensor) -> Tensor:
        """What the MLP reads of the residual stream after the attention."""
        return self.mlp_norm(stream) if self.norm_first else stream

    def mlp_hidden(self, inputs: Tensor) -> Tensor:
        """The input of the down projection."""
        first = self.activation(self.mlp_inputs[0](inputs))
        return first * self.mlp_inputs[1](inputs) if self.gated else first

    def after_mlp(self, total: Tensor) -> Tensor:
        """The block's output, from the sum of stream and MLP output."""
        return total if self.norm_first else self.mlp_norm(total)

    def forward(self, stream: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The block's output, as transformers computes it."""
        return self.module(stream, **arguments)

    def composed_forward(self, stream: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The block's output put together from the halves above; equal to `forward` or we misread the block."""
        middle = self.after_attention(stream + self.attend(self.attention_input(stream), arguments))
        return self.after_mlp(middle + self.down(self.mlp_hidden(self.mlp_input(middle))))

    # ------------------------------------------------------------------------------------------------------- install

    def compressible_copy(self, device: torch.device) -> Block:
        """A copy on `device` whose attention is of the compressed class at full width, ready for `install_*`."""
        copied = self._copied(device)
        modeling.adopt_attention(copied.attention, self.classes.attention_class)
        return copied

    def narrow(self, widths: modeling.Widths) -> nn.Module:
        """An empty module of these widths with the compressed attention, on the meta device, to be filled."""
        module = self._copied(torch.device("meta")).module
        modeling.shrink_block(module, self.classes.attention_class, widths)
        return module

    def on(self, device: torch.device) -> Block:
        """This block on `device`: itself where it is there already, else a copy."""
        if self.output.weight.device == device:
            return self
        return self._copied(device)

    def _copied(self, device: torch.device) -> Block:
        """A copy whose tensors went straight to `device`: the host never holds a second set for it."""
        tensors: dict[int, Any] = {id(buffer): buffer.to(device, copy=True) for buffer in self.module.buffers()}
        for parameter in self.module.parameters():
            copied = parameter.detach().to(device, copy=True)
            tensors[id(parameter)] = nn.Parameter(copied, requires_grad=parameter.requires_grad)
        return dataclasses.replace(self, module=copy.deepcopy(self.module, tensors))

    def install_query_key(self, query: Tensor, key: Tensor, pairs: Tensor | None) -> None:
        """Replaces query and key by rows (heads, rank, in [+ 1]); `pairs` (kv_heads, rank / 2) are the rotary ones."""
        self._install_rows(self.family.attention.query, query.flatten(0, 1))
        self._install_rows(self.family.attention.key, key.flatten(0, 1))
        self.attention.set_widths(query.shape[1], self.attention.v_head_dim)
        if pairs is not None:
            modeling.install_rope_index(self.attention, pairs.to(self.output.weight.device))

    def install_value_output(self, value: Tensor, output: Tensor) -> None:
        """Replaces value by rows (kv_heads, rank, in [+ 1]) and output by (heads · rank [+ 1], d_model)."""
        self._install_rows(self.family.attention.value, value.flatten(0, 1))
        self._install_rows(self.family.attention.output, output.T)
        self.attention.set_widths(self.attention.qk_head_dim, value.shape[1])

    def install_mlp(self, rows: tuple[Tensor, ...], down: Tensor) -> None:
        """Replaces the MLP: input rows (rank, d_model [+ 1]) each, and down (rank [+ 1], d_model)."""
        for path, row in zip(self.family.mlp.inputs, rows, strict=True):
            self._install_rows(path, row)
        self._install_rows(self.family.mlp.output, down.T)

    def _install_rows(self, path: str, rows: Tensor) -> None:
        has_bias = self._linear(path).bias is not None
        weight, bias = (rows[:, :-1], rows[:, -1]) if has_bias else (rows, None)
        modeling.install_linear(self.module, path, weight, bias)


def _rows(linear: nn.Linear, to: Callable[[Tensor], Tensor] = to_float64) -> Tensor:
    weight = to(linear.weight.detach())
    return weight if linear.bias is None else torch.cat((weight, to(linear.bias.detach())[:, None]), dim=1)
