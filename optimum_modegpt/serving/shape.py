"""The facts about a model that decide which engines run it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optimum_modegpt.architectures import check_dense, family_of, read_blocks
from optimum_modegpt.budget.estimate import on_meta
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.evaluation.inspection import block_ranks
from optimum_modegpt.export.gguf_architecture import GGUFSupport, check_gguf
from optimum_modegpt.layouts.limits import wide_parts
from optimum_modegpt.loading.models import auto_class_of
from optimum_modegpt.modeling.modegpt_config import head_dim
from optimum_modegpt.modeling.modegpt_family import HEAD_PARTS, PREFIX, Family, is_compressed
from optimum_modegpt.modeling.modegpt_scores import ModeGPTScoresMixin
from optimum_modegpt.serving.engines import Layout


@dataclass(frozen=True)
class Shape:
    """The facts about a model that engines depend on, or about the result of a compression that has not run.

    Attributes:
        model_type: of the language model; that of the dense one if the class is ours.
        layout: how the widths vary.
        forecast: whether the compression has not run, so the widths are not known.
        known: whether the family is one that this package describes. If not, the fields below are not set.
        widths: the distinct widths by part, ascending; empty in a forecast and in a stock checkpoint.
        cached: the distinct widths of a row of the cache of a model with narrow heads: those of its wider heads.
        head_dim: the head dim of the dense model, or of a stock checkpoint; 0 if it is not known yet.
        odd_head_dim: whether the head dim of a stock checkpoint is not hidden_size / num_attention_heads.
        rotary: which coordinates of a head rotate: "half", "interleaved", "partial" or "none".
        frequencies: whether the rotary frequencies of a stock checkpoint are those that the compression kept.
        own_scores: whether the attention computes its scores without the attention interface of transformers.
        experts: whether some blocks have experts.
        other_mixers: whether some blocks have a mixer other than softmax attention.
        soft_cap, sinks: whether the attention scores have them.
        window: whether some blocks have a sliding window shorter than the longest text.
        one_window: whether there is one window for all blocks and no list of layer types.
        attention_bias: whether the configuration sets it.
        tied: whether the head shares the weights of the embeddings.
        images: whether the model has a vision tower.
        gguf: the answer of the export to GGUF; None in a forecast, and for models that llama.cpp converts itself.
    """

    model_type: str
    layout: Layout
    forecast: bool = False
    known: bool = False
    widths: tuple[tuple[str, tuple[int, ...]], ...] = ()
    cached: tuple[int, ...] = ()
    head_dim: int = 0
    odd_head_dim: bool = False
    rotary: str = "none"
    frequencies: bool = False
    own_scores: bool = False
    experts: bool = False
    other_mixers: bool = False
    soft_cap: bool = False
    sinks: bool = False
    window: bool = False
    one_window: bool = False
    attention_bias: bool = False
    tied: bool = False
    images: bool = False
    gguf: GGUFSupport | None = None

    @property
    def cached_widths(self) -> tuple[int, ...]:
        """The distinct widths of a row of the key-value cache; empty if they are not known yet."""
        if self.layout == "per_layer":
            return self.cached
        return (self.head_dim,) if self.head_dim else ()

    @property
    def narrow_keys(self) -> bool:
        """Whether some queries and keys are narrower than the dense head dim, or may be in a forecast."""
        if self.layout != "per_layer":
            return False
        return self.forecast or any(part == "qk" and found[0] < self.head_dim for part, found in self.widths)

    def to_text(self) -> str:
        """Return the type, the layout and the widths in one line."""
        if self.layout == "stock":
            text = f"{self.model_type}, a checkpoint of the stock class"
        else:
            text = f"{PREFIX}{self.model_type}, layout {self.layout}"
        if self.forecast:
            return f"{text} (forecast)"
        for part, found in self.widths:
            text += f", {part} {found[0]}" if len(found) == 1 else f", {part} {found[0]} to {found[-1]}"
        return text


def layout_of(config: Any, compression: ModeGPTConfig | None = None) -> Layout:
    """Return the layout of a model by its configuration, or that of the result of a compression.

    If a compression removes only whole experts, or no head can be cut, the layout is the simpler one that results.
    """
    if compression is None:
        if not is_compressed(config.model_type):
            return "stock"
        blocks = block_ranks(config)
        narrow = any(block.ranks[part] < block.dense_ranks[part] for block in blocks for part in heads_of(block.ranks))
        return "per_layer" if narrow else "mlp"
    if compression.sparsity == 0 and compression.expert_sparsity:
        return "stock"
    return "mlp" if compression.layout == "per_layer" and not _cuts_heads(config, "per_layer") else compression.layout


def heads_of(parts: Collection[str]) -> list[str]:
    """Return those of the parts that are the widths of attention heads."""
    return [part for part in HEAD_PARTS if part in parts]


def shape_of(config: Any, compression: ModeGPTConfig | None = None) -> Shape:
    """Return the shape of a model by its configuration, or that of the result of a compression of it.

    Raises:
        AlreadyCompressed, UnsupportedModel: a compression is given, and the model cannot be compressed.
        EvaluationError: the configuration was edited, and its widths cannot be read.
    """
    if compression is not None:
        check_dense(config)
    text = config.get_text_config()
    dense_type, layout = text.model_type.removeprefix(PREFIX), layout_of(config, compression)
    shape = Shape(dense_type, layout, forecast=compression is not None, images=text is not config)
    classes = family_of(config.model_type.removeprefix(PREFIX)) or family_of(dense_type)
    if classes is None:
        return shape
    attention_class = classes.attention_class
    shape = replace(
        _with_structure(shape, text, classes.family),
        known=True,
        own_scores=attention_class is not None and issubclass(attention_class, ModeGPTScoresMixin),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
    )
    if is_compressed(config.model_type):
        blocks = [block.ranks for block in block_ranks(config)]
        rows = {max(block[part] for part in heads_of(block)) for block in blocks if heads_of(block)}
        return replace(
            shape,
            head_dim=config.dense_head_dim,
            widths=_distinct_widths(blocks),
            cached=tuple(sorted(rows)),
            gguf=check_gguf(config),
        )
    dim = head_dim(text.per_layer_config[0])
    if layout != "stock":
        return replace(shape, head_dim=dim)
    shape = replace(shape, head_dim=dim, odd_head_dim=dim * text.num_attention_heads != text.hidden_size)
    if compression is None or compression.sparsity == 0 or not _cuts_heads(config, "stock"):
        kept = _kept_frequencies(text)
        return replace(shape, frequencies=kept, gguf=check_gguf(config) if kept and compression is None else None)
    stock = classes.family.stock
    model_type = dense_type if stock is None else stock.model_type
    return replace(shape, model_type=model_type, odd_head_dim=True, frequencies=shape.rotary != "none", head_dim=0)


def _with_structure(shape: Shape, text: Any, family: Family) -> Shape:
    """Return the shape with the facts that a compression does not change."""
    positions, blocks = family.attention.positions, range(text.num_hidden_layers)
    layer_types, window = getattr(text, "layer_types", None), getattr(text, "sliding_window", None)
    if window is not None and window >= getattr(text, "max_position_embeddings", window + 1):
        window = None  # it contains every text
    return replace(
        shape,
        rotary="partial" if positions.partial else positions.pairs,
        experts=any(family.has_experts(text, index) for index in blocks),
        other_mixers=any(family.absent(text, index) for index in blocks),
        soft_cap=getattr(text, "attn_logit_softcapping", None) is not None,
        sinks=any(argument == "s_aux" for argument, _ in family.attention.score_arguments),
        window=window is not None and (layer_types is None or "sliding_attention" in layer_types),
        one_window=window is not None and layer_types is None,
        attention_bias=bool(getattr(text, "attention_bias", False)),
    )


def _cuts_heads(config: Any, layout: Layout) -> bool:
    """Return whether a compression of a dense model to a layout makes some of its heads narrower."""
    architecture = read_blocks(on_meta(auto_class_of(config), config), check_dense(config))
    return any(part not in wide for wide in wide_parts(architecture, layout) for part in HEAD_PARTS)


def _distinct_widths(blocks: Sequence[Mapping[str, int]]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return the distinct widths of blocks by part, ascending."""
    found: dict[str, set[int]] = {}
    for block in blocks:
        for part, rank in block.items():
            found.setdefault(part, set()).add(rank)
    return tuple((part, tuple(sorted(ranks))) for part, ranks in found.items())


def _kept_frequencies(text: Any) -> bool:
    """Return whether a stock configuration lists rotary frequencies that do not depend on the length of the text."""
    rope = getattr(text, "rope_parameters", None) or {}
    tables = [rope] if "rope_type" in rope else [table for table in rope.values() if isinstance(table, Mapping)]
    return any(
        table.get("rope_type") == "longrope" and table.get("short_factor") == table.get("long_factor")
        for table in tables
    )
