"""Test that every part of the package imports only the layers below it, by parsing the source."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "optimum_modegpt"
ROOT = Path(__file__).parents[2] / PACKAGE

LAYERS = (
    ("errors",),
    ("mixture", "plot", "quantities"),
    ("recipe",),
    ("decompositions", "allocation", "config", "report"),
    ("stages", "architectures", "distributed", "kv_cache", "progress"),
    ("layouts",),
    ("calibration",),
    ("methods",),
    ("budget",),
    ("walk",),
    ("compress",),
    ("evaluation", "demo"),
    ("comparison", "recovery"),
    ("loading", "output"),
    ("export",),
    ("serving",),
    ("hub",),
    ("integration",),
    ("cli",),
    ("__init__", "__main__"),
)
"""A module may import from earlier layers, and from its own package."""

MODELING = "modeling"
MODELING_USERS = (
    *("architectures", "kv_cache", "layouts", "methods", "budget", "walk", "compress", "export", "loading", "hub"),
    *("integration", "serving", "cli"),
)
"""Parts that may import the compressed classes, which belong to no layer."""
DESCRIPTION = f"{PACKAGE}.modeling.modegpt_family"
"""The description of families, which imports nothing. Every part may import it."""

READING = ("data", "sources", "parsing")
"""The modules of `calibration` that read text. They may not import models."""

ONLY = {
    "errors": (),
    "mixture": (f"{PACKAGE}.errors",),
    "quantities": (f"{PACKAGE}.errors",),
    "recipe": (f"{PACKAGE}.errors", f"{PACKAGE}.mixture", f"{PACKAGE}.quantities"),
    "allocation": (),
    "decompositions": ("torch", f"{PACKAGE}.errors", f"{PACKAGE}.decompositions"),
    "modeling": ("torch", "transformers"),
    **dict.fromkeys(
        (f"calibration.{name}" for name in READING),
        (
            *(f"{PACKAGE}.{name}" for name in ("config", "errors", "mixture")),
            *(f"{PACKAGE}.calibration.{name}" for name in READING),
        ),
    ),
}
"""The only imports of these parts besides the standard library. The layers apply if no module of the package is listed.
`modeling` is also used as remote code, so it imports its own files by relative imports only."""


@dataclass(frozen=True)
class Import:
    """Describe one import: the importing module, the line, the full name of the target, and the form."""

    module: str
    line: int
    target: str
    relative: bool

    @property
    def source(self) -> str:
        """Return the top-level module or subpackage that contains the import."""
        return self.module.partition(".")[0]

    @property
    def ours(self) -> str | None:
        """Return the imported top-level module or subpackage. None for other packages."""
        root, _, rest = self.target.partition(".")
        return (rest.partition(".")[0] or "__init__") if root == PACKAGE else None


def imports_of(root: Path) -> Iterator[Import]:
    """Yield every import of the package at `root`, including deferred ones and those under TYPE_CHECKING."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        package = [PACKAGE, *parts[:-1]]
        parts = parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            for target, relative in _targets(node, package, root):
                yield Import(".".join(parts), getattr(node, "lineno", 0), target, relative)


def _targets(node: ast.AST, package: list[str], root: Path) -> Iterator[tuple[str, bool]]:
    if isinstance(node, ast.Import):
        yield from ((alias.name, False) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        module = ".".join((*base, *([node.module] if node.module else [])))
        for alias in node.names:
            # `from package import name` may import a module, or a name defined in `__init__.py`.
            below = root.joinpath(*module.split(".")[1:], alias.name)
            names_module = module.split(".")[0] == PACKAGE and (below.is_dir() or below.with_suffix(".py").is_file())
            yield (f"{module}.{alias.name}" if names_module else module), bool(node.level)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            yield node.args[0].value, node.args[0].value.startswith(".")


def violations(root: Path) -> list[str]:
    """Return one line per module without a layer and per import that is not allowed."""
    found = [_unplaced(path.relative_to(root)) for path in sorted(root.iterdir())]
    found += [_violation(one) for one in imports_of(root)]
    return [line for line in found if line]


def _unplaced(path: Path) -> str | None:
    name = path.with_suffix("").name
    is_code = path.suffix == ".py" or (path.suffix == "" and not name.startswith(("__", ".")) and "." not in path.name)
    placed = {MODELING}.union(*LAYERS)
    if is_code and path.name != "py.typed" and name not in placed:
        return f"{path}: not in LAYERS"
    return None


def _violation(one: Import) -> str | None:
    place = f"{one.module}:{one.line} imports {one.target}"
    if one.ours is None:
        return f"{place}: package is not allowed" if _is_foreign(one) else None
    if one.source == MODELING:
        if one.relative and one.ours == MODELING:
            return None
        return f"{place}: remote code may only import its own files, relatively"
    if one.relative:
        return f"{place}: relative"
    if _is_limited(one):
        return f"{place}: module is not allowed"
    if one.ours == MODELING:
        return (
            None
            if one.source in MODELING_USERS or one.target.startswith(DESCRIPTION)
            else f"{place}: only {', '.join(MODELING_USERS)} use it"
        )
    if one.source == one.ours:
        return None
    return None if _layer(one.ours) < _layer(one.source) else f"{place}: upwards or sideways"


def _is_foreign(one: Import) -> bool:
    """Return whether the import is of another package that `ONLY` does not allow."""
    root = one.target.partition(".")[0]
    limits = [allowed for name, allowed in ONLY.items() if one.source == name]
    return root not in sys.stdlib_module_names and any(root not in allowed for allowed in limits)


def _is_limited(one: Import) -> bool:
    """Return whether the import is of a module of the package that `ONLY` does not allow."""
    for part, allowed in ONLY.items():
        ours = tuple(name for name in allowed if name.startswith(PACKAGE))
        if part in (one.source, one.module) and ours and not one.target.startswith(ours):
            return True
    return False


def _layer(name: str) -> int:
    for index, layer in enumerate(LAYERS):
        if name in layer:
            return index
    return -1


# --------------------------------------------------------------------------------------------------------- the package


def test_imports_follow_the_layers():
    assert violations(ROOT) == []


def circle_of(root: Path) -> list[str]:
    """Return the modules of an import circle, deferred imports included, or an empty list."""
    modules = {".".join(path.relative_to(root).with_suffix("").parts) for path in root.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for one in imports_of(root):
        target = one.target.removeprefix(PACKAGE).lstrip(".") if one.ours is not None else ""
        source, target = (name if name in modules else f"{name}.__init__" for name in (one.module, target))
        if target in modules and target != source:
            graph.setdefault(source, set()).add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_package_has_no_import_circles():
    assert circle_of(ROOT) == []


def test_import_circle_inside_a_subpackage_is_found(tmp_path):
    files = {
        "comparison/table.py": f"from {PACKAGE}.comparison.records import x",
        "comparison/records.py": f"def f():\n    from {PACKAGE}.comparison.table import y",
    }
    assert violations(plant(tmp_path, files)) == []
    assert set(circle_of(tmp_path)) == {"comparison.table", "comparison.records"}


def test_all_modules_are_parsed():
    modules = {one.module for one in imports_of(ROOT)}
    assert {"compress", "decompositions.psd", "modeling.modegpt_common", "cli.main"} <= modules
    assert len(modules) > 30


# ------------------------------------------------------------------------------------------------------- planted trees


def plant(root: Path, files: dict[str, str]) -> Path:
    """Write a package with allowed imports in every layer, and add or replace `files`."""
    legal = {
        "errors.py": "import enum",
        "decompositions/__init__.py": "",
        "decompositions/psd.py": f"import torch\nfrom {PACKAGE}.errors import X",
        "decompositions/rotary.py": f"from {PACKAGE}.decompositions.psd import X",
        "allocation/plan.py": "import math",
        "plot.py": "def draw():\n    import matplotlib",
        "report.py": f"from {PACKAGE}.plot import draw",
        "recipe.py": f"import dataclasses\nfrom {PACKAGE}.errors import X",
        "config.py": f"import transformers\nfrom {PACKAGE}.recipe import X",
        "stages.py": f"from {PACKAGE}.report import Stage",
        "modeling/modegpt_common.py": "import torch\nimport transformers.x",
        "modeling/modegpt_llama.py": "from .modegpt_common import X\nfrom . import modegpt_common",
        "architectures/block.py": f"from {PACKAGE}.modeling import modegpt_common",
        "calibration/data.py": f"import datasets\nfrom {PACKAGE}.config import X",
        "calibration/moments.py": f"from {PACKAGE}.architectures import block",
        "methods/published.py": f"from {PACKAGE}.calibration.moments import X",
        "compress.py": f"from {PACKAGE}.methods import published\nfrom {PACKAGE}.stages import StageClock",
        "evaluation/perplexity.py": f"from {PACKAGE}.errors import X",
        "cli/main.py": f"import datasets\nfrom {PACKAGE}.compress import compress",
        "__init__.py": f"from {PACKAGE}.cli.main import main",
        "__main__.py": f"import {PACKAGE}.cli.main",
        "py.typed": "",
    }
    for name, text in (legal | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_allowed_imports_are_accepted(tmp_path):
    assert violations(plant(tmp_path, {})) == []


PLANTED = {
    "up, at the top of a file": ("compress.py", f"from {PACKAGE}.cli.main import main"),
    "up, inside a function": ("compress.py", f"def f():\n    from {PACKAGE}.cli import main"),
    "up, for types only": ("config.py", f"if TYPE_CHECKING:\n    from {PACKAGE}.compress import compress"),
    "up, as a plain import": ("methods/published.py", f"import {PACKAGE}.compress"),
    "up, as an attribute of the package": ("methods/published.py", f"from {PACKAGE} import compress"),
    "up, to the package itself": ("calibration/data.py", f"from {PACKAGE} import __version__"),
    "up, by name at run time": ("methods/published.py", f'importlib.import_module("{PACKAGE}.compress")'),
    "up, from a package's own file": ("methods/__init__.py", f"from {PACKAGE}.compress import compress"),
    "sideways": ("decompositions/psd.py", f"from {PACKAGE}.allocation.plan import Plan"),
    "sideways, between single files": ("report.py", f"from {PACKAGE}.config import ModeGPTConfig"),
    "sideways, near the top": ("evaluation/perplexity.py", f"from {PACKAGE}.demo import x"),
    "architectures to calibration": ("architectures/block.py", f"from {PACKAGE}.calibration.data import x"),
    "errors import another module": ("errors.py", f"from {PACKAGE}.config import x"),
    "decompositions import the configuration": ("decompositions/psd.py", f"from {PACKAGE}.config import x"),
    "decompositions import transformers": ("decompositions/psd.py", "import transformers"),
    "decompositions import numpy": ("decompositions/psd.py", "def f():\n    from numpy import array"),
    "allocation imports torch": ("allocation/plan.py", "from torch import Tensor"),
    "errors import torch": ("errors.py", "import torch.cuda"),
    "recipe imports transformers": ("recipe.py", "import transformers"),
    "calibration data imports the architectures": ("calibration/data.py", f"from {PACKAGE}.architectures import block"),
    "modeling imports another part": ("modeling/modegpt_llama.py", f"from {PACKAGE}.errors import ModeGPTError"),
    "modeling imports its own files absolutely": (
        "modeling/modegpt_llama.py",
        f"from {PACKAGE}.modeling import modegpt_common",
    ),
    "modeling imports from its parent": ("modeling/modegpt_llama.py", "from ..errors import ModeGPTError"),
    "modeling imports safetensors": ("modeling/modegpt_llama.py", "import safetensors"),
    "calibration imports modeling": ("calibration/moments.py", f"from {PACKAGE}.modeling import modegpt_common"),
    "evaluation imports modeling": ("evaluation/perplexity.py", f"from {PACKAGE}.modeling import modegpt_common"),
    "relative import": ("methods/published.py", "from .factors import x"),
    "module without a layer": ("utils.py", ""),
    "subpackage without a layer": ("helpers/things.py", ""),
}


@pytest.mark.parametrize(("name", "text"), PLANTED.values(), ids=list(PLANTED))
def test_violation_is_found(name, text, tmp_path):
    assert len(violations(plant(tmp_path, {name: text}))) == 1


# ----------------------------------------------------------------------------------------------------------- text files


def opened_without_encoding(source: str) -> list[int]:
    """Return the lines that open, read or write a text file without an encoding."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not _is_text(node):
            continue
        if "encoding" not in [keyword.arg for keyword in node.keywords]:
            lines.append(node.lineno)
    return lines


def _is_text(call: ast.Call) -> bool:
    """Return whether a call opens, reads or writes a text file. `os.open` and modes with a `b` do not."""
    name, owner = getattr(call.func, "attr", None), getattr(call.func, "value", None)
    if name in ("read_text", "write_text"):
        return True
    is_open = getattr(call.func, "id", None) == "open" or (name == "open" and getattr(owner, "id", None) != "os")
    for argument in (*call.args, *(keyword.value for keyword in call.keywords)):
        mode = getattr(argument, "value", "")
        if isinstance(mode, str) and "b" in mode and len(mode) <= 3:
            return False
    return is_open


def test_text_files_are_opened_with_an_encoding():
    paths = list(ROOT.rglob("*.py"))
    assert len(paths) > 50
    for path in paths:
        assert opened_without_encoding(path.read_text(encoding="utf-8")) == [], path


def test_text_file_opened_without_encoding_is_found():
    source = """
open("a")
Path("a").open("w")
file.read_text()
file.write_text("b")
open("a", "rb")
Path("a").open(mode="wb")
os.open("a", os.O_WRONLY)
open("a", encoding="utf-8")
file.write_text("b", encoding="utf-8")
"""
    assert opened_without_encoding(source) == [2, 3, 4, 5]
