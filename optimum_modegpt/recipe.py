"""Define and validate the fields of a compression configuration. Imports neither torch nor transformers."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from optimum_modegpt.errors import InvalidConfig
from optimum_modegpt.mixture import divide, mixture_of, with_weights
from optimum_modegpt.quantities import read_bytes, read_count

DEFAULT_ALLOCATIONS = {"default": "sensitivity", "paper": "influence"}
"""The allocation that each method uses if none is requested."""
ALLOCATIONS = ("sensitivity", "influence", "uniform")
LAYOUTS = ("per_layer", "mlp", "stock")
QUANTIZATIONS = ("int8", "int4")
SIZES = ("sparsity", "target_size", "target_parameters")
"""The fields that set the size of the result. Exactly one of them is used."""
TARGETS = ("target_size", "target_parameters", "target_quantization")
DEFAULT_SPARSITY = 0.3
LARGEST_INTEGER = 2**63 - 1
Config = TypeVar("Config")
IN_MEMORY = "in memory: "
"""Prefix of the placeholder that replaces an in-memory dataset or tokenizer in `to_dict`."""


def _naming_fields(config: type[Config]) -> type[Config]:
    """Make a dataclass reject unknown field names and suggest the closest field."""
    names = [field.name for field in dataclasses.fields(config)]  # pyright: ignore[reportArgumentType]
    assign = config.__init__

    @functools.wraps(assign)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else f"Fields: {', '.join(names)}."
                raise InvalidConfig(f"unknown field {name!r} in the compression configuration. {hint}")
        assign(self, *args, **values)

    config.__init__ = __init__
    return config


@_naming_fields
@dataclass(repr=False)
class Recipe:
    """Settings of a compression. Every field has a default that is a good first choice.

    Args:
        sparsity: fraction of the weights of the decoder blocks' projections to remove, in [0, 1). 0.3 removes 30 %.
            `None` takes 0.3, or the sparsity that reaches the target, if there is one.
        method: `"default"`, residual-matched MoDeGPT, or `"paper"`, the algorithm as published.
        allocation: how to distribute sparsity over blocks: `"sensitivity"` (measured, per block and part),
            `"influence"` (the paper's block influence) or `"uniform"`; `None` chooses sensitivity, or influence for
            the method paper, or uniform for this method with the layout stock.
        layout: the widths that may differ: `"per_layer"`, those of every block; `"mlp"`, only those of the MLPs, the
            attention keeps its head dims; `"stock"`, none. All blocks then have one head dim and one MLP width, and the
            result is a checkpoint of a class of transformers, which serving engines load without this package.
        dataset: calibration text: `"wikitext2"`, `"c4"`, `"alpaca"`, a dataset id of the Hub, a local .txt, .jsonl,
            .json or .parquet file, a folder, a list of strings or of chat messages, a `datasets.Dataset`, or token ids
            of shape (windows, length), also as the output of a tokenizer. `"self"` is text that the model itself
            writes. A list of several such sources, or a dict that gives each name a weight, is a mixture; a list of
            names becomes a dict.
        dataset_split: split to read, or a slice of one such as "train[:10%]"; `None` takes "train" (or the only one).
            Not for mixtures.
        text_column: column that holds the text or `input_ids`; `None` takes a column with a usual name, such as "text",
            then `input_ids`, then the only column of strings. Not for mixtures.
        num_samples: number of calibration windows.
        sequence_length: tokens per window; `None` takes min(2048, the model's context).
        batch_size: windows per forward pass; `None` chooses the largest size that fits in free memory.
        round_to: `"auto"` rounds widths to sizes that kernels run efficiently; an integer rounds to its multiples; 1
            does not round.
        seed: seed for sampling calibration windows; the global random state is not changed.
        influence_temperature: ε of the paper's softmax over block influences.
        max_sparsity: largest fraction of weights to remove from any part of any block.
        leverage_ridge: ridge of the paper's leverage scores, as a fraction of the mean diagonal.
        output_ridge: ridge of the refits of the output and down projections, as a fraction of the mean diagonal. A part
            that falls with the number of tokens is added to it.
        query_ridge: ridge of the query refit, as a fraction of the mean diagonal.
        input_ridge: ridge of the refit of gate and up, as a fraction of the mean diagonals. A part that falls with the
            number of tokens is added to it.
        refit_iterations: most conjugate-gradient iterations of the refit of gate and up; 0 disables it. With few tokens
            per row of these matrices, they are not refitted.
        expert_sparsity: fraction of the experts of every block to remove before the widths are cut, those with the
            smallest weighted outputs, in [0, 1). With sparsity=0, the result is a model of the dense class.
        target_size: size of all weights of the result in place of a sparsity, such as "4GB" (10^9 bytes), "1.5GiB" or
            a number of bytes, in the data type in which they are saved. Embeddings and head count, tied ones once.
        target_parameters: number of all parameters of the result in place of a sparsity, such as "1.2B".
        target_quantization: lets `target_size` be the size after a later quantization of the blocks' linear layers and
            experts: `"int8"`, with a 32-bit scale per row, or `"int4"`, with one per 64 weights. All other weights
            keep their data type. The compression itself does not quantize.
        tokenizer: tokenizer name or object; `None` takes the model's own.
        allow_foreign_tokenizer: whether `tokenizer` may differ from the model's own in vocabulary, special tokens or
            chat template; a difference is then a warning and part of the calibration record.

    Raises:
        InvalidConfig: a field has an invalid value. The message names the field, the value and the accepted values.
    """

    sparsity: float = None  # pyright: ignore[reportAssignmentType] - it is a number as soon as the model is known
    method: Literal["default", "paper"] = "default"
    allocation: Literal["sensitivity", "influence", "uniform"] | None = None
    layout: Literal["per_layer", "mlp", "stock"] = "per_layer"
    dataset: Any = ("c4", "wikitext2")
    dataset_split: str | None = None
    text_column: str | None = None
    num_samples: int = 128
    sequence_length: int | None = None
    batch_size: int | None = None
    round_to: int | Literal["auto"] = "auto"
    seed: int = 0
    influence_temperature: float = 0.1
    max_sparsity: float = 0.95
    leverage_ridge: float = 1e-2
    output_ridge: float = 1e-4
    query_ridge: float = 1e-3
    input_ridge: float = 0.1
    refit_iterations: int = 4
    expert_sparsity: float = 0.0
    target_size: int | str | None = None
    target_parameters: int | str | None = None
    target_quantization: Literal["int8", "int4"] | None = None
    tokenizer: Any = None
    allow_foreign_tokenizer: bool = False

    quant_method: ClassVar[str] = "modegpt"

    def __post_init__(self) -> None:
        for name in ("dataset", "tokenizer"):
            if isinstance(getattr(self, name), os.PathLike):
                setattr(self, name, os.fspath(getattr(self, name)))
        self._check_size()
        self._check_fractions()
        self._check_choices()
        for name in ("num_samples", "refit_iterations", "seed"):
            setattr(self, name, _integer(name, getattr(self, name), minimum=1 if name == "num_samples" else 0))
        if self.round_to != "auto":
            self.round_to = _integer("round_to", self.round_to, minimum=1, also=" or 'auto'")
        self._check_optional()
        if not isinstance(self.allow_foreign_tokenizer, bool):
            raise InvalidConfig(
                f"allow_foreign_tokenizer must be True or False, found {self.allow_foreign_tokenizer!r}."
            )
        for name in ("dataset", "tokenizer"):
            self._check_live(name)
        self._check_mixture()

    def _check_choices(self) -> None:
        _one_of("method", self.method, tuple(DEFAULT_ALLOCATIONS))
        if self.allocation is not None:
            _one_of("allocation", self.allocation, ALLOCATIONS)
        _one_of("layout", self.layout, LAYOUTS)
        if self.layout == "stock" and self.allocation == "influence":
            raise InvalidConfig(
                "allocation='influence' distributes sparsity over blocks, but layout='stock' gives all blocks the same "
                "widths; expected allocation 'sensitivity' or 'uniform'."
            )

    def _check_size(self) -> None:
        given = [f"{name}={getattr(self, name)!r}" for name in SIZES if getattr(self, name) is not None]
        if len(given) > 1:
            raise InvalidConfig(f"found {' and '.join(given)}; each sets the size of the result, so give only one.")
        if not given:
            self.sparsity = DEFAULT_SPARSITY
        for name, read in (("target_size", read_bytes), ("target_parameters", read_count)):
            if getattr(self, name) is not None:
                read(name, getattr(self, name))
        if self.target_quantization is not None:
            _one_of("target_quantization", self.target_quantization, QUANTIZATIONS)
            if self.target_size is None:
                raise InvalidConfig(
                    f"target_quantization={self.target_quantization!r} only changes the meaning of target_size; found "
                    f"{given[0] if given else 'no target_size'}."
                )

    def _check_fractions(self) -> None:
        self.expert_sparsity = _real("expert_sparsity", self.expert_sparsity, 1.0, includes_zero=True)
        self.max_sparsity = _real("max_sparsity", self.max_sparsity, 1.0)
        if self.sparsity is not None:
            self._check_sparsity()
        for name in ("influence_temperature", "leverage_ridge", "output_ridge", "query_ridge", "input_ridge"):
            setattr(self, name, _real(name, getattr(self, name), math.inf))

    def _check_sparsity(self) -> None:
        if isinstance(self.sparsity, int | float) and 1 < self.sparsity < 100:
            raise InvalidConfig(
                f"sparsity must be in [0, 1), found {self.sparsity}. Fractions, not percent: for {self.sparsity} % "
                f"write sparsity={self.sparsity / 100}."
            )
        self.sparsity = _real("sparsity", self.sparsity, 1.0, includes_zero=True)
        if self.sparsity > self.max_sparsity:
            raise InvalidConfig(
                f"sparsity={self.sparsity} is above max_sparsity={self.max_sparsity}, the limit for every part; "
                "lower sparsity or raise max_sparsity."
            )

    def _check_optional(self) -> None:
        for name, minimum in (("sequence_length", 2), ("batch_size", 1)):
            if getattr(self, name) is not None:
                setattr(self, name, _integer(name, getattr(self, name), minimum=minimum))
        for name in ("dataset_split", "text_column"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise InvalidConfig(f"{name} must be a string or None, found {getattr(self, name)!r}.")

    def _check_live(self, name: str) -> None:
        value = getattr(self, name)
        if name == "dataset" and value is None:
            raise InvalidConfig("dataset=None: expected a name, a file, texts, a Dataset or token ids.")
        items = list(value) if isinstance(value, list | tuple | Mapping) else [value]
        for item in items:
            if isinstance(item, str) and (value == "" or item.startswith(IN_MEMORY)):
                raise InvalidConfig(
                    f"{name}={item!r} is empty or a placeholder for an object that was not serialized; "
                    f"pass the {name} again."
                )

    def _check_mixture(self) -> None:
        self.dataset = with_weights(self.dataset)
        parts = mixture_of(self.dataset)
        if len(parts) == 1:
            return
        divide([part.weight for part in parts], self.num_samples)  # raises if there are too few windows
        for name in ("dataset_split", "text_column"):
            if getattr(self, name) is not None:
                raise InvalidConfig(
                    f"{name}={getattr(self, name)!r} would apply to all {len(parts)} sources of the mixture. Omit it; "
                    "for a source that needs it, save the text to a file."
                )

    @property
    def resolved_allocation(self) -> str:
        """Return the allocation to use: the field, or the default of method and layout if the field is None."""
        return self.allocation or str(default_allocation(self.method, self.layout))

    @property
    def equal_widths(self) -> bool:
        """Return whether all blocks get the same widths: in the layout "stock", and in "mlp" without measurements."""
        return self.layout == "stock" or (self.layout == "mlp" and self.resolved_allocation == "uniform")

    def with_sparsity(self, sparsity: float) -> Any:
        """Return a copy with this sparsity in place of its own or of a target."""
        return dataclasses.replace(self, **dict.fromkeys(TARGETS), sparsity=sparsity)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and `quant_method`, safe for JSON.

        A placeholder replaces an in-memory dataset or tokenizer, also in a mixture.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["tokenizer"] = None if self.tokenizer is None else _serialized(self.tokenizer)
        fields["dataset"] = _serialized_dataset(self.dataset)
        return {"quant_method": self.quant_method, **fields}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Create a configuration from a dict. `kwargs` that are fields override those of the dict.

        Raises:
            InvalidConfig: a key is not a field. The message suggests the closest field.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        values = overridden(config_dict, {k: v for k, v in kwargs.items() if k in names})
        method = values.pop("quant_method", cls.quant_method)
        if method != cls.quant_method:
            raise InvalidConfig(f"quant_method={method!r} is not supported; expected {cls.quant_method!r}.")
        config = cls(**values)
        unused = {k: v for k, v in kwargs.items() if k not in names}
        return (config, unused) if return_unused_kwargs else config


def default_allocation(method: Any, layout: Any) -> str | None:
    """Return the allocation that a method uses with a layout if none is requested; None for an unknown method."""
    default = DEFAULT_ALLOCATIONS.get(method)
    return "uniform" if layout == "stock" and default == "influence" else default


def overridden(values: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values`, updated by `fields`. A field that sets the size of the result removes all others that do."""
    replaced = SIZES if any(fields.get(name) is not None for name in SIZES) else ()
    return {**{name: value for name, value in values.items() if name not in replaced}, **fields}


def _serialized_dataset(dataset: Any) -> Any:
    """Return a name or the weights of names, or placeholders for objects in memory."""
    parts = mixture_of(dataset)
    if len(parts) == 1 and parts[0].source is dataset:
        return _serialized(dataset)
    if isinstance(dataset, Mapping):
        return dict(dataset)
    return [_serialized(part.source) for part in parts]


def _serialized(value: Any) -> str:
    return os.fspath(value) if isinstance(value, str | os.PathLike) else IN_MEMORY + _describe(value)


def _describe(value: Any) -> str:
    """Return the type of an object and its shape or length, if it has one."""
    if (shape := getattr(value, "shape", None)) is not None:
        return f"{type(value).__name__} shape {tuple(shape)}"
    if hasattr(value, "__len__"):
        return f"{type(value).__name__} {len(value)} items"
    return type(value).__name__


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidConfig(f"{name} must be one of {', '.join(map(repr, choices))}, found {value!r}.")


def _integer(name: str, value: Any, *, minimum: int, also: str = "") -> int:
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or not minimum <= int(value) <= LARGEST_INTEGER:
        raise InvalidConfig(f"{name} must be an integer of at least {minimum}{also}, found {value!r}.")
    return int(value)


def _real(name: str, value: Any, maximum: float, *, includes_zero: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidConfig(f"{name} must be a number, found {value!r}.")
    number = float(value)
    if not (0 < number < maximum or (includes_zero and number == 0)):
        bracket = "[" if includes_zero else "("
        raise InvalidConfig(f"{name} must be in {bracket}0, {maximum:g}), found {value!r}.")
    return number
