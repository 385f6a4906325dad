"""Check the files of a compressed model: possible sizes in config.json, and weights as safetensors only.

This file is also remote code: it is copied next to the weights. It imports only torch and transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

HUB_ARGUMENTS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")
"""The arguments of a `from_pretrained` that choose the files of the Hub."""
SIZE_LIMIT = 2**30
"""Far above every real size. The bytes of a matrix of two such sizes still fit in 64 bits."""
LISTED_LIMITS = {"num_hidden_layers": 2**12, "num_labels": 2**20}
"""Limits of sizes for which reading a configuration creates lists in memory."""
SIZES = (
    *LISTED_LIMITS,
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def check_sizes(values: Mapping[str, Any], more: Iterable[str] = (), names: Mapping[str, str] | None = None) -> None:
    """Check the sizes of a configuration. Sizes that are absent or None are not checked.

    `more` are the sizes that only the model's family has. `names` maps a size to its name in `values`.

    Raises:
        ValueError: a size is no integer, below 1 or absurdly large, or the heads do not fall into groups.
    """
    values = {name: values.get((names or {}).get(name, name)) for name in (*SIZES, *more)}
    for name, size in values.items():
        limit = LISTED_LIMITS.get(name, SIZE_LIMIT)
        if size is not None and (type(size) is not int or not 1 <= size <= limit):
            raise ValueError(f"config.json: {name} is {size!r}; expected an integer in [1, {limit}].")
    heads, groups = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if heads is not None and groups is not None and heads % groups:
        raise ValueError(
            f"config.json: num_attention_heads is {heads}; expected a multiple of num_key_value_heads, {groups}."
        )


def whole_name(variant: str | None = None) -> str:
    """Return the name of weights that are in one file."""
    return f"model.{variant}.safetensors" if variant else "model.safetensors"


def index_name(variant: str | None = None) -> str:
    """Return the name of the index of weights that are in several files."""
    return f"model.safetensors.index.{variant}.json" if variant else "model.safetensors.index.json"


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Return the safetensors files that transformers reads from a local folder. There may be none.

    Raises:
        ValueError: the index cannot be read, or names something else than a safetensors file of its folder.
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
    """Return the names in an index, in order."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        names: list[Any] = sorted({*content["weight_map"].values(), *([] if "metadata" in content else ["metadata"])})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of safetensors files ({error}). Save or download it again.") from error
    for name in names:
        # A path could lead out of the folder, and another kind of file would be opened as a pickle.
        if not isinstance(name, str) or not name.endswith(".safetensors") or {"/", "\\", ":"} & set(name):
            raise ValueError(f"{index} names {name!r}; expected safetensors files of its own folder.")
    return names


def refuse(model: Any, problems: list[str]) -> None:
    """Raise an error if there are problems with the checkpoint of `model`. It lists the first 20.

    Raises:
        ValueError: with the problems and a remedy.
    """
    if problems:
        more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(
            f"{type(model).__name__}: the checkpoint does not fit its configuration; part of the model would be "
            "noise:\n  "
            + "\n  ".join(problems[:20])
            + f"{more}\nThe folder is incomplete or was edited; save or download it again."
        )


@contextmanager
def readable_weights(name: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Refuse weights that cannot be read, during a `from_pretrained` of this name and these arguments.

    Raises:
        ValueError: the weights are pickles, outside their folder, cut off or damaged.
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
    """Refuse a local folder whose weights are pickles, outside it, cut off or damaged, before they are loaded."""
    from transformers.modeling_utils import load_state_dict  # takes seconds to import

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
    """Refuse a model of the Hub whose index leads out of the repository. transformers reports other errors."""
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
    """Remove weights of a former save, which would be read instead of these, during a save.

    transformers removes shards, but neither their index nor a single file, which has precedence over an index.
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
