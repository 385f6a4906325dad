"""What all compressed families share: attention of two widths, smaller blocks, a strict load, code that travels.

This file is also remote code: it is copied beside the weights and must import nothing but torch and transformers.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .modegpt_contract import check_attention, check_loading, refuse_unread_cache
from .modegpt_family import Family, Widths
from .modegpt_files import check_sizes, one_set_of_weights, readable_weights, refuse

# What stands below a mixin: at run time a family's dense class.
if TYPE_CHECKING:
    Dense = Any
else:
    Dense = object

FORMAT_VERSION = 1
"""Version of what stands in config.json; a reader refuses a newer one."""


# --------------------------------------------------------------------------------------------------- configuration


class ModeGPTConfigMixin(Dense):
    """Over a dense configuration class: native `per_layer_config` with the widths, dense sizes at the top level."""

    family: ClassVar[Family]
    auto_classes: ClassVar[dict[str, str]]
    # Tensor parallelism would split the heads but not `rope_index`.
    base_model_tp_plan = None
    # The top level keeps the dense sizes on purpose: rotary table and softmax scale are made from them.
    allow_global_per_layer_attribute_access = True

    def __post_init__(self, **kwargs: Any) -> None:
        """As every configuration's, for values that can be trusted: a hostile file is refused before it is expanded.

        Raises:
            ValueError: with the name and the value of what cannot be.
        """
        if "modegpt" in kwargs:
            _check_record(kwargs["modegpt"])
        ours = {"_auto_class", "transformers_weights", *vars(ModeGPTConfigMixin), *ModeGPTConfigMixin.__annotations__}
        if foreign := sorted(kwargs.keys() & ours):
            raise ValueError(f"config.json has {foreign}, which no compressed model has. Save or download it again.")
        check_sizes(vars(self) | kwargs)
        if kwargs.get("per_layer_config") is not None:
            self._check_blocks(kwargs["per_layer_config"])
        super().__post_init__(**kwargs)

    def _check_blocks(self, entries: Any) -> None:
        """There is one entry a block, and none has what we do not write: caches would read it, the modules not."""
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
        """The configuration of a compressed model: that of `dense`, the widths of every block, and our record."""
        values = dense.to_dict()
        for key in ("model_type", "architectures", "auto_map", "transformers_version", "quantization_config"):
            values.pop(key, None)
        per_layer = {
            index: {
                "qk_head_dim": width.qk,
                "v_head_dim": width.vo,
                # One row of the key-value cache; the name that caches and serving engines read.
                "head_dim": max(width.qk, width.vo),
                cls.family.mlp.width: width.mlp,
            }
            for index, width in enumerate(widths)
        }
        return cls(**values, per_layer_config=per_layer, modegpt=record)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As every configuration's; it always names the code files, which `_auto_class` has saved with it."""
        self.auto_map = dict(self.auto_classes)
        return super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def dense_head_dim(self) -> int:
        """Head dim of the model that was compressed."""
        return getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads

    def widths(self) -> list[Widths]:
        """Widths of every block.

        Raises:
            ValueError: when the record is missing or newer, or a width is missing, no integer, below 1 or above the
                dense one: before anything is built.
        """
        _check_record(getattr(self, "modegpt", None))
        mlp_width = self.family.mlp.width
        limits = {"qk_head_dim": self.dense_head_dim, "v_head_dim": self.dense_head_dim}
        limits[mlp_width] = getattr(self, mlp_width)
        return [self._widths_of(index, limits) for index in range(self.num_hidden_layers)]

    def _widths_of(self, index: int, limits: dict[str, int]) -> Widths:
        layer = self.per_layer_config[index]
        sizes: list[Any] = [getattr(layer, name, None) for name in limits]
        for (name, limit), size in zip(limits.items(), sizes, strict=True):
            if type(size) is not int or not 1 <= size <= limit:
                raise ValueError(
                    f"config.json: per_layer_config[{index}].{name} is {size!r}; expected an integer in [1, {limit}]."
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
    """The dense classes read head_dim and the MLP width globally while they are built, which is what we want."""
    source = logging.getLogger("transformers.integrations.heterogeneity.configuration_utils")
    names = ("`head_dim`", "`intermediate_size`", "`ffn_dim`")
    source.addFilter(lambda record: not any(name in record.getMessage() for name in names))


_silence_per_layer_warnings()

# ------------------------------------------------------------------------------------------------------- attention


class ModeGPTAttentionMixin(Dense):
    """Over a dense attention class: query/key heads and value heads have widths of their own.

    With rotary embeddings `rope_index` (key-value heads, qk_head_dim / 2) says which of the dense model's rotary pairs
    a head kept. The softmax scale stays that of the dense model.
    """

    family: ClassVar[Family]
    cache_argument: str
    """Name under which the dense class takes the key-value cache."""
    qk_head_dim: int
    v_head_dim: int
    rope_index: Tensor
    sliding_window: int | None = None

    @classmethod
    def dense_class(cls) -> type:
        """Return the attention class of transformers that this one derives from."""
        return cls.__bases__[-1]

    def set_widths(self, qk: int, vo: int) -> None:
        """Declares the head dims; the projections are replaced by the caller."""
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
        refuse_unread_cache(type(self).__name__, kwargs)
        implementation = self.config._attn_implementation or ""
        # Up to transformers 5.23 a paged cache is an argument of the attention function.
        paged = "cache" in kwargs or (cache is not None and not isinstance(cache, Cache))
        query, key, value = self.project(hidden_states, position_embeddings)
        width = self.kernel_width(implementation, paged)
        if paged:  # the cache itself has this width
            query, key, value = _pad(query, width), _pad(key, width), _pad(value, width)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        if implementation == "sdpa" and query.shape[2] == 1 and not paged:
            return self.output(self.attend_once(query, key, value, attention_mask)), None
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attn_output, attn_weights = attention_interface(
            self,
            _pad(query, width),
            _pad(key, width),
            _pad(value, width),
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.attention_window,
            **kwargs,
        )
        shape = (*hidden_states.shape[:-1], query.shape[1], width or self.v_head_dim)
        return self.output(attn_output.reshape(shape)[..., : self.v_head_dim]), attn_weights

    def project(self, hidden_states: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value, (batch, heads, length, width) each; query and key after rotation."""
        shape = hidden_states.shape[:-1]
        query = self.projection("query")(hidden_states).view(*shape, -1, self.qk_head_dim)
        key = self.projection("key")(hidden_states).view(*shape, -1, self.qk_head_dim)
        if self.family.attention.rotary:
            query, key = self.rotate(query, key, *position_embeddings)
        value = self.projection("value")(hidden_states).view(*shape, -1, self.v_head_dim)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def projection(self, role: str) -> nn.Module:
        """Return the "query", "key", "value" or "output" projection."""
        path = getattr(self.family.attention, role).removeprefix(f"{self.family.attention.module}.")
        return getattr(self, path)

    def output(self, heads: Tensor) -> Tensor:
        """Apply the output projection to (batch, length, heads, v)."""
        return self.projection("output")(heads.flatten(-2).contiguous())

    def attend_once(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
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
            dropout_p=self.attention_dropout if self.training else 0.0,
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
            return self.head_dim
        one_width = "flash" in implementation or implementation in ("sdpa", "vllm")
        return max(self.qk_head_dim, self.v_head_dim) if one_width else None

    def rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary embedding of the kept pairs; query (batch, length, heads, qk), key (batch, length, kv_heads, qk)."""
        cos, sin = self.kept_pairs(cos), self.kept_pairs(sin)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        grouped = query.unflatten(2, (key.shape[2], -1))  # (batch, length, kv_heads, heads / kv_heads, qk)
        return _turn(grouped, cos.unsqueeze(3), sin.unsqueeze(3)).flatten(2, 3), _turn(key, cos, sin)

    def kept_pairs(self, table: Tensor) -> Tensor:
        """Of a rotary table (batch, length, head_dim) what each head kept: (batch, length, kv_heads, qk / 2)."""
        return table.index_select(-1, self.rope_index.view(-1)).view(*table.shape[:-1], *self.rope_index.shape)

    @property
    def attention_window(self) -> int | None:
        """Length of the sliding window, None where attention is full."""
        return self.sliding_window


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates coordinate pairs (i, i + d/2) of the last axis; `sin` has a minus sign in its first half.

    As long rows as can be: kernels of a CPU leave what fills no vector register to scalar code.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin)


def _pad(x: Tensor, width: int | None) -> Tensor:
    return x if width is None or x.shape[-1] == width else nn.functional.pad(x, (0, width - x.shape[-1]))


def _rows_of_groups(x: Tensor, groups: int) -> Tensor:
    """(batch, heads, 1, d) to (batch, groups, heads / groups, d); a mask that all heads share stays one."""
    return x if x.shape[1] == 1 else x.reshape(x.shape[0], groups, -1, x.shape[-1])


# ------------------------------------------------------------------------------------------- building and installing


def adopt_attention(attention: Any, attention_class: type[ModeGPTAttentionMixin]) -> None:
    """Turn a dense attention module into the compressed class at full width; its outputs stay the same.

    Raises:
        ImportError: the dense class takes an argument that the compressed one does not handle.
    """
    attention.cache_argument = check_attention(attention_class.dense_class())
    attention.__class__ = attention_class
    head_dim, key = attention.head_dim, attention.projection("key")
    attention.set_widths(head_dim, head_dim)
    if attention.family.attention.rotary:
        pairs = torch.arange(head_dim // 2, dtype=torch.int32, device=key.weight.device)
        install_rope_index(attention, pairs.expand(key.out_features // head_dim, -1))


def install_rope_index(attention: nn.Module, index: Tensor) -> None:
    """Sets the rotary pairs (kv_heads, qk_head_dim / 2) that each key-value head kept."""
    attention.register_buffer("rope_index", index.to(torch.int32).contiguous(), persistent=True)


def install_linear(block: nn.Module, path: str, weight: Tensor, bias: Tensor | None) -> None:
    """Replaces a projection by one of the given weight (out, in), in the dtype and on the device of the old one.

    A bias comes with it exactly where the old projection has one: a projection never gains a bias.
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


def empty_linear(like: nn.Linear, out_features: int, in_features: int) -> nn.Linear:
    """An uninitialised projection of another shape, else as `like`."""
    new: Any = nn.utils.skip_init(
        nn.Linear,
        in_features,
        out_features,
        bias=like.bias is not None,
        dtype=like.weight.dtype,
        device=like.weight.device,
    )
    return new.train(like.training)


def shrink_block(block: Any, attention_class: type[ModeGPTAttentionMixin], widths: Widths) -> None:
    """Give a freshly built dense block the widths of a compressed one; the values are to be loaded."""
    family = attention_class.family
    attention = block.get_submodule(family.attention.module)
    units = {"block": 1} | count_heads(block, family)
    adopt_attention(attention, attention_class)
    attention.set_widths(widths.qk, widths.vo)
    for projection in family.projections:
        old = block.get_submodule(projection.path)
        shape = list(old.weight.shape)
        shape[projection.axis] = units[projection.unit] * getattr(widths, projection.part)
        block.set_submodule(projection.path, empty_linear(old, *shape))
    if family.attention.rotary:
        install_rope_index(attention, attention.rope_index[:, : widths.qk // 2])


def count_heads(block: Any, family: Family) -> dict[str, int]:
    """Return the "heads" and "kv_heads" of a dense block."""
    head_dim = block.get_submodule(family.attention.module).head_dim
    paths = {"heads": family.attention.query, "kv_heads": family.attention.key}
    return {unit: block.get_submodule(path).out_features // head_dim for unit, path in paths.items()}


# ----------------------------------------------------------------------------------------------------------- models


class ModeGPTModelMixin(Dense):
    """Over a dense model class: blocks of the configuration's widths and strict loading."""

    attention_class: ClassVar[type[ModeGPTAttentionMixin]]
    companion: ClassVar[Any] = None
    """Set by the package where it is imported: what it adds to `save_pretrained` and `push_to_hub`."""
    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        check_loading()
        for index, widths in enumerate(config.widths()):  # refused here, before anything is allocated
            if self.config_class.family.attention.rotary and widths.qk % 2:
                raise ValueError(
                    f"config.json: per_layer_config[{index}].qk_head_dim is {widths.qk}; rotary pairs need an even one."
                )
        super().__init__(config, *args, **kwargs)

    def post_init(self) -> None:
        """Narrows the blocks that the dense constructor has just built, then initialises as every model does."""
        family = self.attention_class.family
        blocks: Any = self.base_model.get_submodule(family.blocks)
        for block, widths in zip(blocks, self.config.widths(), strict=True):
            if not isinstance(block.get_submodule(family.attention.module), ModeGPTAttentionMixin):
                shrink_block(block, self.attention_class, widths)
        super().post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As every model's, but a checkpoint that does not fit is an error: transformers would fill it with noise.

        A tensor of the base model or the language model's head that is missing or mis-shaped, or an unexpected one in
        the base model, is refused. A new task head may be initialised, and one that the class lacks left out. Weights
        are read from safetensors only.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("The weights of a compressed model are safetensors; leave out use_safetensors=False.")
        wants_info = kwargs.pop("output_loading_info", False)
        new_head = kwargs.pop("ignore_mismatched_sizes", False)
        # Mismatches are let through, so that every tensor is named.
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
        """As every model's, but weights of a former save that would be read in place of these are removed.

        Where optimum_modegpt is imported, with its report and model card.
        """
        kwargs |= {"state_dict": state_dict, "max_shard_size": max_shard_size, "variant": variant}
        if self.companion is None or self.holds_adapters:
            self._save_plainly(save_directory, is_main_process, push_to_hub=push_to_hub, **kwargs)
        else:
            self.companion.save(self, self._save_plainly, save_directory, is_main_process, push_to_hub, **kwargs)

    save_pretrained: Any = _save  # with fewer arguments by position

    def _save_plainly(self, folder: Any, is_main_process: bool, variant: str | None, **kwargs: Any) -> None:
        """As every model's, with one set of weights in the folder afterwards."""
        saves_weights = is_main_process and not self.holds_adapters and not kwargs.get("distributed_checkpoint")
        with one_set_of_weights(folder, variant) if saves_weights else nullcontext():
            super().save_pretrained(folder, is_main_process, variant=variant, **kwargs)

    def _push(self, repo_id: str, **kwargs: Any) -> Any:
        """As every model's; where optimum_modegpt is imported, with its report and model card."""
        if self.companion is None or self.holds_adapters:
            return super().push_to_hub(repo_id, **kwargs)
        return self.companion.push(self, repo_id, **kwargs)

    push_to_hub: Any = _push  # for transformers it is a variable too

    @property
    def holds_adapters(self) -> bool:
        """Whether transformers has put adapters into this model: then a save writes them, and no model."""
        return getattr(self, "_hf_peft_config_loaded", False)

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        """The step before what a checkpoint lacks is made up: refused here, in time, as its size is the config's word.

        Given an adapter's folder, `from_pretrained` tells of the adapter alone, so what it lacks is also noted here.
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
    """What is wrong with a load: lines for people, none when the model is exactly what was saved."""
    body = {name for name, _ in model.base_model.named_children()} | {model.base_model_prefix}
    # A task head may be new; a language model's may not: it would generate noise.
    kept = body | {"lm_head"}
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


def register(*models: type[ModeGPTModelMixin]) -> dict[str, type[ModeGPTModelMixin]]:
    """The model classes of a family, which stand in one file, by the Auto class that builds them.

    Writes the family's `auto_map` and makes the classes known to the Auto classes.
    """
    by_auto: dict[str, type[ModeGPTModelMixin]] = {str(model._auto_class): model for model in models}
    config_class: Any = models[0].config_class
    module = config_class.__module__.rpartition(".")[2]
    names = {"AutoConfig": config_class, **by_auto}
    config_class.auto_classes = {auto: f"{module}.{cls.__name__}" for auto, cls in names.items()}
    if not config_class.__module__.startswith("transformers_modules."):
        # By name, so not from remote code: the code of one repository would serve all others of the family.
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto, model in by_auto.items():
        getattr(transformers, auto).register(config_class, model, exist_ok=True)
    return by_auto
