"""Test mixtures of sources: how they are told from texts, divided into windows, recorded, and named by the commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import RECIPE, save_dense
from datasets import Dataset
from huggingface_hub import ModelCard
from tiny_models import dense, tokenizer

import optimum_modegpt.compress as compress_module
from optimum_modegpt import (
    CalibrationDataError,
    Checkpoint,
    CheckpointError,
    InvalidConfig,
    ModeGPTConfig,
    ModeGPTQuantizer,
)
from optimum_modegpt.calibration.data import calibration_windows, evaluation_windows
from optimum_modegpt.calibration.sources import HUB_DATASETS
from optimum_modegpt.cli import main as cli
from optimum_modegpt.hub.card import front_matter
from optimum_modegpt.hub.commands import flags
from optimum_modegpt.hub.result import read
from optimum_modegpt.mixture import SHORT_NAMES, divide, interleave, mixture_of, names_of, without_folders
from optimum_modegpt.walk.resume import keep_block

FLAGS = [part for key, value in RECIPE.items() for part in (f"--{key.replace('_', '-')}", str(value))]
TEXTS = [f"text {number}: " + "lorem ipsum " * (number % 7 + 1) for number in range(60)]
PROSE, CODE = "the quick brown fox jumps over the lazy dog. ", "def f(x): return x ** 2 # 0123456789\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return the paths of two texts without a common word."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "prose.txt").write_text(PROSE * 200, encoding="utf-8")
    (folder / "code.txt").write_text(CODE * 200, encoding="utf-8")
    return str(folder / "prose.txt"), str(folder / "code.txt")


def calibrate(dataset: Any, samples: int = 12, length: int = 16, **fields: Any) -> Any:
    config = ModeGPTConfig(dataset=dataset, num_samples=samples, **fields)
    return calibration_windows(config, tokenizer(), sequence_length=length)


def refused(dataset: Any, *parts: str, **fields: Any) -> None:
    with pytest.raises(InvalidConfig) as caught:
        ModeGPTConfig(dataset=dataset, **fields)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


# ---------------------------------------------------------------------------------------------- sources or texts


def test_every_dataset_of_the_hub_with_a_short_name_is_known() -> None:
    assert HUB_DATASETS.keys() < set(SHORT_NAMES)


@pytest.mark.parametrize(
    "dataset",
    [
        "c4",
        "my_text.txt",
        TEXTS,
        ["hello", "world"],
        [1, 2, 3],
        [[1, 2], [3, 4]],
        [],
        [[{"role": "user", "content": "c4"}]],
        [{"role": "user", "content": "c4"}],
        {"input_ids": [[1, 2]], "attention_mask": [[1, 1]]},
        Dataset.from_dict({"text": TEXTS}),
        torch.zeros(2, 8, dtype=torch.int64),
        # Long texts and texts with several lines are not looked up on the disk.
        ["c4 " * 1000, "c4\nwikitext2"],
    ],
)
def test_single_sources(dataset: Any) -> None:
    (part,) = mixture_of(dataset)
    assert part.source is dataset


@pytest.mark.parametrize(
    "dataset",
    [
        ["c4", Dataset.from_dict({"text": TEXTS})],
        ["c4", TEXTS],
        ["c4", [[{"role": "user", "content": "hello"}]]],
        [TEXTS, torch.zeros(2, 8, dtype=torch.int64)],
        [["c4", "hello"]],  # a list in a list is a list of texts
    ],
)
def test_lists_of_sources(dataset: Any) -> None:
    assert [part.source for part in mixture_of(dataset)] == list(dataset)
    assert {part.weight for part in mixture_of(dataset)} == {1.0}


@pytest.mark.parametrize(
    "dataset",
    [
        ["c4", "wikitext2"],
        ("c4", "self"),
        ["c4", "allenai/c4", "missing.txt", "x.JSONL", "."],
        ["c4", Path("anywhere")],
    ],
)
def test_lists_of_names_become_weights(dataset: Any) -> None:
    names = [str(name) for name in dataset]
    assert ModeGPTConfig(dataset=dataset).dataset == dict.fromkeys(names, 1.0)
    assert sorted(names_of(dataset)) == sorted(names)


def test_list_of_names_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    config = ModeGPTConfig(dataset=["c4", "folder"])
    monkeypatch.chdir(tmp_path / "folder")
    assert dataclasses.replace(config).to_dict()["dataset"] == {"c4": 1.0, "folder": 1.0}


def test_weights() -> None:
    parts = mixture_of({"c4": 0.5, "imdb": 2, Path("a"): 1, "wikitext2": 0})
    assert [(part.source, part.weight) for part in parts] == [("imdb", 2.0), ("a", 1.0), ("c4", 0.5)]
    assert names_of({"c4": 0.5, Path("a"): 1}) == ["a", "c4"]


def test_list_of_names_and_texts_is_ambiguous() -> None:
    refused(["c4", "Once upon a time"], "'c4' is a source", "'Once upon a time'", "{'c4': 1", "dataset=[texts]")
    refused(["missing_folder", "c4"], "'missing_folder'", "must exist")


def test_invalid_mixtures() -> None:
    refused(["c4", "wikitext2", "c4"], "'c4' twice", "weights")
    refused({"c4": -1}, "'c4'", "at least 0", "-1")
    refused({"c4": float("nan"), "wikitext2": 1}, "'c4'")
    refused({"c4": 1, "wikitext2": "much"}, "'wikitext2'", "'much'")
    refused({"c4": 0}, "at least one weight must be positive")
    refused({1: 0.5}, "names and paths", "int")
    refused(["c4", "wikitext2"], "num_samples=1", "2 sources", num_samples=1)
    refused(["c4", "wikitext2"], "dataset_split='test'", "2 sources", dataset_split="test")
    refused(["c4", "wikitext2"], "text_column='body'", text_column="body")


# ------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize(
    ("weights", "windows", "expected"),
    [
        ([1], 7, [7]),
        ([0.5, 0.3, 0.2], 128, [64, 38, 26]),
        ([1, 1, 1], 8, [3, 3, 2]),
        ([1, 1e-9], 4, [3, 1]),
        ([1e-9, 1, 1e-9, 1], 4, [1, 1, 1, 1]),
        ([5, 3, 2], 10, [5, 3, 2]),
    ],
)
def test_windows_are_divided_by_largest_remainder(weights: list[float], windows: int, expected: list[int]) -> None:
    assert divide(weights, windows) == expected


@pytest.mark.parametrize("shares", [[64, 38, 26], [3, 1], [1, 1, 1], [100, 1, 27]])
def test_first_windows_contain_every_source_in_proportion(shares: list[int]) -> None:
    order, total = interleave(shares), sum(shares)
    assert [order.count(source) for source in range(len(shares))] == shares
    assert set(order[: len(shares)]) == set(range(len(shares)))
    for first in range(len(shares), total):
        for source, share in enumerate(shares):
            assert abs(order[:first].count(source) - share * first / total) < len(shares)


def test_windows_of_each_source_are_those_it_has_alone(files: tuple[str, str]) -> None:
    prose, code = files
    mixed = calibrate({prose: 3, code: 1})
    assert mixed.tokens.shape == (12, 16)
    assert torch.equal(calibrate(prose, samples=9).tokens, mixed.tokens[[0, 2, 3, 4, 5, 7, 8, 9, 11]])
    assert torch.equal(calibrate(code, samples=3).tokens, mixed.tokens[[1, 6, 10]])
    assert torch.equal(calibrate({code: 1, prose: 3}).tokens, mixed.tokens)  # config.json sorts the names
    assert not torch.equal(calibrate({prose: 3, code: 1}, seed=1).tokens, mixed.tokens)


def test_record_says_which_share_came_from_which_source(files: tuple[str, str]) -> None:
    prose, code = files
    found = calibrate([prose, code, TEXTS])
    sources = found.record["sources"]
    assert [source["windows"] for source in sources] == [4, 4, 4]
    assert [source["name"] for source in sources] == ["prose.txt", "code.txt", "in memory: 60 texts"]
    assert sources[0] == calibrate(prose, samples=4).record
    assert found.record["name"] == "prose.txt + code.txt + in memory: 60 texts"
    assert (found.record["windows"], found.record["tokens"]) == (12, 12 * 16)
    assert found.record["available_windows"] == sum(source["available_windows"] for source in sources)
    assert found.record.keys() == sources[0].keys() | {"sources"}
    assert json.loads(json.dumps(found.record)) == found.record


def test_mixture_of_one_source_is_that_source(files: tuple[str, str]) -> None:
    assert calibrate([files[0]]).record == calibrate({files[0]: 0.1}).record == calibrate(files[0]).record
    assert calibrate([TEXTS]).record == calibrate(TEXTS).record


def test_source_that_is_too_short(files: tuple[str, str]) -> None:
    with pytest.raises(CalibrationDataError, match=r"2 texts: found 3 windows .* expected 6 for num_samples=12"):
        calibrate([files[0], ["0123456789" * 3, "abcdefghij" * 2]])


def test_windows_of_different_lengths(files: tuple[str, str]) -> None:
    ready = torch.randint(3, 200, (6, 8), generator=torch.Generator().manual_seed(0))
    with pytest.raises(CalibrationDataError, match=r"same length.*prose.txt 16, .*token ids \(6, 8\) 8"):
        calibrate([files[0], ready])
    assert calibrate([files[0], ready], length=8).tokens.shape == (12, 8)


def test_dict_without_numbers() -> None:
    with pytest.raises(CalibrationDataError, match="a number for each source as its weight, found the keys 'c4'"):
        calibrate({"c4": "half"})


def test_text_of_the_model_itself_needs_the_model() -> None:
    with pytest.raises(CalibrationDataError, match="no model was given"):
        calibrate("self")
    with pytest.raises(CalibrationDataError, match=r"'self' is text that the dense model writes.*\./self"):
        evaluation_windows("self", tokenizer(), sequence_length=16)


# ------------------------------------------------------------------------------------------ configuration and records


@pytest.mark.parametrize("dataset", [["c4", "code.txt"], {"c4": 0.5, "wikitext2": 0.3, "code.txt": 0.2}])
def test_configuration_is_reloaded_from_json(dataset: Any) -> None:
    config = ModeGPTConfig(dataset=dataset)
    fields = json.loads(json.dumps(config.to_dict()))
    assert fields["dataset"] == (dataset if isinstance(dataset, dict) else dict.fromkeys(dataset, 1.0))
    assert ModeGPTConfig.from_dict(fields) == config


def test_objects_in_memory_are_replaced_in_json() -> None:
    fields = ModeGPTConfig(dataset=("c4", Path("code.txt"), TEXTS)).to_dict()
    assert fields["dataset"] == ["c4", "code.txt", "in memory: list 60 items"]
    with pytest.raises(InvalidConfig, match=r"in memory: list 60 items.*pass the dataset again"):
        ModeGPTConfig.from_dict(fields)


def test_paths_are_shortened_in_records(files: tuple[str, str]) -> None:
    assert without_folders([*files, "c4"]) == ["prose.txt", "code.txt", "c4"]
    assert without_folders({files[0]: 0.5, "c4": 0.5}) == {"prose.txt": 0.5, "c4": 0.5}


def test_interrupted_compression_resumes_with_the_same_mixture_only(
    files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compress(dataset: Any) -> Any:
        quantizer = ModeGPTQuantizer({**RECIPE, "dataset": dataset})
        checkpoint = Checkpoint(tmp_path / "work")
        quantizer.compress_model(dense("llama-gqa-tied"), tokenizer(), checkpoint=checkpoint, progress=False)
        return quantizer.report

    finished = []

    def keep(*arguments: Any) -> Any:
        finished.append(keep_block(*arguments))
        if len(finished) == 2:
            raise KeyboardInterrupt
        return finished[-1]

    with monkeypatch.context() as patch:
        patch.setattr(compress_module, "keep_block", keep)
        with pytest.raises(KeyboardInterrupt):
            compress(list(files))
    with pytest.raises(CheckpointError, match="dataset"):
        compress({files[0]: 2, files[1]: 1})
    assert compress({files[1]: 1, files[0]: 1}).stages[0].name == "earlier runs"


# ------------------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["c4"], "c4"),
        (["c4", "imdb"], {"c4": 1.0, "imdb": 1.0}),
        (["c4=0.7", "chats.jsonl=.3", "x=y.txt=2"], {"c4": 0.7, "chats.jsonl": 0.3, "x=y.txt": 2.0}),
        (["a=b.txt"], "a=b.txt"),
    ],
)
@pytest.mark.parametrize("verb", ["compress", "estimate", "recover"])
def test_names_and_weights_on_the_command_line(verb: str, words: list[str], expected: Any) -> None:
    output = [] if verb == "estimate" else ["--output", "o"]
    options = cli.build_parser().parse_args([verb, "m", "--dataset", *words, *output])
    assert options.dataset == expected
    assert ModeGPTConfig(dataset=options.dataset).dataset == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "--dataset", "c4=1", "imdb"], "NAME=WEIGHT for all names or for none"),
        (["m", "--dataset", "c4", "c4"], "'c4' twice"),
        (["--dataset", "c4", "m"], "MODEL (write it before --dataset"),
    ],
)
def test_invalid_names_on_the_command_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.build_parser().parse_args(["compress", *words, "--output", "o"])
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory, files: tuple[str, str]) -> Path:
    place = tmp_path_factory.mktemp("place")
    dense = save_dense(place / "dense")
    words = [str(dense), "--dataset", f"{files[0]}=3", f"{files[1]}=1", *FLAGS, "--output", str(place / "out")]
    assert cli.main(["compress", *words]) == 0
    return place / "out"


def test_report_card_and_inspect_name_the_shares(compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads((compressed / "report.json").read_text(encoding="utf-8"))
    assert report["config"]["dataset"] == {"prose.txt": 3.0, "code.txt": 1.0}
    assert "prose.txt=3 code.txt=1" in " ".join(report["commands"]["compress"])
    windows = [source["windows"] for source in report["calibration"]["sources"]]
    assert windows == divide([3, 1], report["calibration"]["windows"])
    card = ModelCard.load(compressed / "README.md").text
    assert f"{windows[0]} windows of `prose.txt`" in card
    assert "--dataset prose.txt=3 code.txt=1" in card
    assert "dataset={'code.txt': 1.0, 'prose.txt': 3.0}" in card
    assert cli.main(["inspect", str(compressed)]) == 0
    assert f"{windows[0]} of prose.txt, {windows[1]} of code.txt" in capsys.readouterr().out


def test_card_names_the_hub_datasets_of_a_mixture(compressed: Path) -> None:
    found = read(compressed)
    sources = [{"name": "wikitext2", "revision": "1"}, {"name": "own.txt"}, {"name": "org/chats", "revision": "2"}]
    record = {**found.record, "calibration": {**found.record["calibration"], "sources": sources}}
    data = front_matter(dataclasses.replace(found, record=record))
    assert data.datasets == ["Salesforce/wikitext", "org/chats"]


def test_evaluation_on_several_texts(
    compressed: Path, files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = tmp_path / "scores.json"
    words = ["evaluate", str(compressed), "--reference", str(compressed.with_name("dense")), "--max-windows", "3"]
    single = []
    for file in files:
        assert cli.main([*words, "--dataset", file, "--json", str(scores)]) == 0
        single.append(json.loads(scores.read_text(encoding="utf-8")))
    capsys.readouterr()
    assert cli.main([*words, "--dataset", *files, "--json", str(scores), "--update-card"]) == 0
    found = json.loads(scores.read_text(encoding="utf-8"))
    assert found["settings"]["flags"][2:5] == ["--dataset", "prose.txt", "code.txt"]
    for entry, alone in zip(found["texts"], single, strict=True):
        assert entry == {key: alone[key] for key in alone if key not in ("model", "settings")}
    ratios = {each["text"]["name"]: each["perplexity"] / each["reference_perplexity"] for each in single}
    worst = max(ratios, key=ratios.__getitem__)
    assert found["worst"]["perplexity_ratio"] == {"text": worst, "value": ratios[worst]}
    assert found["worst"]["perplexity"]["value"] == max(each["perplexity"] for each in single)
    assert f"{ratios[worst]:.4f}" in capsys.readouterr().out
    stored = json.loads((compressed / "evaluation.json").read_text(encoding="utf-8"))
    assert [entry["text"]["name"] for entry in stored["texts"]] == ["prose.txt", "code.txt"]
    card = (compressed / "README.md").read_text(encoding="utf-8")
    assert card.count("--dataset prose.txt code.txt") == 1
    for entry in found["texts"]:
        assert f"**{entry['perplexity']:.2f}**" in card


def test_evaluation_of_several_texts_has_no_split(
    compressed: Path, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", str(compressed), "--dataset", *files, "--dataset-split", "train"]) == 2
    assert "--dataset-split applies to a single text, found 2" in capsys.readouterr().err


def test_flags_of_a_mixture() -> None:
    assert flags({"dataset": {"c4": 0.5, "a.txt": 1 / 3}}) == ["--dataset", "c4=0.5", "a.txt=0.3333333333"]
    assert flags({"dataset": ["c4", "a.txt"]}) == ["--dataset", "c4", "a.txt"]
