"""Check that the page of families is the one that the descriptions of the families make."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from optimum_modegpt.architectures import family_of
from optimum_modegpt.architectures.refused import REFUSED
from optimum_modegpt.modeling import DENSE_TYPES

SCRIPT = Path(__file__).parents[2] / ".github" / "families_table.py"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    """Import the script that makes the page; skip if the installed transformers lacks one of the families."""
    for model_type in DENSE_TYPES:
        try:
            family_of(model_type)
        except ModuleNotFoundError as error:
            pytest.skip(f"the page needs a transformers that has {error.name}")
    spec = importlib.util.spec_from_file_location("families_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(table: ModuleType) -> None:
    assert table.PAGE.read_text(encoding="utf-8") == table.page(), f"run: python .github/{SCRIPT.name}"


def test_the_page_names_every_type_and_the_command(table: ModuleType) -> None:
    page = table.page()
    assert all(f"`{model_type}`" in page for model_type in (*DENSE_TYPES, *REFUSED))
    assert f"python .github/{SCRIPT.name}\n" in page


def test_the_page_says_which_parts_stay_at_full_width(table: ModuleType) -> None:
    lines = (line.removeprefix("| ").removesuffix(" |") for line in table.page().splitlines())
    rows = {cells[0].strip("`"): cells[1:] for cells in (line.split(" | ") for line in lines)}
    assert rows["llama"] == ["mlp, qk, vo", "–", "–"]
    clip = "qk and vo (clip_qkv clamps queries, keys and values) at full width"
    assert rows["olmo"] == ["mlp, qk, vo", "–", f"`clip_qkv` set: {clip}"]
    assert rows["gpt2"] == ["mlp, qk, vo", "–", "`add_cross_attention` set: refused"]
