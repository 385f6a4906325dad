"""Make the table of families in `.github/docs/families.md` from their descriptions.

python .github/families_table.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from optimum_modegpt.architectures import FamilyClasses, family_of
from optimum_modegpt.architectures.refused import REFUSED
from optimum_modegpt.modeling import DENSE_TYPES
from optimum_modegpt.modeling.modegpt_family import PARTS, Family, Part

PAGE = Path(__file__).parent / "docs" / "families.md"
TEXT = """\
# Families

Each decoder block has three pairs of matrices: `mlp` (gate, up and down), `qk` (query and key) and `vo` (value and
output). In some models, blocks with experts have a fourth pair, `shared`: the MLP that all tokens pass. Compression
cuts each pair jointly, unless a part stays at full width. This page is made from the descriptions of the families:

```bash
python .github/families_table.py
```

## Supported

The parts are those of the default configuration. The last column has the options that change them.

| `model_type` | cut | at full width | with other options |
|---|---|---|---|
{supported}

## Refused

These types cannot be compressed. Every type that is in neither list is unknown and refused too.

| `model_type` | reason: the model |
|---|---|
{refused}
"""


class Changed:
    """A configuration with one value changed. It records the names that are read."""

    def __init__(self, config: Any, **values: Any) -> None:
        self._config, self._values = config, values
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return self._values[name] if name in self._values else getattr(self._config, name)


def page() -> str:
    """Return the text of the page."""
    supported = [_row(classes) for classes in map(family_of, DENSE_TYPES) if classes is not None]
    reasons: dict[str, list[str]] = {}
    for model_type, reason in REFUSED.items():
        reasons.setdefault(reason, []).append(model_type)
    refused = [f"| {', '.join(f'`{each}`' for each in types)} | {reason} |" for reason, types in reasons.items()]
    return TEXT.format(supported="\n".join(supported), refused="\n".join(refused))


def _row(classes: FamilyClasses) -> str:
    family, config = classes.family, classes.config.__bases__[-1]().get_text_config()
    uncut = family.uncut(config)
    present = {part for index in range(config.num_hidden_layers) for part in family.parts(config, index)}
    if family.shared is not None:
        present.add("shared")  # some configurations have none by default
    cut = ", ".join(part for part in PARTS if part in present and part not in uncut)
    refused = (f"`{name}` set: refused" for name in family.refused)
    options = "; ".join((*_options(family, config, uncut), *refused))
    dense = "; ".join([*_described(uncut), *_dense_layers(family, config)])
    return f"| `{family.model_type}` | {cut} | {dense or '–'} | {options or '–'} |"


def _dense_layers(family: Family, config: Any) -> list[str]:
    """Return the reasons why some layers lack parts, each once."""
    absent = (family.absent(config, index) for index in range(config.num_hidden_layers))
    return list(dict.fromkeys(reason for parts in absent for reason in parts.values()))


def _options(family: Family, config: Any, uncut: Mapping[Part, str]) -> Iterator[str]:
    """Yield the options that change the parts at full width: booleans, and limits that are not set."""
    seen = Changed(config)
    family.uncut(seen)
    for name in sorted(seen.read):
        value = getattr(config, name)
        if value is None or isinstance(value, bool):
            found = family.uncut(Changed(config, **{name: not value}))
            if found != uncut:
                state = "set" if value is None else str(not value).lower()
                yield f"`{name}` {state}: {', '.join(_described(found)) or 'nothing'} at full width"


def _described(uncut: Mapping[Part, str]) -> list[str]:
    """Return the parts at full width with their reasons, parts of the same reason together."""
    reasons: dict[str, list[str]] = {}
    for part, reason in uncut.items():
        reasons.setdefault(reason, []).append(part)
    return [f"{' and '.join(parts)} ({reason})" for reason, parts in reasons.items()]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
