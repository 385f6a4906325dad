"""Compress a model while it is loaded, through the arguments of transformers or a class without a patched keyword."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from optimum_modegpt.config import as_config
from optimum_modegpt.errors import InvalidConfig
from optimum_modegpt.integration.job import Job
from optimum_modegpt.layouts.records import is_result
from optimum_modegpt.loading.source import Source, default_dataset
from optimum_modegpt.walk.checkpoint import Checkpoint


def requested_job(name: Any, compression_config: Any, arguments: Mapping[str, Any]) -> Job:
    """Return the job that the arguments of a `from_pretrained` request by either keyword.

    Raises:
        InvalidConfig: both keywords are given, or the configuration is invalid.
    """
    quantization_config = arguments.get("quantization_config")
    if compression_config is None:
        compression_config = quantization_config
    elif quantization_config is not None:
        raise InvalidConfig(
            "found both compression_config and quantization_config. To compress and quantise, compress and save "
            "first, then load the result with quantization_config."
        )
    return Job(as_config(compression_config), Source.of_arguments(name, arguments))


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
        if compression_config is None:
            source = Source.of_arguments(pretrained_model_name_or_path, kwargs)
            _check_compressed(source)
            if checkpoint is not None:
                raise InvalidConfig("found a checkpoint for a compressed model; checkpoints are only for compressions.")
            return AutoModelForCausalLM.from_pretrained(source.path, *args, **kwargs)
        job = requested_job(pretrained_model_name_or_path, compression_config, kwargs)
        job = replace(job, config=default_dataset(job.config, job.source), checkpoint=checkpoint)
        kwargs["quantization_config"] = job.config
        with job.running():
            return AutoModelForCausalLM.from_pretrained(job.source.path, *args, **kwargs)


def _check_compressed(source: Source) -> None:
    config = AutoConfig.from_pretrained(source.path, **source.arguments())
    if not is_result(config):
        raise InvalidConfig(
            f"{source.base_model!r} is a dense model ({config.model_type}); pass compression_config=ModeGPTConfig(...) "
            "to compress it, or load it with AutoModelForCausalLM."
        )
