"""Load models strictly: broken or incomplete weights are refused with one message."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.utils import logging as transformers_logging
from transformers.utils.peft_utils import find_adapter_config_file

from optimum_modegpt.errors import InvalidConfig, ModeGPTError, UnsupportedModel
from optimum_modegpt.layouts.records import is_result
from optimum_modegpt.loading.source import Source
from optimum_modegpt.modeling.modegpt_files import check_sizes, refuse, weight_files

logger = logging.getLogger(__name__)

MOST_NAMES = 5
"""Maximum number of ignored tensors that a warning names."""
NO_WEIGHTS = (
    "\nExpected config.json with model.safetensors, or with shards and their index. Save or download the model again."
)


@contextmanager
def readable(source: Source) -> Iterator[None]:
    """Report any error of transformers for a broken or edited model as one message.

    Raises:
        UnsupportedModel: the model cannot be loaded; the message names it and the reason.
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
    """Load the configuration of a model.

    Raises:
        OSError: the configuration cannot be found or reached.
        UnsupportedModel: transformers does not know the model, or its configuration was edited and is invalid.
    """
    source.check_path()
    try:
        with readable(source):
            # Checked before transformers uses the sizes: some families build a list of blocks while they are read.
            values = PreTrainedConfig.get_config_dict(source.path, **source.arguments())[0]
            check_sizes(values)
            config = AutoConfig.from_pretrained(source.path, **source.arguments())
    except OSError as error:
        found = "is not a local folder and could not be read from the Hub"
        if Path(source.path).is_dir():
            found = "has no readable config.json"
        raise OSError(f"{source.name!r} {found}: {error}{source.cache_report()}") from error
    if _has_widths(values) and not is_result(values):
        raise UnsupportedModel(
            f"{source.name!r}: config.json was edited. It has the record of a compressed model, but model_type "
            f"{config.model_type!r} instead of one that starts with modegpt_. Save or download it again."
        )
    return _of_language_model(config)


def _has_widths(values: dict[str, Any]) -> bool:
    """Return whether a configuration is that of a compressed class: it has a record, and widths for every block.

    A model that only lost whole experts has a record too, but stays one of its dense class.
    """
    text = values.get("text_config") or {}
    return "modegpt" in values and any("per_layer_config" in each for each in (values, text))


def _of_language_model(config: Any) -> Any:
    """Return the configuration of the model that `AutoModelForCausalLM` loads: of some composite ones, a part."""
    text = config.get_text_config()
    if text is config or type(config) not in AutoModelForCausalLM._model_mapping:
        return config
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    return text if getattr(model_class, "config_class", None) is type(text) else config


def auto_class_of(config: Any) -> Any:
    """Return the Auto class that loads the language model of a configuration, alone or with its vision tower."""
    has_images = type(config) in AutoModelForImageTextToText._model_mapping
    has_images = has_images and type(config) not in AutoModelForCausalLM._model_mapping
    return AutoModelForImageTextToText if has_images else AutoModelForCausalLM


def load_model(source: Source, dtype: str) -> Any:
    """Load a causal language model into host memory, with every tensor read from its weight files.

    Raises:
        OSError: the weights cannot be found or reached.
        UnsupportedModel: the model is not a causal language model, or tensors are missing or have wrong shapes.
    """
    transformers_logging.set_verbosity_error()
    source.check_path()
    is_adapter = find_adapter_config_file(source.path, **source.hub) is not None  # it names the model below it
    auto_class = AutoModelForCausalLM if is_adapter else auto_class_of(load_config(source))
    with readable(source):
        weight_files(Path(source.path))  # refuses an index that points outside its folder
        try:
            # Tensors of the wrong shape are accepted here, so that `check_loaded` can name all of them.
            loaded: Any = auto_class.from_pretrained(
                source.path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **source.arguments()
            )
        except OSError as error:
            advice = source.cache_report() or NO_WEIGHTS
            raise OSError(f"the weights of {source.name!r} could not be read: {error}{advice}") from error
    model, info = loaded
    check_loaded(source, model, info["missing_keys"], info["mismatched_keys"])
    if unexpected := sorted(info["unexpected_keys"]):
        names = ", ".join(unexpected[:MOST_NAMES])
        if len(unexpected) > MOST_NAMES:
            names += f" and {len(unexpected) - MOST_NAMES} more"
        logger.warning(
            "%r has tensors that %s does not use; they are ignored: %s.", source.name, type(model).__name__, names
        )
    return model


def check_loaded(
    source: Source,
    model: Any,
    missing: Iterable[str] = (),
    mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]] = (),
) -> None:
    """Raise an error if transformers initialised tensors of a model at random because its weight files lack them.

    transformers marks every parameter that it has read. The marks also cover the model below an adapter, and are
    available inside `from_pretrained`, unlike `missing` and `mismatched` (name, shape in the file, shape in the model)
    of the loading report.

    Raises:
        UnsupportedModel: tensors are missing or have wrong shapes; the message names them.
    """
    absent, wrong = set(missing), []
    for name, parameter in model.named_parameters():
        if not getattr(parameter, "_is_hf_initialized", False):
            absent.add(name)
    for name, found, expected in sorted(mismatched):
        absent.discard(name)
        wrong.append(f"wrong shape: {name} is {tuple(found)}, the configuration says {tuple(expected)}")
    problems = [f"missing: {name}" for name in sorted(absent)] + wrong
    with readable(source):
        refuse(model, problems)


def pick_device(name: str) -> torch.device | None:
    """Return the device of this name; None for "auto", which leaves the choice to `stages.compute_device`.

    Raises:
        InvalidConfig: the name is unknown to torch, or the device is not available or stores no values.
    """
    if name == "auto":
        return None
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it stores no values")
        if device.type == "cpu" and device.index:
            raise RuntimeError("the cpu has no index")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidConfig(f"--device {name} cannot be used: {reason}. Use --device auto to choose one.") from error
    return device
