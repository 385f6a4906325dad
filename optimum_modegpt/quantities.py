"""Read and write sizes such as 4GB and numbers of parameters such as 1.2B, and write the names of dtypes.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from optimum_modegpt.errors import InvalidConfig

DECIMAL_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BYTES = DECIMAL_BYTES | {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def read_bytes(name: str, value: Any) -> int:
    """Return the number of bytes that the field `name` gives, as a number or as text such as "4GB" or "1.5GiB".

    Raises:
        InvalidConfig: it is neither, or less than 1.
    """
    return _read(name, value, BYTES | {"": 1}, 'bytes, or a size such as "4GB", "500MB" or "1.5GiB"')


def read_count(name: str, value: Any) -> int:
    """Return the number that the field `name` gives, as a number or as text such as "500M" or "1.2B".

    Raises:
        InvalidConfig: it is neither, or less than 1.
    """
    return _read(name, value, COUNTS, 'a number such as 1200000000, "500M" or "1.2B"')


def written_bytes(size: float) -> str:
    """Return bytes with 4 digits, such as "4.125 GB" (10^9 bytes)."""
    return _written(size, DECIMAL_BYTES, " ")


def written_count(number: float) -> str:
    """Return a number with 4 digits, such as "1.235B" (10^9)."""
    return _written(number, COUNTS, "")


def _read(name: str, value: Any, units: Mapping[str, int], expected: str) -> int:
    by_name = {unit.lower(): factor for unit, factor in units.items()}
    found = 0.0
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-zA-Z]*)\s*", value)
        if match is not None and match[2].lower() in by_name:
            found = Decimal(match[1]) * by_name[match[2].lower()]
    elif isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
        found = value
    if found < 1:
        raise InvalidConfig(f"{name} must be {expected}, found {value!r}.")
    return int(found)  # pyright: ignore[reportArgumentType]


def _written(number: float, units: Mapping[str, int], space: str) -> str:
    ordered = list(units.items())
    unit, factor = next(((u, f) for u, f in reversed(ordered) if number >= f), ordered[0])
    return f"{number / factor:.4g}{space}{unit}"


def dtype_name(dtype: Any) -> str:
    """Return the name of a torch dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
