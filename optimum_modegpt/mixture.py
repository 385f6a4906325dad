"""Tell a mixture of sources from a list of texts, and divide the windows among the sources.

A mapping from sources to numbers is a mixture, and so is a list if one of its items is a source: a name, a path, a list
of texts, or an object of the library datasets. A name is a short name, a Hub id of the form owner/name, an existing
file or folder, or a file name with a supported suffix. Imports neither torch nor datasets.
"""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from optimum_modegpt.errors import InvalidConfig

SELF = "self"
"""The name of text that is sampled from the dense model itself."""
SHORT_NAMES = ("wikitext2", "c4", "alpaca", "demo", SELF)
FILES = (".txt", ".jsonl", ".json", ".parquet")
OWNED_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
LONGEST_NAME = 1024
"""Maximum characters of a string that may be a path. Longer strings are texts."""


@dataclass(frozen=True)
class Weighted:
    """A source of a mixture, and its weight relative to those of the others."""

    source: Any
    weight: float


def with_weights(dataset: Any) -> Any:
    """Return a mixture of names as a dict of their weights. Other datasets are returned unchanged.

    A list of names is read only once, because whether it is a mixture depends on the files that exist.

    Raises:
        InvalidConfig: a list contains names and texts, a source is listed twice, or a weight is invalid.
    """
    if _gives_weights(dataset):
        return _checked(dataset)
    if not isinstance(dataset, list | tuple) or not _lists_sources(dataset):
        return dataset
    names = [os.fspath(item) for item in dataset if isinstance(item, str | os.PathLike)]
    for name in names:
        if names.count(name) > 1:
            raise InvalidConfig(f"dataset lists {name!r} twice. Write weights instead: {{{name!r}: 2, ...}}.")
    return dict.fromkeys(names, 1.0) if len(names) == len(dataset) else dataset


def mixture_of(dataset: Any) -> list[Weighted]:
    """Return the sources of a dataset that have a positive weight. A dataset that is no mixture is a single source.

    Errors are those of `with_weights`.
    """
    found = with_weights(dataset)
    if isinstance(found, Mapping) and _gives_weights(found):
        parts = [Weighted(name, weight) for name, weight in found.items() if weight > 0]
        # config.json sorts the keys of a mapping, so their order must not matter.
        return sorted(parts, key=lambda part: (-part.weight, part.source))
    if isinstance(found, list | tuple) and _lists_sources(found):
        return [Weighted(source, 1.0) for source in found]
    return [Weighted(found, 1.0)]


def names_of(dataset: Any) -> list[str]:
    """Return the names and paths of the sources of a dataset. In-memory sources have none."""
    sources = [part.source for part in mixture_of(dataset)]
    return [os.fspath(source) for source in sources if isinstance(source, str | os.PathLike)]


def without_folders(dataset: Any) -> Any:
    """Return a name, a list of names or the weights of names, with only the last part of the paths that exist."""
    if isinstance(dataset, Mapping):
        weights: dict[str, Any] = {}
        for name, weight in dataset.items():
            last = without_folders(name)
            weights[last] = weights.get(last, 0) + weight  # two files in different folders may have the same name
        return weights
    if isinstance(dataset, list):
        return list(map(without_folders, dataset))
    return Path(os.path.abspath(dataset)).name if os.path.exists(dataset) else dataset


def divide(weights: Sequence[float], windows: int) -> list[int]:
    """Divide `windows` in proportion to the weights by largest remainders. Each share is at least one window.

    Raises:
        InvalidConfig: the windows are fewer than the sources.
    """
    if windows < len(weights):
        raise InvalidConfig(
            f"num_samples={windows} is too small for {len(weights)} sources; each needs at least one window."
        )
    quotas = [windows * weight / sum(weights) for weight in weights]
    shares = [max(1, math.floor(quota)) for quota in quotas]
    while sum(shares) < windows:
        shares[_largest([quota - share for quota, share in zip(quotas, shares, strict=True)])] += 1
    while sum(shares) > windows:
        excess = [share - quota if share > 1 else -math.inf for quota, share in zip(quotas, shares, strict=True)]
        shares[_largest(excess)] -= 1
    return shares


def interleave(shares: Sequence[int]) -> list[int]:
    """Return the source of each window in order: first one of each source, then always the source that lags most.

    Any first windows therefore contain the sources in proportion to their shares, as far as whole windows allow.
    """
    order, taken, total = list(range(len(shares))), [1] * len(shares), sum(shares)
    while len(order) < total:
        lag = [share * (len(order) + 1) / total - count for share, count in zip(shares, taken, strict=True)]
        source = _largest(lag)
        order.append(source)
        taken[source] += 1
    return order


def _gives_weights(dataset: Any) -> bool:
    if not isinstance(dataset, Mapping) or "input_ids" in dataset:
        return False
    return any(map(_is_number, dataset.values()))


def _checked(weights: Mapping[Any, Any]) -> dict[str, float]:
    """Return the weights by name. Raise if one of them is invalid, or if none is positive."""
    found: dict[str, float] = {}
    for name, weight in weights.items():
        if not isinstance(name, str | os.PathLike):
            raise InvalidConfig(f"dataset: only names and paths can have a weight, found {type(name).__name__}.")
        if not _is_number(weight) or not 0 <= weight < math.inf:
            raise InvalidConfig(
                f"dataset: the weight of {str(name)!r} must be a number of at least 0, found {weight!r}."
            )
        found[os.fspath(name)] = float(weight)
    if not any(found.values()):
        raise InvalidConfig(f"dataset={found!r}: at least one weight must be positive.")
    return found


def _lists_sources(items: Sequence[Any]) -> bool:
    """Return whether a list is a mixture. Raise if it contains sources and texts."""
    sources = list(filter(_is_source, items))
    texts = [item for item in items if isinstance(item, str) and not _is_source(item)]
    if sources and texts:
        source, text = shorten(str(sources[0]), 60), shorten(texts[0], 60)
        raise InvalidConfig(
            f"dataset is a list in which {source!r} is a source, and {text!r} is not the name of one. "
            "To mix sources, give each name a weight, as in {'c4': 1, 'my_text.txt': 1}; a file or folder must exist. "
            "To calibrate on texts, put their list into a list: dataset=[texts]."
        )
    return bool(sources)


def _is_source(item: Any) -> bool:
    if isinstance(item, str):
        return _is_name(item)
    if isinstance(item, list | tuple):
        return len(item) > 0 and all(isinstance(part, str) for part in item)
    # Recognised by its module, because importing datasets takes seconds.
    return isinstance(item, os.PathLike) or type(item).__module__.partition(".")[0] == "datasets"


def _is_name(text: str) -> bool:
    if text in SHORT_NAMES:
        return True
    if not text or len(text) > LONGEST_NAME or "\n" in text:
        return False
    has_suffix = Path(text).suffix.lower() in FILES
    return has_suffix or bool(OWNED_ID.fullmatch(text)) or os.path.exists(os.path.expanduser(text))


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _largest(values: Sequence[float]) -> int:
    """Return the index of the largest value, the first one of equal values."""
    return max(range(len(values)), key=values.__getitem__)
