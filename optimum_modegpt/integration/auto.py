"""Compress a model while it is loaded, through the arguments of transformers or a class without a patched keyword."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from optimum_modegpt.errors import InvalidConfig
from optimum_modegpt.integration.hf_quantizer import kept_in
from optimum_modegpt.integration.quantizer import as_config
from optimum_modegpt.loading.source import Source, default_dataset, loading
from optimum_modegpt.modeling.modegpt_family import is_compressed
from optimum_modegpt.walk.checkpoint import Checkpoint


def with_quantization_config(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a `from_pretrained` with `compression_config` renamed to `quantization_config`.

    Raises:
        InvalidConfig: both keywords are given.
    """
    rest = {key: value for key, value in arguments.items() if key != "compression_config"}
    config = arguments.get("compression_config")
    if config is None:
        return rest
    if rest.get("quantization_config") is not None:
        raise InvalidConfig(
            "found both compression_config and quantization_config. To compress and quantise, compress and save "
            "first, then load the result with quantization_config."
        )
    return {**rest, "quantization_config": as_config(config)}


class ModeGPTModelForCausalLM:
    """A class that loads compressed language models, or compresses dense ones on loading, without a patched keyword."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        compression_config: Any = None,
        checkpoint: Checkpoint | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Load or create a compressed model.

        Args:
            pretrained_model_name_or_path: name or folder; "demo" is the embedded dense model, whose own text then
                replaces the default dataset.
            args: passed on to `AutoModelForCausalLM.from_pretrained`.
            compression_config: a `ModeGPTConfig` or a dict of its fields, for a dense model; None for a compressed one.
            checkpoint: folder for finished blocks, from which an interrupted run is resumed. With a checkpoint, a model
                may be larger than memory. The result keeps its weights there: call `checkpoint.remove()` after the
                result is saved.
            kwargs: passed on to `AutoModelForCausalLM.from_pretrained`.

        Raises:
            InvalidConfig: the model is dense and `compression_config` is missing, or it is compressed and a checkpoint
                is given.
            AlreadyCompressed: the model is compressed and `compression_config` is given.
            CheckpointError: the checkpoint belongs to another compression, is in use, or cannot be written.
        """
        source = Source.of_arguments(pretrained_model_name_or_path, kwargs)
        if compression_config is None:
            _check_compressed(source)
            if checkpoint is not None:
                raise InvalidConfig("found a checkpoint for a compressed model; checkpoints are only for compressions.")
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
