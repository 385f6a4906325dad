"""The model classes that all compressed families share, and their registration.

This file is also remote code: it is copied next to the weights. It imports only torch and transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import transformers

from .modegpt_attention import ModeGPTAttentionMixin
from .modegpt_blocks import ModeGPTMLPMixin, shrink_block
from .modegpt_config import PER_LAYER, Dense
from .modegpt_contract import check_engine, check_loading, check_parallelism, check_release
from .modegpt_family import Family
from .modegpt_files import one_set_of_weights, readable_weights, refuse


class ModeGPTModelMixin(Dense):
    """Extends a dense model class with blocks of the configuration's widths and with strict loading."""

    attention_class: ClassVar[type[ModeGPTAttentionMixin] | None] = None
    mlp_class: ClassVar[type[ModeGPTMLPMixin] | None] = None
    companion: ClassVar[Any] = None
    """Set when the package is imported: its additions to `save_pretrained` and `push_to_hub`."""
    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        check_loading()
        check_release(config.model_type, self.config_class.family.since)
        adds_to_scores = self.attention_class is not None and self.attention_class.adds_to_scores(config)
        check_engine(config, self.config_class.family, adds_to_scores)
        positions = self.config_class.family.attention.positions
        for index, widths in enumerate(config.widths()):  # checked here, before anything is allocated
            if positions.pairs != "none" and positions.layer_flag is None and widths.qk % 2:
                raise ValueError(
                    f"config.json: per_layer_config[{index}].qk_head_dim is {widths.qk}; rotary pairs need an even one."
                )
        super().__init__(config, *args, **kwargs)

    def post_init(self) -> None:
        """Narrow the blocks that the dense constructor has just built, then initialise as every model does."""
        # An inner compressed model has narrowed its blocks itself.
        if not any(isinstance(module, ModeGPTModelMixin) for module in self.modules() if module is not self):
            blocks: Any = self.base_model.get_submodule(self.config_class.family.blocks)
            for block, widths in zip(blocks, self.config.widths(), strict=True):
                shrink_block(block, type(self), self.config.get_text_config(), widths)
        super().post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Return whether the experts have fast kernels, which transformers finds in the source of the dense class."""
        return cls.__bases__[-1]._can_set_experts_implementation()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as every model does, but refuse a checkpoint that does not fit instead of filling it with noise.

        Missing tensors and wrong shapes in the base model or the language model's head are refused, as are unexpected
        tensors in the base model. A new task head may be initialised, and one that the class lacks is ignored. Weights
        are read from safetensors only. Tensor parallelism is refused, because it would split the heads but not
        `rope_index`.
        """
        check_parallelism(kwargs)
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
    kept = body | {model.config_class.family.head.output}
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
    attention_class: type[ModeGPTAttentionMixin] | None = None,
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
    for part in (attention_class, mlp_class):
        # A model with a text tower has the attention of the tower's family, which has been registered before.
        if part is not None and "family" not in vars(part):
            part.family = family
    PER_LAYER.update(family.width_names)
    if not config_class.__module__.startswith("transformers_modules."):
        # Not for remote code, because AutoConfig would use the code of one repository for all others of the family.
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto, model in models.items():
        model.config_class, model.attention_class, model.mlp_class = config_class, attention_class, mlp_class
        model._auto_class = auto
        getattr(transformers, auto).register(config_class, model, exist_ok=True)
    return models
