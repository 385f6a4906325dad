"""A decoder block by role: read its weights, run its halves, and install compressed parts, without a family's names."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from optimum_modegpt.architectures.classes import FamilyClasses
from optimum_modegpt.architectures.experts import PackedExperts, Routing, SharedMLP, routed
from optimum_modegpt.architectures.norms import gain, weight_of
from optimum_modegpt.architectures.residual import ResidualProgram
from optimum_modegpt.architectures.storage import dense_weights, is_separate, reorder_head_norms
from optimum_modegpt.decompositions.psd import at_least_float32, to_float64
from optimum_modegpt.modeling import modegpt_blocks
from optimum_modegpt.modeling.modegpt_attention import ModeGPTAttentionMixin
from optimum_modegpt.modeling.modegpt_experts import experts_of
from optimum_modegpt.modeling.modegpt_family import Family, HeadNorms, Norm, Part, Topology, Widths


class Channels(NamedTuple):
    """The weights of the hidden channels of an MLP.

    Attributes:
        rows: of the input projections, (width, d_model [+ 1]) each, in at least float32.
        down: of the output projection, (width [+ 1], d_model), in float64.
    """

    rows: tuple[Tensor, ...]
    down: Tensor


@dataclass(frozen=True)
class Block:
    """One decoder block of a known family.

    A dense block is only run forward and measured. Its weights are read and replaced in a `compressible_copy`, which
    has the compressed classes and stores every projection separately. Rows of a projection are its weight (out, in)
    with the bias, if any, as the last column, so that a map of the outputs acts on both.
    """

    module: nn.Module
    classes: FamilyClasses
    index: int
    config: Any
    """The configuration of the model."""
    heads: int
    kv_heads: int
    head_dim: int
    d_model: int
    mlp_width: int
    topology: Topology
    multiplier: float
    rotary: bool
    """Whether query and key are rotated by position."""
    parts: tuple[Part, ...]
    """The parts of the block. It has no "qk" and "vo" if its attention, or the module in its place, stays dense."""
    uncut: tuple[Part, ...]
    """The parts that compression leaves at their dense width. `Family.uncut` has the reasons."""

    @property
    def family(self) -> Family:
        """The description of the block's family."""
        return self.classes.family

    @property
    def attention(self) -> Any:
        """The attention module."""
        return self.module.get_submodule(self.family.attention.module)

    def count(self, unit: Literal["heads", "kv_heads", "block"]) -> int:
        """Return the number of these units in the block."""
        return {"heads": self.heads, "kv_heads": self.kv_heads, "block": 1}[unit]

    @property
    def keeps_coordinates(self) -> bool:
        """Whether narrow values are some coordinates of the dense ones, instead of a basis."""
        return self.family.attention.values == "coordinates"

    @property
    def attends(self) -> bool:
        """Whether the block has an attention whose projections are parts of it."""
        return "qk" in self.parts

    @property
    def mixer(self) -> nn.Module:
        """The module that mixes tokens: the attention, or the one in its place."""
        if self.attends:
            return self.attention
        paths = dict(self.module.named_modules())
        return next(paths[path] for path in self.family.attention.mixers if path in paths)

    @property
    def device(self) -> torch.device:
        """The device of the block's weights."""
        return next(self.module.parameters()).device

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
    def head_norms(self) -> HeadNorms | None:
        """The description of the norms of queries and keys, or None if the block has none."""
        return self.family.attention.norms_of(self.config) if self.attends else None

    @property
    def normalised(self) -> bool:
        """Whether query and key heads have norms, and can be narrow."""
        return self.head_norms is not None and "qk" not in self.uncut

    @property
    def norms_joint(self) -> bool:
        """Whether the heads of queries, and those of keys, are normalised together."""
        norms = self.head_norms
        return norms is not None and norms.over == "projection"

    @property
    def norms_rotated(self) -> bool:
        """Whether query and key heads are normalised after their rotation."""
        norms = self.head_norms
        return self.rotary and norms is not None and norms.rotated

    @property
    def paired(self) -> bool:
        """Whether narrow heads keep pairs of coordinates. Otherwise, they have a basis of their own."""
        return self.rotary or self.normalised

    @property
    def dense_head_norms(self) -> list[nn.Module]:
        """The norms of queries and keys, if any, of a dense block."""
        norms = self.head_norms
        return [] if norms is None else [self.module.get_submodule(path) for path in (norms.query, norms.key)]

    def head_norm(self, role: str) -> Any:
        """Return the norm of "query" or "key". The block must be normalised, and of the compressed classes."""
        return self.attention.head_norm(role)

    @property
    def query_vectors(self) -> nn.Module:
        """The module whose outputs are the queries: their norm, or the projection. The block must be separate."""
        return self.head_norm("query") if self.normalised else self.query

    @property
    def stored_value(self) -> nn.Module:
        """The module that holds the value projection, alone or with others."""
        storage = self.family.attention.storage
        return self.value if self.is_separate or storage.path is None else self.module.get_submodule(storage.path)

    @property
    def output(self) -> nn.Linear:
        """The attention's output projection."""
        return self._linear(self.family.attention.output)

    @property
    def mlp_inputs(self) -> tuple[nn.Linear, ...]:
        """The MLP's input projections: (gate, up), or one. The block must be separate."""
        return tuple(self._linear(path) for path in self.family.mlp.inputs)

    @property
    def down(self) -> nn.Linear:
        """The MLP's output projection."""
        return self._linear(self.family.mlp.output)

    @property
    def experts(self) -> PackedExperts | None:
        """The experts, or None if the MLP is a dense one, for which all members about its projections are."""
        module = experts_of(self.module, self.family)
        return None if module is None else PackedExperts(module)

    @property
    def shared(self) -> SharedMLP | None:
        """The shared expert, or None if the block has none."""
        described = self.family.shared
        if described is None or "shared" not in self.parts:
            return None
        gate = None if described.gate is None else self.module.get_submodule(described.gate)
        return SharedMLP(self.module.get_submodule(described.module), gate)

    @property
    def mlp_end(self) -> nn.Module:
        """The module whose output is that of the MLP."""
        experts = self.family.mlp.experts
        return self.down if self.experts is None or experts is None else self.module.get_submodule(experts.module)

    @property
    def residual(self) -> ResidualProgram:
        """The order of norms, halves and sums."""
        names = self.family.residual
        attention_norm, mlp_norm = self._norm(names.attention_norm), self._norm(names.mlp_norm)
        if self.topology == "parallel" and mlp_norm is None:
            mlp_norm = attention_norm
        return ResidualProgram(
            self.topology,
            self.multiplier,
            attention_norm,
            mlp_norm,
            self._norm(names.attention_output_norm),
            self._norm(names.mlp_output_norm),
            None if names.scale is None else attrgetter(names.scale)(self.module),
        )

    @property
    def norm(self) -> Norm:
        """How the norms of the block compute."""
        return self.family.norm

    @property
    def activation(self) -> Any:
        """The MLP's activation φ, which can be differentiated in forward mode."""
        name = self.family.mlp.activation_name
        return self.module.get_submodule(self.family.mlp.activation) if name is None else ACT2FN[name]

    @property
    def weights(self) -> int:
        """The number of weights of all matrices of the block."""
        return sum(parameter.numel() for parameter in self.module.parameters() if parameter.ndim > 1)

    @property
    def mlp_channel_weights(self) -> int:
        """The number of weights of a hidden channel of the MLP; with experts, of a channel of each of them."""
        if (experts := self.experts) is not None:
            return 3 * self.d_model * experts.count  # gate, up and down
        return (len(self.family.mlp.inputs) + 1) * self.d_model

    @property
    def is_separate(self) -> bool:
        """Whether the block has the compressed classes, or a dense one stores its projections as they do."""
        compressed = (ModeGPTAttentionMixin, modegpt_blocks.ModeGPTMLPMixin)
        if any(isinstance(module, compressed) for module in self.module.modules()):
            return True
        return is_separate(self.module, self.family, self.parts)

    @property
    def dense_widths(self) -> Widths:
        """The widths of the uncompressed block."""
        return Widths(self.head_dim, self.head_dim, self.mlp_width, self.shared_width)

    @property
    def shared_width(self) -> int:
        """The width of the shared expert; 0 if the block has none."""
        return 0 if self.shared is None else self.shared.width

    def _norm(self, paths: str | tuple[str, ...] | None) -> Any:
        """Return the norm at the first of these paths that the block has, or None if it has none."""
        for path in (paths,) if isinstance(paths, str) else paths or ():
            if hasattr(self.module, path):
                return getattr(self.module, path)
        return None

    def _linear(self, path: str) -> nn.Linear:
        return self.module.get_submodule(path)  # pyright: ignore[reportReturnType]

    # ------------------------------------------------------------------------------------------------------- weights

    def head_rows(self, role: str) -> Tensor:
        """Return the rows of "query", "key", "value" or "gate", (heads, head_dim, in [+ 1]), in float64."""
        return _rows(self._linear(getattr(self.family.attention, role))).unflatten(0, (-1, self.head_dim))

    def head_gains(self, role: str) -> Tensor:
        """Return the gains (heads, head_dim) of the norm of "query" or "key", in float64."""
        gains = to_float64(gain(self.head_norm(role), self.norm)).view(-1, self.head_dim)
        return gains.expand(self.heads if role == "query" else self.kv_heads, self.head_dim)

    def mlp_channels(self) -> Channels:
        """Return the weights of an MLP without experts."""
        return self._channels(self.family.mlp.inputs, self.family.mlp.output)

    def shared_channels(self) -> Channels:
        """Return the weights of the shared expert."""
        assert self.family.shared is not None
        return self._channels(self.family.shared.inputs, self.family.shared.output)

    def _channels(self, inputs: tuple[str, ...], output: str) -> Channels:
        rows = tuple(_rows(self._linear(path), at_least_float32) for path in inputs)
        return Channels(rows, self.input_outputs(self._linear(output)))

    def input_outputs(self, linear: nn.Linear) -> Tensor:
        """Return a projection's weight as (in [+ 1], out), with the bias as the last row, in float64."""
        return _rows(linear).T

    # ------------------------------------------------------------------------------------------------------- forward

    def attend(self, inputs: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return the output of the attention, or of the module in its place. Both are (batch, length, d_model)."""
        arguments = self._arguments(inputs, arguments)
        if "attention" in self.family.residual.added_inside:
            arguments["residual"] = torch.zeros_like(inputs)
        if self.attends:
            return self.attention(hidden_states=inputs, **arguments)[0]
        mixer = self.mixer
        # This module takes only some of the block's arguments.
        read = {name: arguments[name] for name in inspect.signature(mixer.forward).parameters if name in arguments}
        output = mixer(hidden_states=inputs, **read)
        return output if isinstance(output, Tensor) else output[0]

    def mlp_hidden(self, inputs: Tensor) -> Tensor:
        """Return the input of the down projection. The block must be separate."""
        hidden = self.activation(self.mlp_inputs[0](inputs))
        for linear in self.mlp_inputs[1:]:
            hidden = hidden * linear(inputs)
        return hidden

    def mlp(self, inputs: Tensor) -> Tensor:
        """Return the MLP's output. Both are (batch, length, d_model)."""
        if self.family.mlp.module is None:
            return self.down(self.mlp_hidden(inputs))
        if self.experts is not None:
            return self.route(inputs)[0]
        residual = (torch.zeros_like(inputs),) if "mlp" in self.family.residual.added_inside else ()
        return self.module.get_submodule(self.family.mlp.module)(inputs, *residual)

    def route(self, inputs: Tensor) -> tuple[Tensor, Routing, Tensor]:
        """Run an MLP with experts. Return its output, the routing of its tokens, and the output of the experts."""
        experts = self.experts
        assert experts is not None
        with routed(experts.module) as calls:
            output = self.mlp_end(inputs)
        routing, combined = calls.pop()
        # Some families also return the weights of the router.
        return (output[0] if isinstance(output, tuple) else output), routing, combined

    def forward(self, stream: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return the block's output, as transformers computes it."""
        output = self.module(stream, **self._arguments(stream, arguments))
        return output[0] if self.family.returns_tuple else output

    def _arguments(self, inputs: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of the arguments of one window, with those that do not broadcast repeated for every window."""
        repeated = dict(arguments)
        name = self.family.attention.per_sequence
        if name is not None and arguments[name] is not None:
            one = arguments[name]
            repeated[name] = one.repeat(len(inputs), *[1] * (one.ndim - 1))
        return repeated

    def composed_forward(self, stream: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return the block's output, composed from its halves. If it differs from `forward`, we misread the block."""
        residual = self.residual
        output = self.attend(residual.attention_input(stream), arguments)
        middle = residual.after_attention(residual.add_attention(stream, output))
        inputs = residual.mlp_input(residual.mlp_stream(stream, middle))
        return residual.after_mlp(residual.add_mlp(middle, self._composed_mlp(inputs)))

    def _composed_mlp(self, inputs: Tensor) -> Tensor:
        """Return the MLP's output, composed from the projections as they are read."""
        if (experts := self.experts) is None:
            return self.down(self.mlp_hidden(inputs))
        output, routing, combined = self.route(inputs)
        composed = experts.combined(routing).view_as(output)
        if (shared := self.shared) is None:
            return output + (composed - combined.view_as(output))
        return composed + shared.gates(inputs) * shared.module.down_proj(shared.hidden(inputs))

    # ------------------------------------------------------------------------------------------------------- install

    def compressible_copy(self, device: torch.device) -> Block:
        """Return a copy on `device` of the compressed classes at full width, ready for `install_*`."""
        copied = self._copied(device)
        weights = dense_weights(copied.module, self.family, self.config, self.parts)
        reorder_head_norms(copied.module, self.family, self.parts)
        modegpt_blocks.adopt_block(copied.module, self.classes.causal_lm, self.config, self.parts)
        for path, (weight, bias) in weights.items():
            modegpt_blocks.install_linear(copied.module, path, weight, bias)
        return copied

    def narrow(self, widths: Widths) -> nn.Module:
        """Return an empty module of these widths with the compressed classes on the meta device, to be filled."""
        module = self._copied(torch.device("meta")).module
        modegpt_blocks.shrink_block(module, self.classes.causal_lm, self.config, widths)
        return module

    def on(self, device: torch.device) -> Block:
        """Return this block if it is on `device`, else a copy there."""
        if self.device == device:
            return self
        return self._copied(device)

    def _copied(self, device: torch.device) -> Block:
        """Return a copy whose tensors are created on `device`, so that the host never holds a second set."""
        tensors: dict[int, Any] = {id(buffer): buffer.to(device, copy=True) for buffer in self.module.buffers()}
        for parameter in self.module.parameters():
            copied = parameter.detach().to(device, copy=True)
            tensors[id(parameter)] = nn.Parameter(copied, requires_grad=parameter.requires_grad)
        return dataclasses.replace(self, module=copy.deepcopy(self.module, tensors))

    def install_query_key(
        self, query: Tensor, key: Tensor, pairs: Tensor | None, gains: Mapping[str, Tensor] | None = None
    ) -> None:
        """Replace query and key by rows (heads, rank, in [+ 1]). `pairs` (kv_heads, rank / 2) are the rotary ones.

        `gains` (heads, rank) of "query" and "key" replace those of their norms.
        """
        self._install_rows(self.family.attention.query, query.flatten(0, 1))
        self._install_rows(self.family.attention.key, key.flatten(0, 1))
        self.attention.set_widths(query.shape[1], self.attention.v_head_dim)
        if pairs is not None:
            modegpt_blocks.install_rope_index(self.attention, pairs.to(self.device))
        if gains is not None:
            weights = {role: weight_of(each, self.norm) for role, each in gains.items()}
            modegpt_blocks.install_head_gains(self.attention, weights)

    def install_value_output(self, value: Tensor, output: Tensor, gate: Tensor | None) -> None:
        """Replace value by rows (kv_heads, rank, in [+ 1]) and output by (heads · rank [+ 1], d_model).

        Also replace the gate by rows (heads, rank, in [+ 1]), unless they are None.
        """
        self._install_rows(self.family.attention.value, value.flatten(0, 1))
        self._install_rows(self.family.attention.output, output.T)
        if gate is not None:
            assert self.family.attention.gate is not None
            self._install_rows(self.family.attention.gate, gate.flatten(0, 1))
        self.attention.set_widths(self.attention.qk_head_dim, value.shape[1])

    def install_mlp(self, channels: Channels) -> None:
        """Replace an MLP without experts."""
        self._install_channels(channels, self.family.mlp.inputs, self.family.mlp.output)

    def install_shared(self, channels: Channels) -> None:
        """Replace the shared expert."""
        assert self.family.shared is not None
        self._install_channels(channels, self.family.shared.inputs, self.family.shared.output)

    def _install_channels(self, channels: Channels, inputs: tuple[str, ...], output: str) -> None:
        for path, row in zip(inputs, channels.rows, strict=True):
            self._install_rows(path, row)
        self._install_rows(output, channels.down.T)

    def _install_rows(self, path: str, rows: Tensor) -> None:
        if self._linear(path).bias is None:
            modegpt_blocks.install_linear(self.module, path, rows, None)
        else:
            modegpt_blocks.install_linear(self.module, path, rows[:, :-1], rows[:, -1])


def _rows(linear: nn.Linear, to: Callable[[Tensor], Tensor] = to_float64) -> Tensor:
    weight = to(linear.weight.detach())
    return weight if linear.bias is None else torch.cat((weight, to(linear.bias.detach())[:, None]), dim=1)
