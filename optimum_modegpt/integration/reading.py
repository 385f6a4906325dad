"""Reads models for the commands: every way in which a checkpoint can be broken ends in one message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

from optimum_modegpt.errors import InvalidConfig, ModeGPTError, UnsupportedModel
from optimum_modegpt.integration.source import Source
from optimum_modegpt.modeling.modegpt_files import check_sizes, weight_files

NO_WEIGHTS = (
    "\nA model is config.json with model.safetensors, or with shards and their index. Save or download it again."
)


@contextmanager
def readable(source: Source) -> Iterator[None]:
    """Whatever transformers raises inside for a model that is broken or edited becomes one message.

    Raises:
        UnsupportedModel: with the model and the reason.
    """
    try:
        yield
    except (ModeGPTError, OSError, ImportError, torch.OutOfMemoryError):
        raise
    except SafetensorError as error:
        raise UnsupportedModel(
            f"{source.name!r} cannot be loaded: weights are cut off or damaged ({error}). Save or download it again."
        ) from error
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UnsupportedModel(f"{source.name!r} cannot be loaded: {reason}") from error


def load_config(source: Source) -> Any:
    """The configuration of a model.

    Raises:
        OSError: it cannot be found or reached.
        UnsupportedModel: transformers does not know it, or it was edited into something that is none.
    """
    source.check_path()
    try:
        with readable(source):
            # Before transformers makes anything of them: some families list their blocks as they are read.
            check_sizes(PreTrainedConfig.get_config_dict(source.path, **source.arguments())[0])
            config = AutoConfig.from_pretrained(source.path, **source.arguments())
    except OSError as error:
        found = (
            "has no readable config.json"
            if Path(source.path).is_dir()
            else "is no folder here and could not be read from the Hub"
        )
        raise OSError(f"{source.name!r} {found}: {error}") from error
    if getattr(config, "modegpt", None) is not None and not config.model_type.startswith("modegpt_"):
        raise UnsupportedModel(
            f"{source.name!r}: config.json was edited. It has the record of a compressed model, but model_type "
            f"{config.model_type!r} in place of one that starts with modegpt_. Save or download it again."
        )
    return config


def load_model(source: Source, dtype: str) -> Any:
    """A causal language model, in the memory of the host.

    Raises:
        OSError: its weights cannot be found or reached.
        UnsupportedModel: it is none, or its files do not fit together.
    """
    logging.set_verbosity_error()
    source.check_path()
    with readable(source):
        weight_files(Path(source.path))  # an index that leads out of its folder is refused
        try:
            return AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype, **source.arguments())
        except OSError as error:
            raise OSError(f"the weights of {source.name!r} could not be read: {error}{NO_WEIGHTS}") from error


def pick_device(name: str) -> torch.device | None:
    """The device of this name; None for "auto", which leaves the choice to `stages.compute_device`.

    Raises:
        InvalidConfig: for a name that torch does not know, a device that is not there, or one that holds no numbers.
    """
    if name == "auto":
        return None
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidConfig(f"--device {name} cannot be used: {reason}. --device auto takes what is there.") from error
    if device.type == "meta" or (device.type == "cpu" and device.index):
        reason = "it holds no numbers" if device.type == "meta" else "there is one cpu, without a number"
        raise InvalidConfig(f"--device {name} cannot be used: {reason}. --device auto takes what is there.")
    return device
