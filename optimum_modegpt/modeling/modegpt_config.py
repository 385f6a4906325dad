"""The configuration that all compressed families share, and the sizes of their dense models.

This file is also remote code: it is copied next to the weights. It imports only torch and transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from .modegpt_family import Family, Part, Widths
from .modegpt_files import check_sizes

# The base of a mixin; at run time it is combined with a family's dense class.
if TYPE_CHECKING:
    Dense = Any
else:
    Dense = object

FORMAT_VERSION = 1
"""Version of the record in config.json. A reader refuses a newer one."""

SHARED_WIDTH = "shared_expert_width"
"""Key of the width of a block's shared expert in `per_layer_config`."""


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
        _refuse_foreign(kwargs.keys() & ours - {"per_layer_config"})
        values, sizes = vars(self) | kwargs, self.family.size_names
        check_sizes(values, sizes, self.attribute_map)
        if kwargs.get("per_layer_config") is not None:
            self._check_blocks(kwargs["per_layer_config"])
            for entry in kwargs["per_layer_config"].values():
                check_sizes(values | entry, sizes, self.attribute_map)
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
        known = {"qk_head_dim", "v_head_dim", "head_dim", *self.family.width_names, *self.family.layer_sizes}
        if self.family.shared is not None:
            known.add(SHARED_WIDTH)
        if foreign := {name for entry in entries.values() for name in entry} - known:
            raise ValueError(f"config.json: per_layer_config has {sorted(foreign)[:5]}; expected only {sorted(known)}.")

    @property
    def per_layer_config(self) -> Any:
        """The configurations of the blocks, by index. That of a layer type is the whole configuration."""
        return _BlockConfigs(self, super().per_layer_config)

    @per_layer_config.setter
    def per_layer_config(self, per_layer_config: Any) -> None:
        super(ModeGPTConfigMixin, type(self)).per_layer_config.fset(self, per_layer_config)

    @classmethod
    def from_dense(cls, dense: Any, widths: list[Widths], record: dict[str, Any]) -> Any:
        """Create the configuration of a compressed model from the dense one, the widths of every block and a record."""
        values = dense_values(dense)
        own = {int(index): entry for index, entry in values.pop("per_layer_config", {}).items()}
        per_layer: dict[int, dict[str, int]] = {}
        for index, width in enumerate(widths):
            kept = {name: size for name, size in own.get(index, {}).items() if name in cls.family.layer_sizes}
            name = cls.family.width_name(dense, index)
            per_layer[index] = kept | {"qk_head_dim": width.qk, "v_head_dim": width.vo, name: width.mlp}
            if cls.family.shared is not None:
                per_layer[index][SHARED_WIDTH] = width.shared
            if "qk" not in cls.family.absent(dense, index):
                # The width of a row of the key-value cache, under the name that caches and serving engines read.
                per_layer[index]["head_dim"] = max(width.qk, width.vo)
        return cls(**values, per_layer_config=per_layer, modegpt=record)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, and the number of blocks by its common name, by which a generic configuration finds it."""
        return super().to_dict() | {"num_hidden_layers": self.num_hidden_layers}

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save as every configuration, and always name the code files, which `_auto_class` saves too."""
        self.auto_map = dict(self.auto_classes)
        return super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def dense_head_dim(self) -> int:
        """The head dim of the dense model."""
        return head_dim(self)

    def dense_mlp_width(self, index: int) -> int:
        """Return the MLP width of a block of the dense model."""
        return mlp_width(self, self.family, index)

    def dense_shared_width(self, index: int) -> int:
        """Return the width of the shared expert of a block of the dense model; 0 if it has none."""
        return self.family.shared_width(self, index)

    def widths(self) -> list[Widths]:
        """Return the widths of every block.

        Raises:
            ValueError: the record is missing or newer; or a width is missing, no integer, below 1, above the dense one,
                different from it in a part that is not compressed, or not 0 in a part that the block does not have.
                Nothing has been built then.
        """
        _check_record(getattr(self, "modegpt", None))
        uncut = self.family.uncut(self)
        return [self._widths_of(index, uncut) for index in range(self.num_hidden_layers)]

    def _widths_of(self, index: int, uncut: Collection[str]) -> Widths:
        layer, absent = self.per_layer_config[index], self.family.absent(self, index)
        widths: dict[str, int] = {}
        for part, (name, limit) in self._limits(index).items():
            size: Any = getattr(layer, name, None)
            limit = 0 if part in absent else limit
            least = limit if part in (*absent, *uncut) else min(1, limit)
            if type(size) is not int or not least <= size <= limit:
                raise ValueError(
                    f"config.json: per_layer_config[{index}].{name} is {size!r}; "
                    f"expected an integer in [{least}, {limit}]."
                )
            widths[part] = size
        qk, vo = widths["qk"], widths["vo"]
        cached = max(qk, vo) or self.dense_head_dim  # of a block without these parts, it is the dense one
        if "head_dim" not in self.family.layer_sizes and getattr(layer, "head_dim", cached) != cached:
            raise ValueError(
                f"config.json: per_layer_config[{index}].head_dim is {layer.head_dim!r}; "
                f"expected {cached}, the larger of qk_head_dim and v_head_dim, or the dense one if both are 0."
            )
        return Widths(**widths)

    def _limits(self, index: int) -> dict[Part, tuple[str, int]]:
        """Return the key in `per_layer_config` of the width of every part of a block, and the dense width."""
        limits: dict[Part, tuple[str, int]] = {
            "qk": ("qk_head_dim", self.dense_head_dim),
            "vo": ("v_head_dim", self.dense_head_dim),
            "mlp": (self.family.width_name(self, index), self.dense_mlp_width(index)),
        }
        if self.family.shared is not None:
            limits["shared"] = (SHARED_WIDTH, self.dense_shared_width(index))
        return limits


class ModeGPTCompositeConfigMixin(Dense):
    """Extends the configuration of a model with a text tower. The tower's own configuration has the widths."""

    family: ClassVar[Family]
    auto_classes: ClassVar[dict[str, str]]
    text_class: ClassVar[Any]
    """The compressed configuration class of the text tower."""
    base_model_tp_plan = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Create the text tower's configuration by its class, then initialise as usual.

        Raises:
            ValueError: a value is not possible. The message names it.
        """
        if "modegpt" in kwargs:
            _check_record(kwargs["modegpt"])
        own = vars(ModeGPTCompositeConfigMixin).keys() | ModeGPTCompositeConfigMixin.__annotations__.keys()
        _refuse_foreign(kwargs.keys() & own)
        if isinstance(self.text_config, Mapping):
            self.text_config = self.text_class(**self.text_config)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dense(cls, dense: Any, widths: list[Widths], record: dict[str, Any]) -> Any:
        """Create the configuration of a compressed model from the dense one, the widths of every block and a record."""
        text = cls.text_class.from_dense(dense.text_config, widths, {"format_version": record["format_version"]})
        return cls(**dense_values(dense) | {"text_config": text}, modegpt=record)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save as every configuration, and always name the code files, which `_auto_class` saves too."""
        self.auto_map = dict(self.auto_classes)
        return super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def dense_head_dim(self) -> int:
        """The head dim of the dense text tower."""
        return self.text_config.dense_head_dim

    def dense_mlp_width(self, index: int) -> int:
        """Return the MLP width of a block of the dense text tower."""
        return self.text_config.dense_mlp_width(index)

    def dense_shared_width(self, index: int) -> int:
        """Return the width of the shared expert of a block of the dense text tower; 0 if it has none."""
        return self.text_config.dense_shared_width(index)

    def widths(self) -> list[Widths]:
        """Return the widths of every block of the text tower.

        Raises:
            ValueError: the record is missing or newer, or the text tower is not compressed, or its widths are wrong.
        """
        _check_record(getattr(self, "modegpt", None))
        if not isinstance(self.text_config, self.text_class):
            raise ValueError(
                f"config.json: text_config is a {type(self.text_config).__name__}; expected {self.text_class.__name__}."
            )
        return self.text_config.widths()


class _BlockConfigs(Sequence[Any]):
    """The configurations of the blocks. A layer type has the dense widths, from which its rotary table is computed.

    transformers would return those of its blocks if they are equal, and compute a table of the compressed width.
    """

    def __init__(self, whole: Any, blocks: Sequence[Any]) -> None:
        self.whole, self.blocks = whole, blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, str):
            return self.blocks[index]
        # Widths of heads that differ between layer types are dense.
        return self.blocks[self.whole.layer_types.index(index)] if self.whole.family.layer_sizes else self.whole


def dense_values(dense: Any) -> dict[str, Any]:
    """Return the values of a dense configuration that a compressed one keeps.

    A model without some of its experts has a record of an earlier compression.
    """
    values = dense.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version", "quantization_config", "modegpt"):
        values.pop(key, None)
    return values


def with_text_values(config: Any, values: Mapping[str, Any]) -> Any:
    """Return a copy of a dense configuration with some values of its text model replaced."""
    text = config.get_text_config()
    if text is config:
        return type(config)(**dense_values(config) | dict(values))
    new = dense_values(text) | dict(values) | {"model_type": text.model_type}
    return type(config)(**dense_values(config) | {"text_config": new})


def _refuse_foreign(names: Collection[str]) -> None:
    if names:
        raise ValueError(f"config.json has {sorted(names)}, which no compressed model has. Save or download it again.")


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
    source.addFilter(lambda record: not any(f"`{name}`" in record.getMessage() for name in PER_LAYER))


PER_LAYER = {"head_dim"}
"""Names of widths that differ between blocks."""

_silence_per_layer_warnings()


def head_dim(config: Any) -> int:
    """Return the head dim of a dense model, or of the model that was compressed."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def mlp_width(config: Any, family: Family, index: int) -> int:
    """Return the MLP width of a block of a dense model, or of the model that was compressed.

    Raises:
        ValueError: the configuration has none, and the family does not derive it.
    """
    name = family.width_name(config, index)
    width: int | None = getattr(config, name, None)
    if width is not None:
        return width
    if family.mlp.width_factor is None:
        raise ValueError(f"config.json: {name} is None; expected an integer.")
    return family.mlp.width_factor * config.hidden_size


def count_heads(attention: Any, family: Family, config: Any) -> dict[str, int]:
    """Return the number of "heads" and "kv_heads" of an attention, dense or compressed."""
    heads, name = config.num_attention_heads, family.attention.kv_heads
    groups = getattr(config, "num_key_value_heads", None) if name is None else getattr(attention, name)
    return {"heads": heads, "kv_heads": groups or heads}
