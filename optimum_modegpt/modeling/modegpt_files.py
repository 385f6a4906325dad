"""The weight files of a compressed model: safetensors and nothing else, whole, and one set of them in a folder.

This file is also remote code: it is copied beside the weights and must import nothing but torch and transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.modeling_utils import load_state_dict
from transformers.utils.hub import cached_file

HUB_ARGUMENTS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")
"""The arguments of a `from_pretrained` that say which files of the Hub are meant."""


def whole_name(variant: str | None = None) -> str:
    """The name of weights that are in one file."""
    return f"model.{variant}.safetensors" if variant else "model.safetensors"


def index_name(variant: str | None = None) -> str:
    """The name of the file that says which weights are in which of several files."""
    return f"model.safetensors.index.{variant}.json" if variant else "model.safetensors.index.json"


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files that transformers reads from a local folder; none where it holds no safetensors.

    Raises:
        ValueError: the index cannot be read, or names what is no safetensors file of its folder.
    """
    whole, index = folder / whole_name(variant), folder / index_name(variant)
    if whole.is_file() or not index.is_file():
        return [whole] if whole.is_file() else []
    names = _shards(index)
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{index} names {name}, which is not there. Save or download the model again.")
    return [folder / name for name in names]


def _shards(index: Path) -> list[str]:
    """The names in an index, in order."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        names: list[Any] = sorted({*content["weight_map"].values(), *([] if "metadata" in content else ["metadata"])})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of safetensors files ({error}). Save or download it again.") from error
    for name in names:
        # A path would lead out of the folder, and any other kind of file would be opened as a pickle.
        if not isinstance(name, str) or not name.endswith(".safetensors") or {"/", "\\", ":"} & set(name):
            raise ValueError(f"{index} names {name!r}; expected safetensors files of its own folder.")
    return names


@contextmanager
def readable_weights(name: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Around a `from_pretrained` of this name and these arguments: weights that cannot be read are refused by name.

    Raises:
        ValueError: they are pickles, led astray, cut off or damaged.
    """
    folder, variant = Path(str(name), arguments.get("subfolder") or ""), arguments.get("variant")
    if folder.is_dir():
        _check_folder(folder, variant)
    elif name is not None and not folder.is_file():
        _check_index(str(name), variant, {key: arguments[key] for key in HUB_ARGUMENTS if key in arguments})
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # of a package that remote code must not import
            raise
        raise ValueError(
            f"the weights of {str(name)!r} are cut off or damaged ({error}). Download them again with "
            "force_download=True; where that does not help, they were uploaded like this."
        ) from error


def _check_folder(folder: Path, variant: str | None) -> None:
    """Refuses a local folder whose weights are pickles, led astray, cut off or damaged, before they are loaded."""
    files = weight_files(folder, variant)
    if not files and (pickles := sorted(path.name for path in folder.glob("pytorch_model*.bin*"))):
        raise ValueError(
            f"{folder} has no safetensors but {', '.join(pickles)}. A pickle can run code, so the weights of a "
            "compressed model are read from safetensors only."
        )
    for file in files:
        try:
            load_state_dict(file, map_location="meta")
        except Exception as error:
            raise ValueError(f"{file} is cut off or damaged ({error}). Save or download it again.") from error


def _check_index(repo: str, variant: str | None, hub: dict[str, Any]) -> None:
    """Refuses a model of the Hub whose index leads astray; that it has none, or is not there, transformers says."""
    index = cached_file(
        repo,
        index_name(variant),
        **hub,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if index is not None:
        _shards(Path(index))


@contextmanager
def one_set_of_weights(folder: Any, variant: str | None = None) -> Iterator[None]:
    """Around a save: afterwards the folder has no weights of a former one, which would be read in place of these.

    transformers removes shards, but not their index, and not the one file, which has precedence over an index.
    """
    whole, index = Path(folder, whole_name(variant)), Path(folder, index_name(variant))
    former = index.read_bytes() if index.is_file() else None
    index.unlink(missing_ok=True)
    try:
        yield
    except BaseException:
        if former is not None and not index.exists():
            index.write_bytes(former)
        raise
    if index.exists():
        whole.unlink(missing_ok=True)
