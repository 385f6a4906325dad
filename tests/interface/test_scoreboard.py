"""Check the scoreboard of the benchmarks: the scores of questions, the shares, the table, and which cells are kept."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_dense, save_text
from tiny_models import compressed, dense, tokenizer
from transformers.utils.logging import enable_progress_bar

scoreboard = pytest.importorskip("scoreboard")
import rows  # noqa: E402
import scoreboard_table  # noqa: E402
import zero_shot  # noqa: E402

CHOICES = {"query": "Question: on sea\n", "choices": ["a rat", "toes", "ear"], "gold": 1}
OTHER = {"query": "Question: is it\n", "choices": ["no", "an iron tree"], "gold": 0}
CONTEXTS = {"context_options": ["tea so Ann", "sea so Bo"], "continuation": "ate.", "gold": 0}
LAST_WORD = {"context": "one tree and one", "continuation": "tree"}


@pytest.fixture(autouse=True)
def progress_bars_again() -> Iterator[None]:
    """Enable the progress bars that the benchmark disables."""
    yield
    enable_progress_bar()


def questions(tmp_path: Path, task: str, *items: dict[str, Any], context: int | None = 64) -> list[zero_shot.Question]:
    file = tmp_path / f"{task}.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    return zero_shot.read_questions(file, tokenizer(), context)


def text_of(option: zero_shot.Option) -> tuple[str, str]:
    decode = tokenizer().decode
    return decode(option.tokens[: option.start]), decode(option.tokens[option.start :])


# ----------------------------------------------------------------------------------------------------------- questions


@pytest.mark.parametrize(
    ("task", "item", "expected"),
    [
        ("piqa", CHOICES, ("Question: on sea\nAnswer:", " a rat")),
        ("openbook_qa", {**CHOICES, "query": "on sea"}, ("Question: on sea\nAnswer:", " a rat")),
        ("hellaswag", {**CHOICES, "query": "He"}, ("He", " a rat")),
        ("winogrande", CONTEXTS, ("tea so Ann", " ate.")),
        ("lambada_openai", LAST_WORD, ("one tree and one", " tree")),
    ],
)
def test_the_prompt_and_the_scored_text_follow_the_task(tmp_path, task, item, expected):
    (question,) = questions(tmp_path, task, item)
    assert text_of(question.options[0]) == expected


def test_only_choices_are_scored_by_length(tmp_path):
    (choices,) = questions(tmp_path, "piqa", CHOICES)
    (contexts,) = questions(tmp_path, "winogrande", CONTEXTS)
    assert [option.length for option in choices.options] == [5, 4, 3]
    assert [option.length for option in contexts.options] == [1, 1]


def test_a_long_prompt_loses_its_first_tokens(tmp_path):
    (question,) = questions(tmp_path, "lambada_openai", LAST_WORD, context=10)
    assert text_of(question.options[0]) == ("d one", " tree")
    with pytest.raises(ValueError, match="a continuation has 5 tokens"):
        questions(tmp_path, "lambada_openai", LAST_WORD, context=5)


@pytest.mark.parametrize("name", ["llama-gqa-tied", "opt", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("make", [dense, compressed])
def test_scores_equal_those_of_single_rows(tmp_path, make, name):
    model = make(name)
    asked = questions(tmp_path, "piqa", CHOICES, OTHER) + questions(tmp_path, "winogrande", CONTEXTS)
    assert [question.shared > 0 for question in asked] == [True, True, False]
    for batch in (asked[:2], asked[2:]):
        with torch.no_grad():
            scores = zero_shot._scores(model, batch)
        for question, (nats, greedy) in zip(batch, scores, strict=True):
            expected = [plain(model, option) for option in question.options]
            assert nats == pytest.approx([cost for cost, _ in expected], abs=1e-3)
            assert greedy == [is_greedy for _, is_greedy in expected]


def plain(model: Any, option: zero_shot.Option) -> tuple[float, bool]:
    """Return the nats of a continuation and whether it is greedy, from one forward pass without padding."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([option.tokens])).logits[0, option.start - 1 : -1]
    target = torch.tensor(option.tokens[option.start :])
    nats = -logits.double().log_softmax(dim=-1).gather(1, target[:, None]).sum()
    return float(nats), bool((logits.argmax(dim=-1) == target).all())


def test_batches_have_each_question_once_and_keep_those_without_shared_tokens_apart(tmp_path):
    asked = questions(tmp_path, "piqa", *[CHOICES, OTHER] * 4) + questions(tmp_path, "winogrande", *[CONTEXTS] * 3)
    batches = list(zero_shot._batches(asked))
    assert sorted(index for batch in batches for index in batch) == list(range(11))
    assert all(len({asked[index].shared > 0 for index in batch}) == 1 for batch in batches)


def test_the_right_option_has_the_fewest_nats_by_length(tmp_path):
    (question,) = questions(tmp_path, "piqa", CHOICES)  # of lengths 5, 4, 3
    assert zero_shot._is_right(question, [6.0, 4.0, 3.5], [False] * 3)
    assert not zero_shot._is_right(question, [4.5, 4.0, 3.5], [False] * 3)
    (last_word,) = questions(tmp_path, "lambada_openai", LAST_WORD)
    assert zero_shot._is_right(last_word, [9.0], [True])


def test_a_sliding_window_shorter_than_a_question_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sliding window of 6"):
        zero_shot.right_answers(dense("mistral-window"), questions(tmp_path, "piqa", CHOICES))


# -------------------------------------------------------------------------------------------------------------- shares


def test_accuracies_and_their_errors():
    assert zero_shot.accuracy([True, False, False, False]) == (0.25, pytest.approx(math.sqrt(0.25 * 0.75 / 4)))
    mean, error = zero_shot.mean_accuracy([[True, False], [True, True]])
    assert (mean, error) == (0.75, pytest.approx(math.sqrt(0.125) / 2))


def test_the_share_kept_is_paired():
    dense_answers = [[True, True, False, False]]
    assert zero_shot.share_kept(dense_answers, dense_answers) == (1.0, 0.0)
    share, error = zero_shot.share_kept(dense_answers, [[True, False, False, False]])
    assert share == 0.5  # the differences new - 0.5 old are 0.5, -0.5, 0, 0
    assert error == pytest.approx(math.sqrt(0.125 / 4) / 0.5)


# ----------------------------------------------------------------------------------------------------------- the table


def row(recipe: str, perplexity: float, answers: str = "1100", sparsity: float = 0.3) -> dict[str, Any]:
    text = {"name": "text", "windows": 8, "sequence_length": 64, "sha256": "0"}
    return {
        "model": "tiny",
        "weights": "a",
        "recipe": recipe,
        "sparsity": sparsity,
        "calibration": None if recipe == "dense" else text,
        "code": None,
        "settings": {},
        "parameters": 10,
        "bytes": 40,
        "texts": {"stories": perplexity},
        "tasks": {"piqa": answers},
    }


def test_the_table_has_the_best_temperature_and_the_share_left():
    found = [row("dense", 2.0, sparsity=0.0), row("paper ε 0.1", 8.0), row("paper ε 0.2", 4.0)]
    found += [row("paper uniform", 5.0), row("default", 2 * math.sqrt(2), answers="1000")]
    (table,) = scoreboard_table.tables(found)
    head, _, *lines = table.partition("\n\n")[2].splitlines()
    names = [cell.strip() for cell in head.split("|")]
    cells = [dict(zip(names, (cell.strip() for cell in line.split("|")), strict=True)) for line in lines]
    assert [each["recipe"] for each in cells] == ["dense", "paper ε 0.2", "paper uniform", "default"]
    assert [each["left, stories"] for each in cells] == ["", "", "", "0.50"]
    assert cells[-1]["kept"] == "50.0% ± 35.4%"


def test_rows_of_other_settings_and_calibrations_are_in_other_tables():
    other = row("default", 3.0) | {"calibration": row("default", 3.0)["calibration"] | {"name": "other"}}
    foreign = row("default", 3.0) | {"settings": {"tasks": "b"}}
    found = scoreboard_table.tables([row("dense", 2.0), row("default", 2.5), other, foreign])
    assert [len(table.splitlines()) for table in found] == [6, 6]
    assert ["on 8 windows of 64 tokens of other" in table for table in found] == [False, True]


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Return the arguments of a run on a tiny model with one text, one task and two recipes that share influences."""
    save_dense(tmp_path / "tiny")
    save_text(tmp_path / "text.txt")
    questions(tmp_path, "piqa", CHOICES, OTHER)
    folders = ["--model", "tiny", "--texts", "", "--tasks", "", "--json", "scores.json"]
    words = [str(tmp_path / word) if not word.startswith("--") else word for word in folders]
    words += ["--evaluation", "text.txt", "--max-windows", "4", "--calibration", "text.txt", "--num-samples", "4"]
    return [*words, "--sequence-length", "32", "--task", "piqa", "--sparsity", "0.3"]


def test_cells_are_saved_and_measured_once(tmp_path, command, monkeypatch, capsys):
    recipes = ["--recipe", "paper ε 0.1", "paper ε 0.2", "--measure", "texts", "tasks"]
    scoreboard.main([*command, *recipes])
    record = rows.read(tmp_path / "scores.json")
    assert [each["recipe"] for each in record["rows"]] == ["dense", "paper ε 0.1", "paper ε 0.2"]
    first, second = record["rows"][1:]
    assert first["curves"]["influences"]
    assert "curves" not in second
    assert [stage["name"] for stage in second["stages"]][:1] == ["allocate (influence)"]
    assert second["stages"][0] in first["stages"]
    assert all(set(each["tasks"]["piqa"]) <= {"0", "1"} for each in record["rows"])

    monkeypatch.setattr(scoreboard, "compress", None)
    scoreboard.main([*command, *recipes])
    assert rows.read(tmp_path / "scores.json") == record
    scoreboard.main(["--table", "--json", str(tmp_path / "scores.json")])
    assert capsys.readouterr().out.count("| paper ε") == 3


def test_a_row_of_other_code_is_replaced(tmp_path, command, monkeypatch):
    recipe = ["--recipe", "paper uniform", "--measure", "texts"]
    scoreboard.main([*command, *recipe])
    monkeypatch.setattr(scoreboard, "code", lambda *parts: "changed" if not parts else "same")
    scoreboard.main([*command, *recipe])
    scoreboard.main([*command, *recipe])
    found = rows.read(tmp_path / "scores.json")["rows"]
    assert [(each["recipe"], each["code"]) for each in found if each["settings"]["code"] == "same"] == [
        ("dense", None),
        ("paper uniform", "changed"),
    ]


def test_agreement_and_speed_are_relative_to_the_dense_model(tmp_path, command, monkeypatch):
    monkeypatch.setattr(scoreboard, "NEW_TOKENS", 8)
    monkeypatch.setattr(scoreboard, "SPEED", scoreboard.SPEED | {"prompt_lengths": [8], "new_tokens": 2})
    scoreboard.main([*command, "--recipe", "paper uniform"])
    dense_row, found = rows.read(tmp_path / "scores.json")["rows"]
    assert "speed" not in dense_row
    assert 0 <= found["greedy"]["same"] <= 1
    assert 0 <= found["greedy"]["top1"] <= 1
    assert found["speed"]["decode"]["median"] > 0
    assert found["parameters"] < dense_row["parameters"]
    assert found["bytes"] < dense_row["bytes"]


def test_calibration_files_alternate_as_in_a_mixture(tmp_path, command):
    save_text(tmp_path / "other.txt", seed=1)
    options = scoreboard.parse([*command, "--calibration", "text.txt", "other.txt", "--num-samples", "5"])
    found = scoreboard.Subject(options).calibration
    assert found.tokens.shape == (5, 32)
    assert found.record["name"] == "other.txt + text.txt"
    single = scoreboard.parse([*command, "--num-samples", "2"])
    assert torch.equal(found.tokens[1::2], scoreboard.Subject(single).calibration.tokens)
