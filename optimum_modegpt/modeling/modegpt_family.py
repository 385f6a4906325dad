"""The description of a model family: its modules, how they store weights, and how a block computes.

The defaults are Llama's, so a family states only how it differs. Everything that depends on a family reads this.
This file is also remote code: it is copied next to the weights. It imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

Part = Literal["mlp", "qk", "vo", "shared"]
Topology = Literal["sequential", "parallel", "post-LN"]

PARTS: tuple[Part, ...] = ("mlp", "qk", "vo", "shared")
"""The pairs of matrices of a decoder block: the three of the paper (types I, II, III), and those of a shared expert."""

HEAD_PARTS: tuple[Part, ...] = ("qk", "vo")
"""The parts whose width is that of a head."""


PREFIX = "modegpt_"
"""A compressed model's `model_type` is this and that of the dense model."""


def is_compressed(model_type: object) -> bool:
    """Return whether a configuration's `model_type` is that of a compressed model."""
    return str(model_type).startswith(PREFIX)


def parts_among(blocks: Iterable[Collection[str]]) -> tuple[Part, ...]:
    """Return the parts that some of these blocks have, in the order of `PARTS`, from the parts of every block."""
    found = set[str]().union(*blocks)
    return tuple(part for part in PARTS if part in found)


@dataclass(frozen=True)
class Storage:
    """How a dense model stores the projections that read a half's input. A compressed model stores each separately.

    Attributes:
        layout: "separate", one module each; "gated", the query rows of one head and then the rows of its gate, with
            the others separate; "stacked", one module with the rows of one projection after those of the
            other; "per head", the query, key and value rows of one head after those of the other; "per group", the
            query rows of all heads of a key-value head, its key rows and its value rows.
        path: the module that holds all of them, from the block; None if they are separate.
        transposed: whether weights are (in, out), as in `Conv1D`; those of the output projection are too.
        slices: number of equal slices of a "stacked" module, each of which holds a share of every projection.
        order: the order of query, key and value in a stacked module.
    """

    layout: Literal["separate", "gated", "stacked", "per head", "per group"] = "separate"
    path: str | None = None
    transposed: bool = False
    slices: int = 1
    order: tuple[Literal["query", "key", "value"], ...] = ("query", "key", "value")

    @property
    def plain(self) -> bool:
        """Whether every projection is an `nn.Linear` of its own."""
        return self.layout == "separate" and not self.transposed


@dataclass(frozen=True)
class Positions:
    """How query and key are rotated by position.

    Attributes:
        pairs: the coordinates that rotate together. "half": (i, i + n / 2); "interleaved": (2i, 2i + 1), where n is the
            number of coordinates that rotate; "none": no coordinate rotates.
        partial: whether only the share `partial_rotary_factor` of a head rotates, its first coordinates.
        width: attribute of the attention with the number of coordinates that rotate, the first ones of a head; None if
            the configuration's rotary parameters say it.
        table: the columns of the model's cos and sin tables. "concatenated": one for each pair, twice; "repeated": two
            for each pair, next to each other; "single": one for each pair.
        sine_first: whether the model passes (sin, cos) instead of (cos, sin).
        layer_flag: attribute of the attention that is false in layers without rotation, dotted or not; None if all
            layers rotate.
        flag_needs: attribute of the attention that is None in models whose layers all rotate, also if `layer_flag` is
            false; None if `layer_flag` always counts.
        query_factor: whether queries are multiplied by 1 + β log(1 + ⌊position / L⌋) after the rotation. β and L are
            `llama_4_scaling_beta` and `original_max_position_embeddings` in the configuration's `rope_parameters`.
    """

    pairs: Literal["half", "interleaved", "none"] = "half"
    partial: bool = False
    width: str | None = None
    table: Literal["concatenated", "repeated", "single"] = "concatenated"
    sine_first: bool = False
    layer_flag: str | None = None
    flag_needs: str | None = None
    query_factor: bool = False


@dataclass(frozen=True)
class HeadNorms:
    """Norms of queries and keys. They compute as the norms of the residual stream do.

    In a narrow block, the weight of a norm over a head is (heads, qk_head_dim), because each keeps other coordinates.

    Attributes:
        query, key: paths of the norms, from the block.
        over: the coordinates that a norm averages over: those of a "head", by one module for all heads; those of "each
            head", by a module that splits (batch, heads, length, head_dim); those of the whole "projection".
        rotated: whether the norms come after the rotation.
        flag: name of the configuration's boolean that adds the norms; None if every model has them.
    """

    query: str = "self_attn.q_norm"
    key: str = "self_attn.k_norm"
    over: Literal["head", "each head", "projection"] = "head"
    rotated: bool = False
    flag: str | None = None


@dataclass(frozen=True)
class Attention:
    """The attention of a block. All paths are from the block.

    Attributes:
        module: path of the attention.
        layers: the types of layers, in the configuration's `layer_types`, that have this attention; None if all have.
        mixers: paths of the modules that mix tokens in other layers. They stay dense, and such a block has no "qk" and
            "vo".
        query, key, value, output: paths of the projections, in the compressed model if the dense one stacks them.
        storage: how the dense model stores them.
        positions: how query and key are rotated.
        head_norms: norms of queries and keys, if any.
        gate: path of the projection whose sigmoid multiplies the outputs of the heads, in the compressed model; None
            if there is none.
        values: "free" if a basis of the values may change; "coordinates" if something acts on single coordinates
            between value and output projection. Then a narrow head keeps some of them.
        head_dim: attribute of the attention that holds the width of a head.
        kv_heads: attribute of the attention that holds the number of key-value heads; None if it is
            `num_key_value_heads` of the configuration, or that of the heads.
        score_arguments: (argument of the attention function, attribute of the attention) of all that determines the
            scores in addition to `scaling`: a window, a soft cap, sinks. The attribute may be dotted.
        dropout: attribute of the attention with the dropout of the probabilities, dotted or not.
        output_dropout: path of the dropout after the output projection, a module or its rate, if it is part of the
            attention.
        clip: name of the configuration's limit that the outputs of the query, key and value projections are clamped
            to, dotted or not; None if there is none. A model that sets it keeps its attention at full width.
        passed_on: parameters of the dense attention's `forward` that it passes to the attention function.
        per_sequence: name of an argument of the block whose first axis counts sequences, and which does not broadcast
            over them; None if there is none.
    """

    module: str = "self_attn"
    layers: tuple[str, ...] | None = None
    mixers: tuple[str, ...] = ()
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    storage: Storage = Storage()
    positions: Positions = Positions()
    head_norms: HeadNorms | None = None
    gate: str | None = None
    values: Literal["free", "coordinates"] = "free"
    head_dim: str = "head_dim"
    kv_heads: str | None = None
    score_arguments: tuple[tuple[str, str], ...] = ()
    dropout: str = "attention_dropout"
    output_dropout: str | None = None
    clip: str | None = None
    passed_on: tuple[str, ...] = ()
    per_sequence: str | None = None

    def norms_of(self, config: Any) -> HeadNorms | None:
        """Return the norms of queries and keys in a model, or None if it has none."""
        norms = self.head_norms
        if norms is None or norms.flag is None or getattr(config, norms.flag):
            return norms
        return None


@dataclass(frozen=True)
class SharedExpert:
    """A gated MLP that all tokens pass, in addition to their experts. All paths are from the block.

    Attributes:
        module: path of the MLP, whose projections are `gate_proj`, `up_proj` and `down_proj`.
        gate: path of the projection (d_model -> 1) whose sigmoid multiplies its output; None if there is none.
        width: name of the number of hidden channels in the configuration; of one expert if `count` is set.
        count: name of the number of experts that are stored as one, in the configuration; None for 1.
    """

    module: str = "mlp.shared_expert"
    gate: str | None = "mlp.shared_expert_gate"
    width: str = "shared_expert_intermediate_size"
    count: str | None = None

    def width_in(self, config: Any) -> int:
        """Return the number of hidden channels in a dense model; 0 if it has no shared expert."""
        count = 1 if self.count is None else getattr(config, self.count) or 0
        return count * getattr(config, self.width)

    @property
    def inputs(self) -> tuple[str, str]:
        """The paths of the projections whose rows are hidden channels."""
        return f"{self.module}.gate_proj", f"{self.module}.up_proj"

    @property
    def output(self) -> str:
        """The path of the projection whose columns are hidden channels."""
        return f"{self.module}.down_proj"


@dataclass(frozen=True)
class Experts:
    """The experts of a block. A router chooses a few of them for every token. All paths are from the block.

    One parameter holds a projection of all experts. Its layout is an attribute of the module that holds it, set by
    `use_experts_implementation` of transformers. The other fields are names in the configuration.

    Attributes:
        module: path of the whole MLP: the router, the experts, and a shared expert if there is one.
        packed: path of the module that holds the weights of all experts.
        router: path of the router, whose parameters and buffers have one row for each expert.
        width: the number of hidden channels of an expert.
        count: the number of experts.
        chosen: the number of experts that the router chooses for a token.
        groups: the number of groups that the router chooses from first; None if it has no groups.
        chosen_groups: the number of groups that the router chooses for a token; None if it has no groups.
        dense_layers: the list of the layers without experts; None if there is none.
        period: only every layer of this period has experts; None for every layer.
        first, last: the range of the layers with experts; None for no limit.
        shared: the shared expert of the same blocks; None if the family has none.
    """

    module: str = "mlp"
    packed: str = "mlp.experts"
    router: str = "mlp.gate"
    width: str = "moe_intermediate_size"
    count: str = "num_experts"
    chosen: str = "num_experts_per_tok"
    groups: str | None = None
    chosen_groups: str | None = None
    dense_layers: str | None = None
    period: str | None = None
    first: str | None = None
    last: str | None = None
    shared: SharedExpert | None = None

    def count_groups(self, config: Any) -> int:
        """Return the number of groups of experts in a model; 1 if its router has no groups."""
        return 1 if self.groups is None else getattr(config, self.groups) or 1

    def in_layer(self, config: Any, index: int) -> bool:
        """Return whether a layer of a model has experts."""
        if self.dense_layers is not None and index in getattr(config, self.dense_layers):
            return False
        if self.period is not None and (index + 1) % getattr(config, self.period):
            return False
        first = 0 if self.first is None else getattr(config, self.first)
        last = index if self.last is None else getattr(config, self.last)
        return first <= index <= last


@dataclass(frozen=True)
class MLP:
    """The MLP of a block. All paths are from the block.

    Attributes:
        module: path of the MLP; None if its projections belong to the block itself.
        inputs: paths of the projections whose rows are hidden channels: (gate, up), or the one of a plain MLP. As for
            the attention, they are those of the compressed model.
        output: path of the projection whose columns are hidden channels.
        storage: how the dense model stores the inputs.
        activation: path of the activation module.
        activation_name: name of the same activation in transformers' `ACT2FN` if the module has no forward-mode
            derivative, as a custom `autograd.Function`; None if it has one.
        width: name of the number of hidden channels in the configuration.
        width_factor: the number of hidden channels as a multiple of `hidden_size` if the configuration has none.
        experts: the experts that replace this MLP in some or all blocks; None if no block has experts.
    """

    module: str | None = "mlp"
    inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    output: str = "mlp.down_proj"
    storage: Storage = Storage()
    activation: str = "mlp.act_fn"
    activation_name: str | None = None
    width: str = "intermediate_size"
    width_factor: int | None = None
    experts: Experts | None = None


@dataclass(frozen=True)
class Norm:
    """How the norms of the residual stream compute.

    Attributes:
        offset: the gain is this plus the weight: 0, or 1 as in Gemma.
        centred: whether a norm subtracts the mean.
    """

    offset: float = 0.0
    centred: bool = False


@dataclass(frozen=True)
class Residual:
    """The order of norms, halves and sums in a block. All paths are from the block.

    "sequential": y = x + m·attention(norm(x)), z = y + m·mlp(norm(y)).
    "parallel": z = x + m·attention(norm(x)) + m·mlp(norm(x)), with two norms or one for both.
    "post-LN": y = norm(x + m·attention(x)), z = norm(y + m·mlp(y)).
    With norms of the outputs, m·norm(attention(…)) replaces m·attention(…), and likewise for the MLP.

    Attributes:
        attention_norm, mlp_norm: the norm before each half, or after its sum in a post-LN block; None if there is none.
            Of several paths, the first that a block has. A parallel block without `mlp_norm` has one for both.
        topology: one of the three above.
        flag: name of the configuration's boolean that chooses the topology; None if there is one.
        topology_without_flag: the topology if that boolean is false.
        multiplier: name of m in the configuration; None for 1.
        scale: path of a tensor that multiplies the block's output; None for 1.
        attention_output_norm, mlp_output_norm: the norm of a half's output before the sum; None if there is none.
        added_inside: the halves whose modules take the stream as their argument `residual`, and return the sum.
    """

    attention_norm: str | tuple[str, ...] | None = "input_layernorm"
    mlp_norm: str | tuple[str, ...] | None = "post_attention_layernorm"
    topology: Topology = "sequential"
    flag: str | None = None
    topology_without_flag: Topology = "sequential"
    multiplier: str | None = None
    scale: str | None = None
    attention_output_norm: str | None = None
    mlp_output_norm: str | None = None
    added_inside: tuple[Literal["attention", "mlp"], ...] = ()


@dataclass(frozen=True)
class Head:
    """The modules between the last block and the logits: cap · tanh(scale / divisor · output(projection(norm)) / cap).

    Attributes:
        norm: path of the final norm from the base model; a model may have none there.
        projection: path of a projection after the final norm, from the base model; a model may have none there.
        output: name of the language model's head, from the model.
        scale, divisor, cap: names in the configuration; None if there is none.
    """

    norm: str = "norm"
    projection: str | None = None
    output: str = "lm_head"
    scale: str | None = None
    divisor: str | None = None
    cap: str | None = None


@dataclass(frozen=True)
class StockClass:
    """A class of transformers that holds the models of another family with narrow heads.

    Engines read the width of a head for this class, and derive it from other sizes for the family's own.

    Attributes:
        model_type: of the class.
        values: (name, value) in its configuration that make it compute as the family does.
    """

    model_type: str
    values: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Projection:
    """A linear layer that compression narrows.

    Attributes:
        path: from the block of a compressed model.
        part: the part whose width it follows.
        axis: axis of its weight (out, in) that is narrowed.
        unit: the narrowed axis holds this part's width for each of "heads", "kv_heads", or once: "block".
        storage: how the dense model stores it.
    """

    path: str
    part: Part
    axis: Literal[0, 1]
    unit: Literal["heads", "kv_heads", "block"]
    storage: Storage

    @property
    def dense_path(self) -> str:
        """The path of the module that holds its weights in the dense model, from the block."""
        return self.storage.path if self.axis == 0 and self.storage.path else self.path


@dataclass(frozen=True)
class Family:
    """A family of decoder models of transformers.

    Attributes:
        model_type: of the dense models.
        blocks: path of the list of blocks, from the base model.
        attention, mlp, norm, residual, head: the parts of a model.
        sizes: names of sizes in the configuration that only this family has.
        layer_sizes: names of sizes that the dense configuration has for each layer, equal in the layers of one type.
        refused: names of values in the configuration that change the computation of a block, and must be false, zero or
            None.
        since: the oldest release of transformers whose classes of the family the compressed ones can extend; None if
            every supported release will do.
        returns_tuple: whether a block returns a tuple, whose first element is the stream.
        linear_class: name of the dense model's own subclass of `nn.Linear`, which computes the same.
        stock: another class of transformers for models with narrow heads; None if the dense one holds them.
    """

    model_type: str
    blocks: str = "layers"
    attention: Attention = Attention()
    mlp: MLP = MLP()
    norm: Norm = Norm()
    residual: Residual = Residual()
    head: Head = Head()
    sizes: tuple[str, ...] = ()
    layer_sizes: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    since: str | None = None
    returns_tuple: bool = False
    linear_class: str | None = None
    stock: StockClass | None = None

    @property
    def compressed_type(self) -> str:
        """The `model_type` of the compressed models."""
        return PREFIX + self.model_type

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All projections that compression narrows, in blocks without experts and in shared experts."""
        attention, mlp, own = self.attention, self.mlp, self.attention.storage
        others = Storage() if own.layout == "gated" else own
        gates = () if attention.gate is None else (Projection(attention.gate, "vo", 0, "heads", own),)
        return (
            Projection(attention.query, "qk", 0, "heads", own),
            Projection(attention.key, "qk", 0, "kv_heads", others),
            Projection(attention.value, "vo", 0, "kv_heads", others),
            Projection(attention.output, "vo", 1, "heads", others),
            *gates,
            *(Projection(path, "mlp", 0, "block", mlp.storage) for path in mlp.inputs),
            Projection(mlp.output, "mlp", 1, "block", mlp.storage),
            *self._shared_projections,
        )

    @property
    def shared(self) -> SharedExpert | None:
        """The shared expert of blocks with experts; None if the family has none."""
        return None if self.mlp.experts is None else self.mlp.experts.shared

    @property
    def _shared_projections(self) -> tuple[Projection, ...]:
        if (shared := self.shared) is None:
            return ()
        inputs = (Projection(path, "shared", 0, "block", Storage()) for path in shared.inputs)
        return (*inputs, Projection(shared.output, "shared", 1, "block", Storage()))

    def projections_of(self, parts: Collection[Part], *, experts: bool) -> tuple[Projection, ...]:
        """Return the projections of a block that has these parts, with or without experts.

        Experts have none, because one parameter holds the weights of all of them. Only blocks with experts have a
        shared one.
        """
        linear = [part for part in parts if part != ("mlp" if experts else "shared")]
        return tuple(projection for projection in self.projections if projection.part in linear)

    def projections_in(self, config: Any, index: int) -> tuple[Projection, ...]:
        """Return the projections of block `index` of a model."""
        return self.projections_of(self.parts(config, index), experts=self.has_experts(config, index))

    def absent(self, config: Any, index: int) -> dict[Part, str]:
        """Return the parts that block `index` of a model does not have, each with the reason."""
        layers = self.attention.layers
        if layers is None or config.layer_types[index] in layers:
            return {}
        return dict.fromkeys(("qk", "vo"), f"layers of type {config.layer_types[index]} are cut in the MLP only")

    def parts(self, config: Any, index: int) -> tuple[Part, ...]:
        """Return the parts of block `index` of a model."""
        absent = set[str](self.absent(config, index))
        if not self.shared_width(config, index):
            absent.add("shared")
        return tuple(part for part in PARTS if part not in absent)

    def shared_width(self, config: Any, index: int) -> int:
        """Return the width of the shared expert in block `index` of a dense model; 0 if it has none."""
        if self.shared is None or not self.has_experts(config, index):
            return 0
        return self.shared.width_in(config)

    def has_experts(self, config: Any, index: int) -> bool:
        """Return whether block `index` of a model has experts."""
        return self.mlp.experts is not None and self.mlp.experts.in_layer(config, index)

    @property
    def width_names(self) -> tuple[str, ...]:
        """The names of the MLP widths in the configuration: of blocks with experts, if any, and of those without."""
        experts = self.mlp.experts
        return (self.mlp.width,) if experts is None else tuple(dict.fromkeys((self.mlp.width, experts.width)))

    @property
    def size_names(self) -> tuple[str, ...]:
        """The names of the sizes in the configuration that not all families have."""
        counts = () if self.mlp.experts is None else (self.mlp.experts.count,)
        return (*self.width_names, *counts, *self.sizes)

    def width_name(self, config: Any, index: int) -> str:
        """Return the name of the MLP width of block `index` in the configuration."""
        experts = self.mlp.experts
        return experts.width if experts is not None and experts.in_layer(config, index) else self.mlp.width

    def uncut(self, config: Any) -> dict[Part, str]:
        """Return the parts that compression leaves at their dense width in a model, each with the reason."""
        parts: dict[Part, str] = {}
        if self.attention.norms_of(config) is not None and self.norm.centred:
            parts["qk"] = "queries and keys are centred and normalised"
        if self.attention.clip is not None and attrgetter(self.attention.clip)(config) is not None:
            parts |= dict.fromkeys(("qk", "vo"), f"{self.attention.clip} clamps queries, keys and values")
        return parts

    def dense_parts(self, config: Any, index: int) -> dict[Part, str]:
        """Return the parts of block `index` that stay dense, each with the reason."""
        return self.uncut(config) | self.absent(config, index)


@dataclass(frozen=True)
class Widths:
    """Inner widths of one block: query/key and value head dims, MLP width, and that of a shared expert.

    A part that a block lacks has width 0.
    """

    qk: int = 0
    vo: int = 0
    mlp: int = 0
    shared: int = 0
