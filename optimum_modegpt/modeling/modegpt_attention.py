"""The attention that all compressed families share: separate widths for query and key heads, and for value heads.

This file is also remote code: it is copied next to the weights. It imports only torch and transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .modegpt_config import Dense
from .modegpt_contract import ENGINES, refuse_unread_arguments
from .modegpt_family import Family, HeadNorms

IN_MASK = {"sliding_window"}
"""Arguments of the attention function that the mask contains already."""


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

    @classmethod
    def adds_to_scores(cls, config: Any) -> bool:
        """Return whether the attention of a model adds a bias to its scores, in addition to the mask."""
        del config
        return False

    @property
    def dense_head_dim(self) -> int:
        """The head dim of the dense model."""
        return getattr(self, self.family.attention.head_dim)

    @property
    def rotates(self) -> bool:
        """Whether this layer rotates query and key by position."""
        return rotates(self, self.family)

    def score_arguments(self) -> dict[str, Any]:
        """Return the arguments of the attention function that determine the scores, in addition to `scaling`."""
        return {name: attrgetter(path)(self) for name, path in self.family.attention.score_arguments}

    @property
    def has_plain_scores(self) -> bool:
        """Whether the scores follow from query, key and mask, without a soft cap or sinks."""
        return all(value is None or name in IN_MASK for name, value in self.score_arguments().items())

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
        query = self.scaled_query(query, kwargs.get("position_ids"))
        width = self.kernel_width(implementation, paged, query.shape[1])
        dropout = attrgetter(self.family.attention.dropout)(self) if self.training else 0.0
        if paged:  # the cache itself has this width
            query, key, value = _pad(query, width), _pad(key, width), _pad(value, width)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        if implementation == "sdpa" and query.shape[2] == 1 and not paged and self.has_plain_scores:
            return self.output(self.attend_once(query, key, value, attention_mask, dropout), hidden_states), None
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
        return self.output(attn_output.reshape(shape)[..., : self.v_head_dim], hidden_states), attn_weights

    @classmethod
    def eager_function(cls) -> Callable[..., Any]:
        """Return the eager attention function of the dense class's own module."""
        return sys.modules[cls.dense_class().__module__].eager_attention_forward

    def project(self, hidden_states: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value, (batch, heads, length, width) each; query and key after norms and rotation."""
        query = self.projected("query", hidden_states, self.qk_head_dim)
        key = self.projected("key", hidden_states, self.qk_head_dim)
        norms = self.family.attention.norms_of(self.config)
        if norms is not None and not norms.rotated:
            query, key = self.normalise(norms, query, key)
        if self.rotates:
            first, second = position_embeddings
            cos, sin = (second, first) if self.family.attention.positions.sine_first else (first, second)
            query, key = self.rotate(query, key, cos, sin)
        if norms is not None and norms.rotated:
            query, key = self.normalise(norms, query, key)
        value = self.projected("value", hidden_states, self.v_head_dim)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def projected(self, role: str, hidden_states: Tensor, width: int) -> Tensor:
        """Return the output of the "query", "key" or "value" projection, (batch, length, heads, width)."""
        output, clip = self.projection(role)(hidden_states), self.family.attention.clip
        limit = None if clip is None else attrgetter(clip)(self.config)
        if limit is not None:
            output = output.clamp(-limit, limit)
        return output.view(*hidden_states.shape[:-1], -1, width)

    def normalise(self, norms: HeadNorms, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the family's norms to query and key, (batch, length, heads, qk) each."""
        query_norm, key_norm = self.head_norm("query"), self.head_norm("key")
        if norms.over == "head":
            return query_norm(query), key_norm(key)
        if norms.over == "each head":
            return query_norm(query.transpose(1, 2)).transpose(1, 2), key_norm(key.transpose(1, 2)).transpose(1, 2)
        return query_norm(query.flatten(2)).view_as(query), key_norm(key.flatten(2)).view_as(key)

    def scaled_query(self, query: Tensor, position_ids: Tensor | None) -> Tensor:
        """Multiply the query (batch, heads, length, qk) by the factor of its position, if the family has one."""
        if not self.family.attention.positions.query_factor:
            return query
        assert position_ids is not None, "the factor of a query depends on its position"
        rope = self.config.rope_parameters
        turns = (position_ids / rope["original_max_position_embeddings"]).floor()
        factor = 1 + rope["llama_4_scaling_beta"] * (1 + turns).log()
        return query * factor[:, None, :, None].to(query.dtype)

    def projection(self, role: str) -> nn.Module:
        """Return the "query", "key", "value", "output" or "gate" projection."""
        return self.submodule(getattr(self.family.attention, role))

    def head_norm(self, role: str) -> nn.Module:
        """Return the norm of "query" or "key". The family must have them."""
        return self.submodule(getattr(self.family.attention.head_norms, role))

    def submodule(self, path: str) -> nn.Module:
        """Return a module of the attention by its path from the block."""
        return self.get_submodule(path.removeprefix(f"{self.family.attention.module}."))

    def output(self, heads: Tensor, hidden_states: Tensor) -> Tensor:
        """Apply the gate, if any, and the output projection to (batch, length, heads, v)."""
        heads = heads.flatten(-2).contiguous()
        if self.family.attention.gate is not None:
            heads = heads * self.projection("gate")(hidden_states).sigmoid()
        output = self.projection("output")(heads)
        path = self.family.attention.output_dropout
        if path is None:
            return output
        dropout = attrgetter(path.removeprefix(f"{self.family.attention.module}."))(self)
        return nn.functional.dropout(output, getattr(dropout, "p", dropout), self.training)

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

    def kernel_width(self, implementation: str, paged: bool, heads: int) -> int | None:
        """Return the head dim that query, key and value are padded to, or None if their widths may differ.

        Zero columns change no product. A paged cache and SGLang have one width for all blocks, that of the dense model.
        vLLM has one per block; flash kernels and the fast paths of sdpa also take one width for the three. `heads` is
        the number of query heads that were computed here.
        """
        if implementation in ENGINES:
            return self.engine_width(implementation, heads)
        if paged:
            return self.dense_head_dim
        one_width = "flash" in implementation or implementation == "sdpa"
        return max(self.qk_head_dim, self.v_head_dim) if one_width else None

    def engine_width(self, engine: str, heads: int) -> int:
        """Return the head dim that a serving engine has allocated for this block.

        Raises:
            ValueError: the engine would compute something else.
        """
        if engine == "sglang":
            self.check_sglang()
            return self.dense_head_dim
        kernel, least = getattr(self, "attn", None), max(self.qk_head_dim, self.v_head_dim)
        if kernel is None:  # it has the width that the configuration declares
            return least
        if kernel.num_heads != heads:
            raise ValueError(
                f"vLLM has {kernel.num_heads} heads for layer {self.layer_idx}, which computes {heads}: compressed "
                "models do not support tensor parallelism. Set tensor_parallel_size=1."
            )
        if kernel.head_size < least:
            raise ValueError(
                f"vLLM has a head dim of {kernel.head_size} for layer {self.layer_idx}; expected at least {least}. It "
                "does not read per_layer_config: update vLLM."
            )
        return kernel.head_size

    def check_sglang(self) -> None:
        """Check that SGLang applies all that determines the scores of this layer.

        Raises:
            ValueError: it does not.
        """
        if not self.has_plain_scores:
            names = [
                name for name, value in self.score_arguments().items() if value is not None and name not in IN_MASK
            ]
            raise ValueError(f"SGLang ignores {names} of layer {self.layer_idx}, so its output would be wrong.")
        window, types = self.score_arguments().get("sliding_window"), getattr(self.config, "layer_types", None)
        if window is not None and (types is None or types[self.layer_idx] != "sliding_attention"):
            raise ValueError(
                f"Layer {self.layer_idx} has a window of {window} tokens, which SGLang ignores because config.json has "
                "no layer_types; its output would be wrong after as many tokens."
            )

    def rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate the kept pairs: query (batch, length, heads, qk), key (batch, length, kv_heads, qk)."""
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
    if positions.pairs == "none":
        return False
    if positions.layer_flag is None or (positions.flag_needs and getattr(attention, positions.flag_needs) is None):
        return True
    return bool(attrgetter(positions.layer_flag)(attention))


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

    This computes with whole rows, because CPU kernels process rows shorter than a vector register as scalars. Some
    models have a table in float32; the result has the dtype of `x`.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin).to(x.dtype)


def _pad(x: Tensor, width: int | None) -> Tensor:
    return x if width is None or x.shape[-1] == width else nn.functional.pad(x, (0, width - x.shape[-1]))


def _rows_of_groups(x: Tensor, groups: int) -> Tensor:
    """Reshape (batch, heads, 1, d) to (batch, groups, heads / groups, d). A mask that all heads share is unchanged."""
    return x if x.shape[1] == 1 else x.reshape(x.shape[0], groups, -1, x.shape[-1])
