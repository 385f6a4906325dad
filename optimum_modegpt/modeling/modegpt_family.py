"""The description of a model family: where its projections, norms and head are, and how a block computes.

The defaults are Llama's, so a family states only how it differs. Everything that depends on a family reads this.
This file is also remote code: it is copied next to the weights. It imports neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Part = Literal["mlp", "qk", "vo"]

PREFIX = "modegpt_"
"""A compressed model's `model_type` is this and that of the dense model."""


def is_compressed(model_type: object) -> bool:
    """Return whether a configuration's `model_type` is that of a compressed model."""
    return str(model_type).startswith(PREFIX)


@dataclass(frozen=True)
class Attention:
    """The attention of a block. All paths are from the block.

    Attributes:
        module: path of the attention.
        query, key, value, output: paths of its projections.
        rotary: whether query and key are rotated by position, pair by pair (i, i + head_dim / 2).
    """

    module: str = "self_attn"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    rotary: bool = True


@dataclass(frozen=True)
class MLP:
    """The MLP of a block. All paths are from the block.

    Attributes:
        inputs: paths of the projections whose rows are hidden channels: (gate, up), or the one of a plain MLP.
        output: path of the projection whose columns are hidden channels.
        activation: path of the activation module.
        width: name of the number of hidden channels in the configuration.
    """

    inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    output: str = "mlp.down_proj"
    activation: str = "mlp.act_fn"
    width: str = "intermediate_size"


@dataclass(frozen=True)
class Residual:
    """The norms around attention and MLP, by their paths from the block.

    Attributes:
        attention_norm, mlp_norm: the norm before each of the two, or after it in a post-norm block.
        norm_first_flag: name of the configuration's boolean that says norms come first; None if they always do.
    """

    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    norm_first_flag: str | None = None


@dataclass(frozen=True)
class Head:
    """The modules between the last block and the logits, by their paths from the base model.

    Attributes:
        norm: the final norm; a model may have none there.
        projection: a projection between the final norm and the head; a model may have none there.
    """

    norm: str = "norm"
    projection: str | None = None


@dataclass(frozen=True)
class Projection:
    """A linear layer that compression narrows.

    Attributes:
        path: from the block.
        part: "mlp", "qk" or "vo", whose width it follows.
        axis: axis of its weight (out, in) that is narrowed.
        unit: the narrowed axis holds this part's width for each of "heads", "kv_heads", or once: "block".
    """

    path: str
    part: Part
    axis: Literal[0, 1]
    unit: Literal["heads", "kv_heads", "block"]


@dataclass(frozen=True)
class Family:
    """A family of decoder models of transformers.

    Attributes:
        model_type: of the dense models.
        blocks: path of the list of blocks, from the base model.
        attention, mlp, residual, head: the parts of a model.
    """

    model_type: str
    blocks: str = "layers"
    attention: Attention = Attention()
    mlp: MLP = MLP()
    residual: Residual = Residual()
    head: Head = Head()

    @property
    def compressed_type(self) -> str:
        """The `model_type` of the compressed models."""
        return PREFIX + self.model_type

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All projections of a block that compression narrows."""
        attention, mlp = self.attention, self.mlp
        return (
            Projection(attention.query, "qk", 0, "heads"),
            Projection(attention.key, "qk", 0, "kv_heads"),
            Projection(attention.value, "vo", 0, "kv_heads"),
            Projection(attention.output, "vo", 1, "heads"),
            *(Projection(path, "mlp", 0, "block") for path in mlp.inputs),
            Projection(mlp.output, "mlp", 1, "block"),
        )


@dataclass(frozen=True)
class Widths:
    """Inner widths of one block: query/key and value head dims, MLP width."""

    qk: int
    vo: int
    mlp: int
