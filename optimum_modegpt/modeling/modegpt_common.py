"""The classes that all compressed families share: configuration, attention, MLP, models, and their registration.

This file is also remote code: it is copied next to the weights. It imports only torch and transformers.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .modegpt_contract import check_attention, check_loading, refuse_unread_arguments
from .modegpt_family import Family, Widths
from .modegpt_files import check_sizes, one_set_of_weights, readable_weights, refuse

# The base of a mixin; at run time it is combined with a family's dense class.
if TYPE_CHECKING:
    Dense = Any
else:
    Dense = object

FORMAT_VERSION = 1
"""Version of the record in config.json. A reader refuses a newer one."""


# --------------------------------------------------------------------------------------------------- configuration


class ModeGPTConfigMixin(Dense):
    """Extends a dense configuration class with the widths of each block in `per_layer_config`.

    The top level keeps the dense sizes.
    """

    family: ClassVar[Family]
    auto_classes: ClassVar[dict[str, str]]
    # Tensor parallelism would split the heads but not `rope_index`.
    base_model_tp_plan = None
    # The rotary table and the softmax scale are computed from the dense sizes at the top level.
    allow_global_per_layer_attribute_access = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the values before they are expanded, because the file may be hostile; then initialise as usual.

        Raises:
            ValueError: a value is not possible. The message names it.
        """
        if "modegpt" in kwargs:
            _check_record(kwargs["modegpt"])
        ours = {"_auto_class", "transformers_weights", *vars(ModeGPTConfigMixin), *ModeGPTConfigMixin.__annotations__}
        if foreign := sorted(kwargs.keys() & ours):
            raise ValueError(f"config.json has {foreign}, which no compressed model has. Save or download it again.")
        check_sizes(vars(self) | kwargs, (self.family.mlp.width, *self.family.sizes), self.attribute_map)
        if kwargs.get("per_layer_config") is not None:
            self._check_blocks(kwargs["per_layer_config"])
        super().__post_init__(**kwargs)

    def _check_blocks(self, entries: Any) -> None:
        """Check that there is one entry for each block, with the keys that we write and no others.

        A cache would read other keys, although the modules do not.
        """
        if not isinstance(entries, Mapping) or not all(isinstance(entry, Mapping) for entry in entries.values()):
            raise ValueError("config.json: per_layer_config is no object of objects, one for every block.")
        found = [str(key).lstrip("0") or "0" for key in entries]
        strange = set(found) ^ {str(index) for index in range(self.num_hidden_layers)}
        if strange or len(found) != self.num_hidden_layers:
            raise ValueError(
                f"config.json: per_layer_config has {len(found)} entries; expected one for each of "
                f"{self.num_hidden_layers} blocks, so look at {sorted(strange)[:5]}."
            )
        known = {"qk_head_dim", "v_head_dim", "head_dim", self.family.mlp.width}
        if foreign := {name for entry in entries.values() for name in entry} - known:
            raise ValueError(f"config.json: per_layer_config has {sorted(foreign)[:5]}; expected only {sorted(known)}.")

    @classmethod
    def from_dense(cls, dense: Any, widths: list[Widths], record: dict[str, Any]) -> Any:
        """Create the configuration of a compressed model from the dense one, the widths of every block and a record."""
        values = dense.to_dict()
        for key in ("model_type", "architectures", "auto_map", "transformers_version", "quantization_config"):
            values.pop(key, None)
        per_layer = {
            index: {
                "qk_head_dim": width.qk,
                "v_head_dim": width.vo,
                # The width of a row of the key-value cache, under the name that caches and serving engines read.
                "head_dim": max(width.qk, width.vo),
                cls.family.mlp.width: width.mlp,
            }
            for index, width in enumerate(widths)
        }
        return cls(**values, per_layer_config=per_layer, modegpt=record)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save as every configuration, and always name the code files, which `_auto_class` saves too."""
        self.auto_map = dict(self.auto_classes)
        return super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def dense_head_dim(self) -> int:
        """The head dim of the dense model."""
        return head_dim(self)

    @property
    def dense_mlp_width(self) -> int:
        """The MLP width of the dense model."""
        return mlp_width(self, self.family)

    def widths(self) -> list[Widths]:
        """Return the widths of every block.

        Raises:
            ValueError: the record is missing or newer; or a width is missing, no integer, below 1, above the dense one,
                or different from it in a part that is not compressed. Nothing has been built then.
        """
        _check_record(getattr(self, "modegpt", None))
        limits = {"qk_head_dim": self.dense_head_dim, "v_head_dim": self.dense_head_dim}
        limits[self.family.mlp.width] = self.dense_mlp_width
        return [self._widths_of(index, limits) for index in range(self.num_hidden_layers)]

    def _widths_of(self, index: int, limits: dict[str, int]) -> Widths:
        layer = self.per_layer_config[index]
        sizes: list[Any] = [getattr(layer, name, None) for name in limits]
        for (name, limit), size, part in zip(limits.items(), sizes, ("qk", "vo", "mlp"), strict=True):
            least = limit if part in self.family.full_width_parts else 1
            if type(size) is not int or not least <= size <= limit:
                raise ValueError(
                    f"config.json: per_layer_config[{index}].{name} is {size!r}; "
                    f"expected an integer in [{least}, {limit}]."
                )
        qk, vo, mlp = sizes
        if layer.head_dim != max(qk, vo):
            raise ValueError(
                f"config.json: per_layer_config[{index}].head_dim is {layer.head_dim!r}; "
                f"expected {max(qk, vo)}, the larger of qk_head_dim and v_head_dim."
            )
        return Widths(qk, vo, mlp)


def _check_record(record: Any) -> None:
    if not isinstance(record, dict):
        raise ValueError(
            "config.json has no `modegpt` record, so this is no compressed model. To compress a dense one, give "
            "compression_config to AutoModelForCausalLM.from_pretrained."
        )
    version = record.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"config.json says modegpt format_version {version!r}; this code reads up to {FORMAT_VERSION}. "
            "Update optimum-modegpt."
        )


def _silence_per_layer_warnings() -> None:
    """Silence the warning that per-layer widths are read globally: the dense classes are built from the global ones."""
    source = logging.getLogger("transformers.integrations.heterogeneity.configuration_utils")
    source.addFilter(lambda record: not any(f"`{name}`" in record.getMessage() for name in _PER_LAYER))


_PER_LAYER = {"head_dim"}
_silence_per_layer_warnings()


def head_dim(config: Any) -> int:
    """Return the head dim of a dense model, or of the model that was compressed."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def mlp_width(config: Any, family: Family) -> int:
    """Return the MLP width of a dense model, or of the model that was compressed.

    Raises:
        ValueError: the configuration has none, and the family does not derive it.
    """
    width: int | None = getattr(config, family.mlp.width)
    if width is not None:
        return width
    if family.mlp.width_factor is None:
        raise ValueError(f"config.json: {family.mlp.width} is None; expected an integer.")
    return family.mlp.width_factor * config.hidden_size


def count_heads(config: Any) -> dict[str, int]:
    """Return the number of "heads" and "kv_heads" of a model's attention."""
    heads = config.num_attention_heads
    return {"heads": heads, "kv_heads": getattr(config, "num_key_value_heads", None) or heads}


# ------------------------------------------------------------------------------------------------------- attention


class ModeGPTAttentionMixin(Dense):
    """Extends a dense attention class with separate widths for query and key heads, and for value heads.

    With rotary embeddings `rope_index` (key-value heads, qk_head_dim / 2) holds the coordinate pairs of the dense model
    that each head kept. The first of them are the pairs of the model's rotary table; the rest, which exist if only a
    part of a head rotates, are not rotated. Coordinates i and i + qk_head_dim / 2 of a head are a pair, also where the
    dense model has another order. The softmax scale remains that of the dense model.
    """

    family: ClassVar[Family]
    cache_argument: str
    """Name under which the dense class takes the key-value cache."""
    qk_head_dim: int
    v_head_dim: int
    rope_index: Tensor

    @classmethod
    def dense_class(cls) -> type:
        """Return the attention class of transformers that this one derives from."""
        return cls.__bases__[-1]

    @property
    def dense_head_dim(self) -> int:
        """The head dim of the dense model."""
        return getattr(self, self.family.attention.head_dim)

    @property
    def rotates(self) -> bool:
        """Whether this layer rotates query and key by position."""
        return rotates(self, self.family)

    @property
    def attention_window(self) -> int | None:
        """Length of the sliding window, or None if the attention is full."""
        return self.score_arguments().get("sliding_window")

    def score_arguments(self) -> dict[str, Any]:
        """Return the arguments of the attention function that determine the scores, in addition to `scaling`."""
        return {name: attrgetter(path)(self) for name, path in self.family.attention.score_arguments}

    def set_widths(self, qk: int, vo: int) -> None:
        """Set the head dims. The caller replaces the projections."""
        self.qk_head_dim, self.v_head_dim = qk, vo

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,  # (cos, sin) of the model's rotary table
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """Map (batch, length, d_model) to the same shape, as the dense class does; also return the attention weights.

        vLLM reads the source of this method: it expects the lookup of the attention interface and exactly one call of
        it here, with `scaling` as an attribute of `self`.
        """
        cache = kwargs.pop(self.cache_argument, None)
        kwargs = refuse_unread_arguments(type(self).__name__, kwargs)
        implementation = self.config._attn_implementation or ""
        # Up to transformers 5.23 a paged cache is an argument of the attention function.
        paged = "cache" in kwargs or (cache is not None and not isinstance(cache, Cache))
        query, key, value = self.project(hidden_states, position_embeddings)
        width = self.kernel_width(implementation, paged)
        dropout = attrgetter(self.family.attention.dropout)(self) if self.training else 0.0
        if paged:  # the cache itself has this width
            query, key, value = _pad(query, width), _pad(key, width), _pad(value, width)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        if implementation == "sdpa" and query.shape[2] == 1 and not paged:
            return self.output(self.attend_once(query, key, value, attention_mask, dropout)), None
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, self.eager_function())
        attn_output, attn_weights = attention_interface(
            self,
            _pad(query, width),
            _pad(key, width),
            _pad(value, width),
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            **self.score_arguments(),
            **kwargs,
        )
        shape = (*hidden_states.shape[:-1], query.shape[1], width or self.v_head_dim)
        return self.output(attn_output.reshape(shape)[..., : self.v_head_dim]), attn_weights

    @classmethod
    def eager_function(cls) -> Callable[..., Any]:
        """Return the eager attention function of the dense class's own module."""
        return sys.modules[cls.dense_class().__module__].eager_attention_forward

    def project(self, hidden_states: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value, (batch, heads, length, width) each; query and key after norms and rotation."""
        shape = hidden_states.shape[:-1]
        query = self.projection("query")(hidden_states).view(*shape, -1, self.qk_head_dim)
        key = self.projection("key")(hidden_states).view(*shape, -1, self.qk_head_dim)
        norms = self.family.attention.head_norms
        if norms is not None and not norms.rotated:
            query, key = self.normalise(query, key)
        if self.rotates:
            query, key = self.rotate(query, key, *position_embeddings)
        if norms is not None and norms.rotated:
            query, key = self.normalise(query, key)
        value = self.projection("value")(hidden_states).view(*shape, -1, self.v_head_dim)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def normalise(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the family's norms to query and key, (batch, length, heads, qk) each."""
        norms = self.family.attention.head_norms
        assert norms is not None
        query_norm, key_norm = self.submodule(norms.query), self.submodule(norms.key)
        if norms.over == "head":
            return query_norm(query), key_norm(key)
        return query_norm(query.flatten(2)).view_as(query), key_norm(key.flatten(2)).view_as(key)

    def projection(self, role: str) -> nn.Module:
        """Return the "query", "key", "value" or "output" projection."""
        return self.submodule(getattr(self.family.attention, role))

    def submodule(self, path: str) -> nn.Module:
        """Return a module of the attention by its path from the block."""
        return self.get_submodule(path.removeprefix(f"{self.family.attention.module}."))

    def output(self, heads: Tensor) -> Tensor:
        """Apply the output projection to (batch, length, heads, v)."""
        output = self.projection("output")(heads.flatten(-2).contiguous())
        dropout = self.family.attention.output_dropout
        return output if dropout is None else self.submodule(dropout)(output)

    def attend_once(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """Return the attention output of one query per head, (batch, 1, heads, v).

        The queries of a group are rows of one product with its keys and values: nothing of the cache is repeated for
        the heads of a group, and nothing is padded.
        """
        groups = key.shape[1]
        output = nn.functional.scaled_dot_product_attention(
            _rows_of_groups(query, groups),
            key,
            value,
            attn_mask=None if mask is None else _rows_of_groups(mask, groups),
            dropout_p=dropout,
            scale=self.scaling,
        )
        return output.flatten(1, 2).unsqueeze(1)  # from (batch, kv_heads, heads / kv_heads, v)

    def kernel_width(self, implementation: str, paged: bool) -> int | None:
        """Return the head dim that query, key and value are padded to, or None if their widths may differ.

        Zero columns change no product. A paged cache and SGLang have one width for all blocks, that of the dense model.
        vLLM has one per block, the `head_dim` of its `per_layer_config`; flash kernels and the fast paths of sdpa also
        take one width for the three.
        """
        if paged or implementation == "sglang":
            return self.dense_head_dim
        one_width = "flash" in implementation or implementation in ("sdpa", "vllm")
        return max(self.qk_head_dim, self.v_head_dim) if one_width else None

    def rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary embedding of the kept pairs; query (batch, length, heads, qk), key (batch, length, kv_heads, qk)."""
        cos, sin = self.kept_pairs(cos, 1.0), self.kept_pairs(sin, 0.0)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        grouped = query.unflatten(2, (key.shape[2], -1))  # (batch, length, kv_heads, heads / kv_heads, qk)
        return _turn(grouped, cos.unsqueeze(3), sin.unsqueeze(3)).flatten(2, 3), _turn(key, cos, sin)

    def kept_pairs(self, table: Tensor, unrotated: float) -> Tensor:
        """Return the columns of a rotary table that each head kept, (batch, length, kv_heads, qk / 2).

        Pairs that are not in the table have the value `unrotated`.
        """
        columns = pair_columns(table, self.family, self.dense_head_dim // 2, unrotated)
        return columns.index_select(-1, self.rope_index.view(-1)).view(*table.shape[:-1], *self.rope_index.shape)


def rotates(attention: nn.Module, family: Family) -> bool:
    """Return whether an attention, dense or compressed, rotates query and key by position."""
    positions = family.attention.positions
    flag = positions.layer_flag
    return positions.pairs != "none" and (flag is None or bool(getattr(attention, flag)))


def pair_columns(table: Tensor, family: Family, pairs: int, unrotated: float) -> Tensor:
    """Return a rotary table (batch, length, columns) with one column for each of `pairs` coordinate pairs of a head.

    The pairs that do not rotate are the last ones, with the value `unrotated`.
    """
    layout = family.attention.positions.table
    if layout == "concatenated":
        table = table[..., : table.shape[-1] // 2]
    elif layout == "repeated":
        table = table[..., ::2]
    missing = pairs - table.shape[-1]
    return nn.functional.pad(table, (0, missing), value=unrotated) if missing else table


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate coordinate pairs (i, i + d/2) of the last axis. The first half of `sin` is negated.

    This computes with whole rows, because CPU kernels process rows shorter than a vector register as scalars.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin)


def _pad(x: Tensor, width: int | None) -> Tensor:
    return x if width is None or x.shape[-1] == width else nn.functional.pad(x, (0, width - x.shape[-1]))


def _rows_of_groups(x: Tensor, groups: int) -> Tensor:
    """Reshape (batch, heads, 1, d) to (batch, groups, heads / groups, d). A mask that all heads share is unchanged."""
    return x if x.shape[1] == 1 else x.reshape(x.shape[0], groups, -1, x.shape[-1])


class ModeGPTMLPMixin(Dense):
    """Extends a dense MLP class that stacks its input projections. The compressed MLP has separate ones."""

    family: ClassVar[Family]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (batch, length, d_model) to the same shape, as the dense class does."""
        mlp = self.family.mlp
        hidden = self.submodule(mlp.activation)(self.submodule(mlp.inputs[0])(hidden_states))
        for path in mlp.inputs[1:]:
            hidden = hidden * self.submodule(path)(hidden_states)
        return self.submodule(mlp.output)(hidden)

    def submodule(self, path: str) -> nn.Module:
        """Return a module of the MLP by its path from the block."""
        return self.get_submodule(path.removeprefix(f"{self.family.mlp.module}."))


# ------------------------------------------------------------------------------------------- building and installing


def adopt_block(block: Any, model_class: type[ModeGPTModelMixin]) -> None:
    """Turn a dense block into one of the compressed classes at full width.

    Projections that the dense block stacks or transposes become separate linear layers, which are not initialised.

    Raises:
        ImportError: the dense class takes an argument that the compressed one does not handle.
    """
    family = model_class.attention_class.family
    attention = block.get_submodule(family.attention.module)
    _separate(block, family, attention.config)
    adopt_attention(attention, model_class.attention_class)
    if model_class.mlp_class is not None:
        block.get_submodule(family.mlp.module).__class__ = model_class.mlp_class


def adopt_attention(attention: Any, attention_class: type[ModeGPTAttentionMixin]) -> None:
    """Turn a dense attention module, with separate projections, into the compressed class at full width.

    Raises:
        ImportError: the dense class takes an argument that the compressed one does not handle.
    """
    attention.cache_argument = check_attention(attention_class.dense_class())
    attention.__class__ = attention_class
    head_dim, key = attention.dense_head_dim, attention.projection("key")
    attention.set_widths(head_dim, head_dim)
    if attention.rotates:
        pairs = torch.arange(head_dim // 2, dtype=torch.int32, device=key.weight.device)
        install_rope_index(attention, pairs.expand(key.out_features // head_dim, -1))


def _separate(block: nn.Module, family: Family, config: Any) -> None:
    """Replace the projections that the dense block stacks or transposes by uninitialised linear layers."""
    units = {"block": 1} | count_heads(config)
    head = head_dim(config)
    widths = {"qk": head, "vo": head, "mlp": mlp_width(config, family)}
    stacked: set[str] = set()
    for projection in family.projections:
        if projection.storage.plain:
            continue
        dense: Any = block.get_submodule(projection.dense_path)
        shape = [config.hidden_size, config.hidden_size]
        shape[projection.axis] = units[projection.unit] * widths[projection.part]
        new = empty_linear(dense, shape[0], shape[1])
        block.set_submodule(projection.path, new.requires_grad_(dense.weight.requires_grad))
        if projection.dense_path != projection.path:
            stacked.add(projection.dense_path)
    for path in stacked:
        parent, _, name = path.rpartition(".")
        delattr(block.get_submodule(parent), name)


def install_rope_index(attention: nn.Module, index: Tensor) -> None:
    """Set the coordinate pairs (kv_heads, qk_head_dim / 2) that each key-value head kept."""
    attention.register_buffer("rope_index", index.to(torch.int32).contiguous(), persistent=True)


def install_linear(block: nn.Module, path: str, weight: Tensor, bias: Tensor | None) -> None:
    """Replace a projection by one of the given weight (out, in), in the dtype and on the device of the old one.

    `bias` must be given if, and only if, the old projection has one.
    """
    old: Any = block.get_submodule(path)
    assert (bias is None) == (old.bias is None), path
    new = empty_linear(old, weight.shape[0], weight.shape[1])
    with torch.no_grad():
        new.weight.copy_(weight)
        if bias is not None:
            new.bias.copy_(bias)
    new.requires_grad_(old.weight.requires_grad)
    block.set_submodule(path, new)


def empty_linear(like: Any, out_features: int, in_features: int) -> nn.Linear:
    """Return an uninitialised projection of another shape, with the bias, dtype, device and mode of `like`."""
    new: Any = nn.utils.skip_init(
        nn.Linear,
        in_features,
        out_features,
        bias=like.bias is not None,
        dtype=like.weight.dtype,
        device=like.weight.device,
    )
    return new.train(like.training)


def shrink_block(block: Any, model_class: type[ModeGPTModelMixin], widths: Widths) -> None:
    """Give a newly built dense block the widths of a compressed one. The values must be loaded afterwards.

    Raises:
        ValueError: the query and key width is odd in a block with rotary embeddings.
    """
    family = model_class.attention_class.family
    attention = block.get_submodule(family.attention.module)
    units = {"block": 1} | count_heads(attention.config)
    adopt_block(block, model_class)
    attention.set_widths(widths.qk, widths.vo)
    for projection in family.projections:
        old = block.get_submodule(projection.path)
        shape = list(old.weight.shape)
        shape[projection.axis] = units[projection.unit] * getattr(widths, projection.part)
        block.set_submodule(projection.path, empty_linear(old, *shape))
    if attention.rotates:
        install_rope_index(attention, attention.rope_index[:, : widths.qk // 2])


# ----------------------------------------------------------------------------------------------------------- models


class ModeGPTModelMixin(Dense):
    """Extends a dense model class with blocks of the configuration's widths and with strict loading."""

    attention_class: ClassVar[type[ModeGPTAttentionMixin]]
    mlp_class: ClassVar[type[ModeGPTMLPMixin] | None] = None
    companion: ClassVar[Any] = None
    """Set when the package is imported: its additions to `save_pretrained` and `push_to_hub`."""
    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        check_loading()
        positions = self.config_class.family.attention.positions
        for index, widths in enumerate(config.widths()):  # checked here, before anything is allocated
            if positions.pairs != "none" and positions.layer_flag is None and widths.qk % 2:
                raise ValueError(
                    f"config.json: per_layer_config[{index}].qk_head_dim is {widths.qk}; rotary pairs need an even one."
                )
        super().__init__(config, *args, **kwargs)

    def post_init(self) -> None:
        """Narrow the blocks that the dense constructor has just built, then initialise as every model does."""
        family = self.attention_class.family
        blocks: Any = self.base_model.get_submodule(family.blocks)
        for block, widths in zip(blocks, self.config.widths(), strict=True):
            if not isinstance(block.get_submodule(family.attention.module), ModeGPTAttentionMixin):
                shrink_block(block, type(self), widths)
        super().post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as every model does, but refuse a checkpoint that does not fit instead of filling it with noise.

        Missing tensors and wrong shapes in the base model or the language model's head are refused, as are unexpected
        tensors in the base model. A new task head may be initialised, and one that the class lacks is ignored. Weights
        are read from safetensors only.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("The weights of a compressed model are safetensors; leave out use_safetensors=False.")
        wants_info = kwargs.pop("output_loading_info", False)
        new_head = kwargs.pop("ignore_mismatched_sizes", False)
        # Mismatches do not stop the load, so that the error can name every tensor.
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
        with readable_weights(pretrained_model_name_or_path, kwargs):
            model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        own_info = model.__dict__.pop("_own_loading_info", info)
        refuse(model, [*_loading_problems(model, own_info, new_head), *_rotary_problems(model)])
        return (model, info) if wants_info else model

    def _save(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Any = None,
        push_to_hub: bool = False,
        max_shard_size: Any = "50GB",
        variant: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save as every model does, and remove weights of a former save that would be read instead of these.

        If optimum_modegpt is imported, also save its report and model card.
        """
        kwargs |= {"state_dict": state_dict, "max_shard_size": max_shard_size, "variant": variant}
        if self.companion is None or self.holds_adapters:
            self._save_plainly(save_directory, is_main_process, push_to_hub=push_to_hub, **kwargs)
        else:
            self.companion.save(self, self._save_plainly, save_directory, is_main_process, push_to_hub, **kwargs)

    save_pretrained: Any = _save  # with fewer arguments by position

    def _save_plainly(self, folder: Any, is_main_process: bool, variant: str | None, **kwargs: Any) -> None:
        """Save as every model does, and leave one set of weights in the folder."""
        saves_weights = is_main_process and not self.holds_adapters and not kwargs.get("distributed_checkpoint")
        with one_set_of_weights(folder, variant) if saves_weights else nullcontext():
            super().save_pretrained(folder, is_main_process, variant=variant, **kwargs)

    def _push(self, repo_id: str, **kwargs: Any) -> Any:
        """Push as every model does. If optimum_modegpt is imported, also push its report and model card."""
        if self.companion is None or self.holds_adapters:
            return super().push_to_hub(repo_id, **kwargs)
        return self.companion.push(self, repo_id, **kwargs)

    push_to_hub: Any = _push  # for transformers it is a variable too

    @property
    def holds_adapters(self) -> bool:
        """Whether transformers has added adapters to this model. A save then writes only the adapters."""
        return getattr(self, "_hf_peft_config_loaded", False)

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        """Refuse a checkpoint that lacks tensors, before they are initialised with sizes from the configuration.

        Also record the loading information, because `from_pretrained` of an adapter's folder returns only that of the
        adapter.
        """
        found = copy.deepcopy(loading_info)
        self._adjust_missing_and_unexpected_keys(found)
        tied = self.all_tied_weights_keys
        partners = tied | {source: target for target, source in tied.items()}
        found.missing_keys = {key for key in found.missing_keys if partners.get(key, key) in found.missing_keys}
        self._own_loading_info = found.to_dict()
        refuse(self, list(_loading_problems(self, self._own_loading_info, new_head=True)))
        super().mark_tied_weights_as_initialized(loading_info)


def _loading_problems(model: ModeGPTModelMixin, info: dict[str, Any], new_head: bool) -> Iterator[str]:
    """Yield a line for each problem of a load."""
    body = {name for name, _ in model.base_model.named_children()} | {model.base_model_prefix}
    # A task head may be new. A language model's head may not, because it would generate noise.
    kept = body | {model.attention_class.family.head.output}
    for key in sorted(info["missing_keys"]):
        if key.partition(".")[0] in kept:
            yield f"missing: {key}"
    for key, found, expected in sorted(info["mismatched_keys"]):
        if key.partition(".")[0] in kept or not new_head:
            yield f"wrong shape: {key} is {tuple(found)}, the configuration says {tuple(expected)}"
    for key in sorted(info["unexpected_keys"]):
        if key.partition(".")[0] in body:
            yield f"not expected: {key}"


def _rotary_problems(model: ModeGPTModelMixin) -> Iterator[str]:
    pairs = model.config.dense_head_dim // 2
    for name, buffer in model.named_buffers():
        if name.endswith("rope_index") and not buffer.is_meta and not bool(((buffer >= 0) & (buffer < pairs)).all()):
            yield f"out of range: {name} has values outside [0, {pairs})"


def register(
    family: Family,
    config_class: Any,
    attention_class: type[ModeGPTAttentionMixin],
    mlp_class: type[ModeGPTMLPMixin] | None = None,
    **models: Any,
) -> Mapping[str, type[ModeGPTModelMixin]]:
    """Connect the classes of a family, which are in one file, and register them with the Auto classes.

    The names of `models` are those of the Auto classes that create them. This also writes the family's `auto_map`.
    Returns `models`.
    """
    module = config_class.__module__.rpartition(".")[2]
    names = {"AutoConfig": config_class, **models}
    config_class.family, config_class.model_type = family, family.compressed_type
    config_class.auto_classes = {auto: f"{module}.{cls.__name__}" for auto, cls in names.items()}
    config_class._auto_class = "AutoConfig"
    attention_class.family = family
    if mlp_class is not None:
        mlp_class.family = family
    _PER_LAYER.add(family.mlp.width)
    if not config_class.__module__.startswith("transformers_modules."):
        # Not for remote code, because AutoConfig would use the code of one repository for all others of the family.
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto, model in models.items():
        model.config_class, model.attention_class, model.mlp_class = config_class, attention_class, mlp_class
        model._auto_class = auto
        getattr(transformers, auto).register(config_class, model, exist_ok=True)
    return models
