"""Test atomic writes of result folders: which folders may be overwritten, and races between runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from optimum_modegpt import OutputError, output
from optimum_modegpt.output import check_output, checkpoint_of, replacing


def result(folder: Path, mark: str = "", model_type: str = "modegpt_llama") -> Path:
    """Return a folder that looks like a result of ours."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "mark": mark}))
    for name in ("model.safetensors", "modegpt_llama.py", "README.md", "merges.txt", ".gitattributes"):
        (folder / name).touch()
    return folder


def mark_of(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["mark"]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@contextmanager
def in_workshop(folder: Path) -> Iterator[Path]:
    """Yield a new result folder, as the commands do."""
    checkpoint = checkpoint_of(folder)
    with checkpoint.alone(), replacing(folder, overwrite=False, work_folder=checkpoint.folder) as partial:
        yield partial


def test_a_result_of_ours_may_be_overwritten(tmp_path: Path) -> None:
    check_output(result(tmp_path), overwrite=True)
    with pytest.raises(OutputError, match="not empty"):
        check_output(tmp_path, overwrite=False)


def test_tokenizers_of_every_kind_are_ours(tmp_path: Path) -> None:
    folder = result(tmp_path)
    for name in ("tokenizer.model", "vocab.json", "qwen.tiktoken", "vocab.bpe", "chat_template.jinja"):
        (folder / name).touch()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").touch()
    check_output(folder, overwrite=True)
    (folder / "additional_chat_templates" / "thesis.docx").touch()
    with pytest.raises(OutputError, match="not part of a compressed model: additional_chat_templates"):
        check_output(folder, overwrite=True)


@pytest.mark.parametrize(
    ("foreign", "message"),
    [
        ("dense", "is a model of type 'llama'"),
        ("broken", r"has no readable config\.json"),
        ("folder", "not part of a compressed model: checkpoints"),
        ("file", "not part of a compressed model: thesis.docx"),
        ("link", "not part of a compressed model: link.json"),
    ],
)
def test_anything_else_is_never_deleted(foreign: str, message: str, tmp_path: Path) -> None:
    folder = result(tmp_path / "out", model_type="llama" if foreign == "dense" else "modegpt_llama")
    if foreign == "broken":
        (folder / "config.json").write_text("[]")
    if foreign == "folder":
        (folder / "checkpoints").mkdir()
    if foreign == "file":
        (folder / "thesis.docx").touch()
    if foreign == "link":
        (folder / "link.json").symlink_to(tmp_path)
    before = names(folder)
    with pytest.raises(OutputError, match=message):
        check_output(folder, overwrite=True)
    assert names(folder) == before


def test_files_added_meanwhile_and_the_work_are_kept(tmp_path: Path) -> None:
    folder, work_folder = result(tmp_path / "out", "old"), tmp_path / "work"
    words = r"(?s)not part of a compressed model: thesis.docx.*kept in .*out\.finished-"
    with pytest.raises(OutputError, match=words), replacing(folder, overwrite=True, work_folder=work_folder) as partial:  # noqa: PT012
        result(partial, "new")
        (folder / "thesis.docx").touch()
    assert mark_of(folder) == "old"
    assert (folder / "thesis.docx").exists()
    (kept,) = names(tmp_path) - {"out", "work"}
    assert mark_of(tmp_path / kept) == "new"


def test_the_second_of_two_runs_does_not_replace_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    words = r"(?s)was written by another run in the meantime.*kept in .*out\.finished-"
    one, two = folder.with_name("one"), folder.with_name("two")
    with pytest.raises(OutputError, match=words), replacing(folder, overwrite=False, work_folder=two) as second:  # noqa: PT012
        result(second, "second")
        with replacing(folder, overwrite=False, work_folder=one) as first:
            result(first, "first")
    assert mark_of(folder) == "first"
    (kept,) = names(folder.parent) - {"out", "one", "two"}
    assert mark_of(folder.parent / kept) == "second"


def test_a_lost_race_with_overwrite_keeps_both_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, work_folder, rename = result(tmp_path / "out", "old"), tmp_path / "work", Path.rename

    def taken(self: Path, target: Path) -> Path:
        if target == folder:
            result(folder, "other")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", taken)
    words = r"(?s)was written by another run in the meantime.*kept in .*out\.finished-"
    with pytest.raises(OutputError, match=words), replacing(folder, overwrite=True, work_folder=work_folder) as partial:
        result(partial, "new")
    assert mark_of(folder) == "other"
    (kept,) = names(tmp_path) - {"out", "work"}
    assert mark_of(tmp_path / kept) == "new"


def test_the_folder_of_the_run_is_no_place_for_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="is the working folder"):
        check_output(Path("."), overwrite=True)


def test_an_interrupt_while_folders_change_places_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, work_folder = result(tmp_path / "out", "old"), tmp_path / "work"

    def interrupted(*args: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), replacing(folder, overwrite=True, work_folder=work_folder) as partial:  # noqa: PT012
        result(partial, "new")
        monkeypatch.setattr(output, "_check_ours", interrupted)
    assert mark_of(folder) == "old"


def test_files_of_the_old_result_that_cannot_be_deleted_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, work_folder = result(tmp_path / "out", "old"), tmp_path / "work"

    def busy(*args: Path) -> None:
        raise OSError("device or resource busy")

    with monkeypatch.context() as patch, replacing(folder, overwrite=True, work_folder=work_folder) as partial:
        result(partial, "new")
        patch.setattr(output.shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else busy())
    assert mark_of(folder) == "new"
    assert "could not be deleted" in caplog.text


def test_a_failed_run_removes_the_folders_made_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "out"
    with pytest.raises(RuntimeError), in_workshop(folder):
        raise RuntimeError
    assert names(tmp_path) == set()
    with in_workshop(folder) as partial:
        result(partial)
    assert names(folder.parent) == {"out"}
