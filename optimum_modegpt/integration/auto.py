"""Compression while a model is loaded: the arguments for transformers, and a class that needs no patched keyword."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from optimum_modegpt.checkpoint import Checkpoint
from optimum_modegpt.errors import InvalidConfig
from optimum_modegpt.integration.hf_quantizer import kept_in
from optimum_modegpt.integration.quantizer import as_config
from optimum_modegpt.integration.source import Source, default_dataset, loading
from optimum_modegpt.modeling.modegpt_family import is_compressed


def with_quantization_config(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a `from_pretrained` with `compression_config` in the place where transformers looks.

    Raises:
        InvalidConfig: when both keywords are given.
    """
    rest = {key: value for key, value in arguments.items() if key != "compression_config"}
    config = arguments.get("compression_config")
    if config is None:
        return rest
    if rest.get("quantization_config") is not None:
        raise InvalidConfig(
            "compression_config and quantization_config were both given. To compress and quantise, compress and save "
            "first, then load the result with quantization_config."
        )
    return {**rest, "quantization_config": as_config(config)}


class ModeGPTModelForCausalLM:
    """Loads compressed language models, or compresses dense ones while they are loaded; needs no patched keyword."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        compression_config: Any = None,
        checkpoint: Checkpoint | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """A compressed model.

        Args:
            pretrained_model_name_or_path: name or folder; "demo" is the embedded dense model, whose own text then
                stands in for the default dataset.
            args: handed on to `AutoModelForCausalLM.from_pretrained`.
            compression_config: a `ModeGPTConfig` or a dict of its fields, for a dense model; None for a compressed one.
            checkpoint: where finished blocks are written, and taken over from a run that was interrupted; with one a
                model may be larger than memory. The result keeps its weights there: `checkpoint.remove()` when it is
                saved.
            kwargs: handed on to `AutoModelForCausalLM.from_pretrained`.

        Raises:
            InvalidConfig: a dense model without `compression_config`, or a checkpoint for a compressed one.
            AlreadyCompressed: a compressed one with it.
            CheckpointError: the checkpoint is that of another compression, or in use, or cannot be written.
        """
        source = Source.of_arguments(pretrained_model_name_or_path, kwargs)
        if compression_config is None:
            _check_compressed(source)
            if checkpoint is not None:
                raise InvalidConfig("checkpoint keeps the work of a compression; a compressed model is only loaded.")
        else:
            compression_config = default_dataset(as_config(compression_config), source)
        arguments = with_quantization_config({**kwargs, "compression_config": compression_config})
        with loading(source), kept_in(checkpoint):
            return AutoModelForCausalLM.from_pretrained(source.path, *args, **arguments)


def _check_compressed(source: Source) -> None:
    model_type = AutoConfig.from_pretrained(source.path, **source.arguments()).model_type
    if not is_compressed(model_type):
        raise InvalidConfig(
            f"{source.base_model!r} is a dense model ({model_type}); pass compression_config=ModeGPTConfig(...) to "
            "compress it, or load it with AutoModelForCausalLM."
        )
