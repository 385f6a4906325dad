"""Check the word list of `.github/prose.py` on sentences that it must refuse and accept."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / ".github" / "prose.py"
REFUSED = (
    "It returns what was read.",
    "The number stands in the report.",
    "The run goes on.",
    "A file beside the weights.",
    "The file lies in the folder.",
    "Returns None where there is none.",
    "None where\n    it was kept.",
)
ACCEPTED = ("What is a block?", "KL stands for a divergence.", "The run continues.", "Besides, it relies on torch.")


@pytest.fixture(scope="module")
def prose() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prose", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("sentence", REFUSED)
def test_a_word_to_avoid_is_found_in_prose_and_code(prose: ModuleType, tmp_path: Path, sentence: str) -> None:
    comment = sentence.replace("\n", " ")
    (tmp_path / "page.md").write_text(f"# Title\n\n{sentence}\n", encoding="utf-8")
    (tmp_path / "code.py").write_text(
        f'"""{sentence}"""\n# {comment}\nprint(f"{sentence!r} {{1}}")\n', encoding="utf-8"
    )
    assert [line for line, *_ in prose.findings(tmp_path / "page.md")] == [3]
    assert len(list(prose.findings(tmp_path / "code.py"))) == 3


@pytest.mark.parametrize("sentence", ACCEPTED)
def test_other_words_are_accepted(prose: ModuleType, tmp_path: Path, sentence: str) -> None:
    (tmp_path / "page.md").write_text(sentence, encoding="utf-8")
    assert list(prose.findings(tmp_path / "page.md")) == []


def test_package_and_tests_are_checked(prose: ModuleType) -> None:
    names = {path.relative_to(prose.ROOT).as_posix() for path in prose.files()}
    assert {"README.md", "optimum_modegpt/compress.py", "tests/conftest.py", "tests/unit/test_psd.py"} <= names
    assert Path(__file__) not in prose.files(), "its examples are not prose"


def test_test_names_are_prose(prose: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("def test_what_was_read():\n    pass\n", encoding="utf-8")
    assert [line for line, *_ in prose.findings(tmp_path / "code.py")] == [1]


def test_other_names_are_no_prose(prose: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("what = beside = lies = 1\n", encoding="utf-8")
    assert list(prose.findings(tmp_path / "code.py")) == []
