"""Load models strictly: a checkpoint that is broken or incomplete is refused with one message."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from optimum_modegpt.errors import InvalidConfig, ModeGPTError, UnsupportedModel
from optimum_modegpt.integration.source import Source
from optimum_modegpt.modeling.modegpt_family import is_compressed
from optimum_modegpt.modeling.modegpt_files import check_sizes, refuse, weight_files

logger = logging.getLogger(__name__)

MOST_NAMES = 5
"""Of tensors that are ignored, in a warning of one line."""
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
        raise OSError(f"{source.name!r} {found}: {error}{source.cache_report()}") from error
    if getattr(config, "modegpt", None) is not None and not is_compressed(config.model_type):
        raise UnsupportedModel(
            f"{source.name!r}: config.json was edited. It has the record of a compressed model, but model_type "
            f"{config.model_type!r} in place of one that starts with modegpt_. Save or download it again."
        )
    return config


def load_model(source: Source, dtype: str) -> Any:
    """Load a causal language model into host memory, with every tensor read from its checkpoint.

    Raises:
        OSError: its weights cannot be found or reached.
        UnsupportedModel: it is no causal language model, or its checkpoint lacks tensors or has others of its shapes.
    """
    transformers_logging.set_verbosity_error()
    source.check_path()
    with readable(source):
        weight_files(Path(source.path))  # an index that leads out of its folder is refused
        try:
            # Tensors of the wrong shape are let through, so that `check_loaded` can name all of them.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **source.arguments()
            )
        except OSError as error:
            advice = source.cache_report() or NO_WEIGHTS
            raise OSError(f"the weights of {source.name!r} could not be read: {error}{advice}") from error
    model, info = loaded
    check_loaded(source, model, info["missing_keys"], info["mismatched_keys"])
    if unexpected := sorted(info["unexpected_keys"]):
        more = f" and {len(unexpected) - MOST_NAMES} more" if len(unexpected) > MOST_NAMES else ""
        logger.warning(
            "%r has tensors that %s does not use; they are ignored: %s%s.",
            source.name,
            type(model).__name__,
            ", ".join(unexpected[:MOST_NAMES]),
            more,
        )
    return model


def check_loaded(
    source: Source,
    model: Any,
    missing: Iterable[str] = (),
    mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]] = (),
) -> None:
    """Refuse a loaded model if transformers initialised tensors at random that its checkpoint lacks.

    transformers marks every parameter that it has read. The marks also tell of the model below an adapter, and inside
    `from_pretrained`, where the lists of its loading report are not available.

    Args:
        source: where the model comes from, for the message.
        model: as `from_pretrained` returns it.
        missing: `missing_keys` of the loading report.
        mismatched: `mismatched_keys` of the loading report: name, shape in the checkpoint, shape in the model.

    Raises:
        UnsupportedModel: with the names of the tensors.
    """
    shapes = {name: (tuple(found), tuple(expected)) for name, found, expected in mismatched}
    unread = (name for name, each in model.named_parameters() if not getattr(each, "_is_hf_initialized", False))
    problems = [f"missing: {name}" for name in sorted({*missing, *unread} - shapes.keys())]
    for name, (found, expected) in sorted(shapes.items()):
        problems.append(f"wrong shape: {name} is {found}, the configuration says {expected}")
    with readable(source):
        refuse(model, problems)


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
