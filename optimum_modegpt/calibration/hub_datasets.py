"""Load datasets from the Hub or the local cache, and define short names for some of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import DatasetBuilder


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the Hub: its id, the subset to read, and whether to stream it, if it is too large to download."""

    path: str
    subset: str | None = None
    streamed: bool = False


@dataclass(frozen=True)
class CachedDataset:
    """A prepared copy in the local cache."""

    subset: str
    version: str
    revision: str
    """Commit on the Hub."""


HUB_DATASETS = {
    "wikitext2": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": HubDataset("allenai/c4", "en", streamed=True),
    "alpaca": HubDataset("tatsu-lab/alpaca"),
}
"""Short names. To use a folder or file of the same name, pass for example `./c4`."""
WITHOUT_HUB = (
    "Without the Hub, pass your own text as dataset (--dataset FILE on the command line): a local .txt, .jsonl, "
    ".json or .parquet file, or a folder. In Python, you can also pass a list of strings or of conversations, a "
    "datasets.Dataset, or token ids."
)


def open_builder(dataset: HubDataset, hub: Mapping[str, Any]) -> DatasetBuilder:
    """Return the builder of a dataset from the Hub, or only from the cache if `hub` has `local_files_only`.

    Raises:
        FileNotFoundError: the requested revision is not in the cache, and the Hub is unreachable.
    """
    from datasets import load_dataset_builder
    from datasets.packaged_modules.cache.cache import Cache

    if hub.get("local_files_only"):
        return _cached_builder(dataset, hub)
    builder = load_dataset_builder(
        dataset.path,
        dataset.subset,
        cache_dir=hub.get("cache_dir"),
        revision=hub.get("revision"),
        token=hub.get("token"),
    )
    # Without a connection, datasets falls back to its newest copy, regardless of the requested revision.
    return _cached_builder(dataset, hub) if isinstance(builder, Cache) and hub.get("revision") else builder


def describe(dataset: HubDataset, split: str | None, hub: Mapping[str, Any]) -> str:
    """Describe the dataset and its source for messages."""
    parts = {"subset": dataset.subset, "split": split, "revision": hub.get("revision")}
    details = ", ".join(f"{key} {value}" for key, value in parts.items() if value is not None)
    place = "from the local cache" if hub.get("local_files_only") else "from the Hub"
    return f"{dataset.path}{f' ({details})' if details else ''}, read {place},"


def advise(dataset: HubDataset, hub: Mapping[str, Any]) -> str:
    """Describe the cached copies of a dataset, and the environment variables that select another cache or the Hub."""
    from datasets import config
    from huggingface_hub import constants

    found = ", ".join(f"subset {one.subset} at revision {one.revision}" for one in _cached(dataset, hub))
    sentences = [f"The cache {_cache_folder(hub)} has {found or 'nothing'} of {dataset.path}."]
    caches = {"HF_DATASETS_CACHE": _cache_folder(hub), "HF_HUB_CACHE": Path(constants.HF_HUB_CACHE)}
    if blocked := {name: folder for name, folder in caches.items() if not _can_be_written(folder)}:
        folders = " and ".join(f"{folder} ({name})" for name, folder in blocked.items())
        sentences.append(
            f"{folders} cannot be written: set {' and '.join(blocked)} to a writable folder, or to a writable copy."
        )
    else:
        sentences.append("To use another cache, set HF_DATASETS_CACHE, or HF_HOME for all caches.")
    if config.HF_HUB_OFFLINE:
        sentences.append("HF_HUB_OFFLINE is set; unset it to download datasets.")
    return " ".join((*sentences, WITHOUT_HUB))


def _cached_builder(dataset: HubDataset, hub: Mapping[str, Any]) -> DatasetBuilder:
    """Return the builder of the cached copy of the requested revision, or of the newest copy."""
    from datasets.packaged_modules.cache.cache import Cache

    subset, version, revision = dataset.subset, "auto", "auto"
    if hub.get("revision"):
        copies = [one for one in _cached(dataset, hub) if one.revision == hub["revision"]]
        copies = [one for one in copies if dataset.subset in (None, one.subset)]
        if not copies:
            raise FileNotFoundError(f"revision {hub['revision']} is not in the cache; without the Hub, pass a commit.")
        subset, version, revision = copies[0].subset, copies[0].version, copies[0].revision
    return Cache(
        repo_id=dataset.path,
        dataset_name=dataset.path.split("/")[-1],
        config_name=subset,
        cache_dir=hub.get("cache_dir"),
        version=version,
        hash=revision,
    )


def _cached(dataset: HubDataset, hub: Mapping[str, Any]) -> list[CachedDataset]:
    from datasets.naming import camelcase_to_snakecase

    *owner, name = dataset.path.split("/")
    folder = _cache_folder(hub) / "___".join((*owner, camelcase_to_snakecase(name)))
    return [CachedDataset(*place.parts[-3:]) for place in sorted(folder.glob("*/*/*")) if place.is_dir()]


def _cache_folder(hub: Mapping[str, Any]) -> Path:
    from datasets import config

    return Path(os.path.expanduser(hub.get("cache_dir") or config.HF_DATASETS_CACHE))


def _can_be_written(folder: Path) -> bool:
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
