"""Shapes of the tensors of a checkpoint, read from the headers of its safetensors files alone."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import NotASafetensorsRepoError
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from optimum_modegpt.errors import EvaluationError
from optimum_modegpt.evaluation.inspection import TensorHeader
from optimum_modegpt.integration.source import Source


def read_headers(source: Source) -> dict[str, TensorHeader]:
    """The tensors of a model by name.

    Raises:
        EvaluationError: the model has no readable safetensors.
    """
    folder = Path(source.path or "")
    try:
        return _local(folder) if folder.is_dir() else _remote(source)
    except (NotASafetensorsRepoError, SafetensorError, FileNotFoundError, KeyError, json.JSONDecodeError) as error:
        raise EvaluationError(f"{source.base_model!r} has no readable safetensors weights: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model in a folder, in the order of their names; they need not be there."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = {SAFE_WEIGHTS_NAME}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [folder / name for name in sorted(names)]


def weight_bytes(folder: Path) -> int | None:
    """Size of the safetensors files of the model in a folder; None where they are not there."""
    files = weight_files(folder)
    return sum(file.stat().st_size for file in files) if all(file.is_file() for file in files) else None


def _local(folder: Path) -> dict[str, TensorHeader]:
    found = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_slice(key)
                found[key] = TensorHeader(tensor.get_dtype(), tuple(tensor.get_shape()))
    return found


def _remote(source: Source) -> dict[str, TensorHeader]:
    api = HfApi(token=source.hub.get("token"))
    metadata = api.get_safetensors_metadata(str(source.path), revision=source.hub.get("revision"))
    return {
        name: TensorHeader(str(tensor.dtype), tuple(tensor.shape))
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
