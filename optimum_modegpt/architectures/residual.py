"""The order of norms, halves and sums in a block: the inputs of attention and MLP, and how their outputs are added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optimum_modegpt.decompositions.psd import at_least_float32
from optimum_modegpt.modeling.modegpt_family import Residual, Topology


@dataclass(frozen=True)
class ResidualProgram:
    """The residual program of one block, with its norms or None. See `Residual` for the equations."""

    topology: Topology
    multiplier: float
    attention_norm: Any
    mlp_norm: Any
    attention_output_norm: Any
    mlp_output_norm: Any
    scale: Tensor | None

    @property
    def parallel(self) -> bool:
        """Whether the MLP reads the block's input instead of the stream after the attention."""
        return self.topology == "parallel"

    @property
    def post_norm(self) -> bool:
        """Whether the norms read the sums of stream and output."""
        return self.topology == "post-LN"

    @property
    def norms_of_input(self) -> list[Any]:
        """The norms that read the block's input."""
        if self.post_norm:
            return []
        if self.parallel and self.mlp_norm is not self.attention_norm:
            return _present(self.attention_norm, self.mlp_norm)
        return _present(self.attention_norm)

    @property
    def norms_of_middle(self) -> list[Any]:
        """The norms that read the sum of stream and attention output."""
        if self.parallel:
            return []
        return _present(self.attention_norm if self.post_norm else self.mlp_norm)

    @property
    def norms_of_output(self) -> list[Any]:
        """The norms that read the sum of stream and MLP output."""
        return [self.mlp_norm] if self.post_norm else []

    def attention_input(self, entering: Tensor) -> Tensor:
        """Return the attention's input from the block's input."""
        return entering if self.post_norm else _normalised(entering, self.attention_norm)

    def add_attention(self, stream: Tensor, output: Tensor) -> Tensor:
        """Add the attention's output to the stream, after its norm if there is one."""
        return self._add(stream, _normalised(output, self.attention_output_norm))

    def add_mlp(self, stream: Tensor, output: Tensor) -> Tensor:
        """Add the MLP's output to the stream, after its norm if there is one."""
        return self._add(stream, _normalised(output, self.mlp_output_norm))

    def _add(self, stream: Tensor, output: Tensor) -> Tensor:
        return stream + output if self.multiplier == 1 else stream + output * self.multiplier

    def missing(self, total: Tensor, stream: Tensor) -> Tensor:
        """Return the output of a half, after its norm, that makes `stream` equal to `total`, in at least float32."""
        difference = at_least_float32(total) - at_least_float32(stream)
        return difference if self.multiplier == 1 else difference / self.multiplier

    def after_attention(self, total: Tensor) -> Tensor:
        """Return the stream after the attention from the sum of stream and attention output."""
        return self.attention_norm(total) if self.post_norm else total

    def mlp_stream(self, entering: Any, middle: Any) -> Any:
        """Return the stream that the MLP reads, as the same type: the block's input, or that after the attention."""
        return entering if self.parallel else middle

    def mlp_input(self, stream: Tensor) -> Tensor:
        """Return the MLP's input from the stream that it reads."""
        return stream if self.post_norm else _normalised(stream, self.mlp_norm)

    @property
    def ends_with_sum(self) -> bool:
        """Whether the block's output is the sum of stream and MLP output."""
        return not self.post_norm and self.scale is None

    def after_mlp(self, total: Tensor) -> Tensor:
        """Return the block's output from the sum of stream and MLP output."""
        output = self.mlp_norm(total) if self.post_norm else total
        return output if self.scale is None else output * self.scale


def _present(*norms: Any) -> list[Any]:
    return [norm for norm in norms if norm is not None]


def _normalised(values: Tensor, norm: Any) -> Tensor:
    return values if norm is None else norm(values)


def topology_of(residual: Residual, config: Any) -> Topology:
    """Return the topology of a model's blocks."""
    if residual.flag is None or getattr(config, residual.flag):
        return residual.topology
    return residual.topology_without_flag


def multiplier_of(residual: Residual, config: Any) -> float:
    """Return the factor of a half's output in a model's blocks."""
    return 1.0 if residual.multiplier is None else getattr(config, residual.multiplier)
