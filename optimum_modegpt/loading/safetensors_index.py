"""Read the types and shapes of a model's tensors from the headers of its safetensors files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import NotASafetensorsRepoError
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

from optimum_modegpt.errors import EvaluationError
from optimum_modegpt.evaluation.inspection import TensorHeader
from optimum_modegpt.loading.source import Source
from optimum_modegpt.modeling.modegpt_files import weight_files


def read_headers(source: Source) -> dict[str, TensorHeader]:
    """Return the headers of a model's tensors by name.

    Raises:
        EvaluationError: the model has no readable safetensors.
    """
    folder = Path(source.path or "")
    try:
        if folder.is_dir():
            return _local(folder)
        return _remote(source)
    except (NotASafetensorsRepoError, SafetensorError, FileNotFoundError, LookupError, ValueError) as error:
        raise EvaluationError(f"{source.base_model!r} has no readable safetensors weights: {error}") from error


def weight_bytes(folder: Path) -> int | None:
    """Return the size of the safetensors files of the model in a folder; None if it has none."""
    files = weight_files(folder)
    return sum(file.stat().st_size for file in files) if files else None


def stored_bytes(source: Source) -> int | None:
    """Return `weight_bytes` of a model that was loaded from a folder or through the cache of the Hub."""
    config = cached_file(source.path, CONFIG_NAME, **{**source.hub, "local_files_only": True})
    return None if config is None else weight_bytes(Path(config).parent)


def weights_digest(folder: Path) -> str | None:
    """Return the sha256 of names, types, shapes and values of the tensors in safetensors files; None without files.

    The digest does not depend on the distribution of the tensors over files.
    """
    found = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                values = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()
                found[name] = [str(tensor.dtype), list(tensor.shape), values]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest() if found else None


def _local(folder: Path) -> dict[str, TensorHeader]:
    found: dict[str, TensorHeader] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    tensor = file.get_slice(name)
                    found[name] = TensorHeader(tensor.get_dtype(), tuple(tensor.get_shape()))
        except SafetensorError as error:
            raise ValueError(f"{path} is cut off or damaged ({error}). Save or download it again.") from error
    if not found:
        raise FileNotFoundError(f"{folder} contains none, or they are empty.")
    return found


def _remote(source: Source) -> dict[str, TensorHeader]:
    api = HfApi(token=source.hub.get("token"))
    metadata = api.get_safetensors_metadata(str(source.path), revision=source.hub.get("revision"))
    found = {}
    for file in metadata.files_metadata.values():
        for name, tensor in file.tensors.items():
            found[name] = TensorHeader(str(tensor.dtype), tuple(tensor.shape))
    return found
