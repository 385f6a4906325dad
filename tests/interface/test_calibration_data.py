"""Test the windows of calibration and evaluation: every source, how text is cut, the record, and every error."""

import hashlib
import json
import logging
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset_builder
from forks import run_forked
from tiny_models import dense
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerFast

from optimum_modegpt import demo, perplexity
from optimum_modegpt.calibration import parsing
from optimum_modegpt.calibration.data import (
    TokenWindows,
    calibration_windows,
    describe_degenerate,
    evaluation_windows,
    resolve_sequence_length,
)
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import CalibrationDataError, InvalidConfig

TEXT = " ".join(f"{number * 7919 % 1000} bottles of beer on the wall\r\nand then" for number in range(200)) + " fin é"
DOCUMENTS = [f"document {number}: " + "lorem ipsum " * (number % 7 + 1) for number in range(40)]
CHATS = [
    [{"role": "user", "content": f"How much is {n}+{n}?"}, {"role": "assistant", "content": f"it is {2 * n}."}]
    for n in range(30)
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_tokenizer(template: str = "$A") -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes and <s>, which `template` adds unless special tokens are disabled; a context of 8."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", model_max_length=8)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def bos_tokenizer():
    return make_tokenizer("<s> $A")


@pytest.fixture(scope="module")
def chat_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(TEXT.encode())
    return path


def calibrate(dataset, tokenizer, *, length=16, samples=8, **options):
    """Call `calibration_windows` with options of its own or fields of the configuration."""
    own = {name: options.pop(name) for name in ("hub", "vocab_size", "context") if name in options}
    config = ModeGPTConfig(dataset=dataset, num_samples=samples, **options)
    return calibration_windows(config, tokenizer, sequence_length=length, **own)


def refused(dataset, tokenizer, *parts, **options):
    """Return the error that calibrating on `dataset` raises, and check that its message contains all `parts`."""
    with pytest.raises(CalibrationDataError) as caught:
        calibrate(dataset, tokenizer, **options)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    return caught.value


def cut(text, tokenizer, length):
    """Cut a text into windows as the prototype of this package did."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    return ids[: len(ids) // length * length].view(-1, length)


def draw(windows, samples, seed):
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))][:samples]


# Windows and their record


def test_text_file_follows_the_prototypes_rule(text_file, tokenizer):
    expected = cut(text_file.read_text(encoding="utf-8"), tokenizer, 16)
    got = calibrate(str(text_file), tokenizer, seed=3)
    assert torch.equal(got.tokens, draw(expected, 8, 3))
    assert got.tokens.dtype == torch.int64
    assert 256 not in got.tokens  # no special token
    assert got.record["available_windows"] == len(expected)


def test_record_describes_the_text(text_file, tokenizer):
    got = calibrate(str(text_file), tokenizer)
    digest = hashlib.sha256(np.array([8, 16], dtype="<i8").tobytes() + got.tokens.numpy().astype("<i8").tobytes())
    assert got.record == {
        "name": "book.txt",
        "split": None,
        "revision": None,
        "text_column": None,
        "file_sha256": hashlib.sha256(text_file.read_bytes()).hexdigest(),
        "windows": 8,
        "sequence_length": 16,
        "tokens": 128,
        "available_windows": got.record["available_windows"],
        "first_token": None,
        "sha256": digest.hexdigest(),
    }
    assert json.loads(json.dumps(got.record)) == got.record


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A <s>"])
def test_windows_begin_as_prompts_do(text_file, template):
    tokenizer = make_tokenizer(template)
    expected = cut(text_file.read_text(encoding="utf-8"), tokenizer, 16)
    expected[:, 0] = tokenizer.bos_token_id
    got = calibrate(str(text_file), tokenizer, seed=3)
    assert torch.equal(got.tokens, draw(expected, 8, 3))
    assert got.record["first_token"] == "<s>"
    assert json.loads(json.dumps(got.record)) == got.record
    got = evaluation_windows(str(text_file), tokenizer, sequence_length=16)
    assert torch.equal(got.tokens, expected)
    assert got.record["first_token"] == "<s>"


def test_token_at_the_end_of_a_text_opens_no_window(text_file, tokenizer):
    got = calibrate(str(text_file), make_tokenizer("$A <s>"))
    assert torch.equal(got.tokens, calibrate(str(text_file), tokenizer).tokens)
    assert got.record["first_token"] is None


def test_opening_changes_nothing_but_the_first_token(text_file, tokenizer, bos_tokenizer):
    plain, opened = (calibrate(str(text_file), each) for each in (tokenizer, bos_tokenizer))
    assert torch.equal(plain.tokens[:, 1:], opened.tokens[:, 1:])
    differing = {key for key in plain.record if plain.record[key] != opened.record[key]}
    assert differing == {"first_token", "sha256"}


def test_tokenizer_whose_first_token_the_model_does_not_know(text_file, bos_tokenizer):
    refused(str(text_file), bos_tokenizer, "256", "vocabulary of 256", vocab_size=256)


def test_a_record_without_some_keys_is_completed():
    ids = torch.arange(32).view(2, 16)
    whole = calibrate(ids, None).record
    assert TokenWindows(ids, {}).record == whole | {"name": "in memory: token ids"}
    given = {"name": "mine", "windows": 7, "tokenizer": "gpt2"}
    assert TokenWindows(ids, given).record == whole | given | {"windows": 2}
    assert given["windows"] == 7


def test_hash_covers_the_shape():
    wide = calibrate(torch.arange(32).view(2, 16), None).record
    narrow = calibrate(torch.arange(32).view(4, 8), None).record
    assert wide["sha256"] != narrow["sha256"]


def test_same_seed_same_windows_other_seed_others(text_file, tokenizer):
    first, again, other = (calibrate(str(text_file), tokenizer, seed=seed) for seed in (0, 0, 1))
    assert first.record == again.record
    assert first.record["sha256"] != other.record["sha256"]


def test_global_random_state_is_left_alone(text_file, tokenizer):
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    calibrate(str(text_file), tokenizer)
    calibrate(Dataset.from_dict({"text": DOCUMENTS}).to_iterable_dataset(), tokenizer)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_no_warning_about_the_context_and_none_lost_for_others(text_file, caplog):
    tokenizer = make_tokenizer()  # each warns only once
    with caplog.at_level(logging.WARNING, logger="transformers"):
        logging.getLogger("transformers").addHandler(caplog.handler)
        try:
            calibrate(str(text_file), tokenizer)
            assert "longer than" not in caplog.text
            tokenizer("more than eight tokens")
            assert "longer than" in caplog.text
        finally:
            logging.getLogger("transformers").removeHandler(caplog.handler)


def test_too_few_windows(text_file, tokenizer):
    available = len(cut(text_file.read_text(encoding="utf-8"), tokenizer, 16))
    calibrate(str(text_file), tokenizer, samples=available)
    refused(
        str(text_file),
        tokenizer,
        "book.txt",
        f"{available} windows of 16 tokens",
        f"num_samples={available + 1}",
        "sequence_length",
        samples=available + 1,
    )


def test_tokenizer_of_another_model(text_file, tokenizer):
    refused(str(text_file), tokenizer, "vocabulary of 40", "tokenizer that belongs", vocab_size=40)


def test_text_without_tokenizer(text_file):
    refused(str(text_file), None, "tokenizer=")


@pytest.mark.parametrize(
    ("requested", "context", "expected"),
    [(None, None, 2048), (None, 512, 512), (None, 131072, 2048), (512, 512, 512), (4096, None, 4096), (8, 512, 8)],
)
def test_sequence_length(requested, context, expected):
    assert resolve_sequence_length(requested, context) == expected


def test_sequence_length_above_the_context():
    with pytest.raises(InvalidConfig, match=r"sequence_length=1024 .* context of 512"):
        resolve_sequence_length(1024, 512)
    with pytest.raises(InvalidConfig, match="at least 2 tokens"):
        resolve_sequence_length(1, 512)


# Files


def test_byte_order_mark_is_no_text(tmp_path, tokenizer):
    (tmp_path / "plain.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "marked.txt").write_text(TEXT, encoding="utf-8-sig")
    plain, marked = (calibrate(str(tmp_path / name), tokenizer) for name in ("plain.txt", "marked.txt"))
    assert torch.equal(plain.tokens, marked.tokens)


def test_text_file_that_is_not_utf8(tmp_path, tokenizer):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1") * 100)
    error = refused(str(tmp_path / "latin.txt"), tokenizer, "latin.txt", "UTF-8")
    assert isinstance(error.__cause__, UnicodeDecodeError)


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.json", "empty.parquet"])
def test_empty_file(tmp_path, tokenizer, name):
    (tmp_path / name).touch()
    refused(str(tmp_path / name), tokenizer, name, "empty")


@pytest.mark.parametrize(("name", "content"), [("bom.txt", "\ufeff"), ("blank.jsonl", "\n \n"), ("none.json", "[]")])
def test_file_without_text(tmp_path, tokenizer, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    refused(str(tmp_path / name), tokenizer, name)


@pytest.mark.parametrize(
    "name", ["nowhere.txt", "nowhere.jsonl", "data/nowhere.csv", "./nowhere", "/no/such/folder", "a/b/c", "~/nowhere"]
)
def test_missing_file_is_not_looked_for_on_the_hub(tokenizer, name, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *_, **__: pytest.fail("the Hub was asked"))
    refused(name, tokenizer, "no such file or folder")


def test_text_passed_as_a_name(tokenizer):
    error = refused("Once upon a time there was a text. " * 500, tokenizer, "pass it in a list")
    assert len(str(error)) < 300


def test_unknown_suffix(tmp_path, tokenizer):
    (tmp_path / "table.csv").write_text("text\na\n")
    refused(str(tmp_path / "table.csv"), tokenizer, "table.csv", ".csv", ".txt", ".jsonl", ".json", ".parquet")


def test_path_object(text_file, tokenizer):
    assert torch.equal(calibrate(text_file, tokenizer).tokens, calibrate(str(text_file), tokenizer).tokens)


def write_table(folder: Path, kind: str, rows: list[dict]) -> Path:
    path = folder / f"odd [name].{kind}"
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_table_is_joined_by_blank_lines(tmp_path, tokenizer, kind):
    path = write_table(tmp_path, kind, [{"text": text, "other": index} for index, text in enumerate(DOCUMENTS)])
    got = calibrate(str(path), tokenizer, seed=5)
    assert torch.equal(got.tokens, draw(cut("\n\n".join(DOCUMENTS), tokenizer, 16), 8, 5))
    assert got.record["name"] == path.name
    assert (got.record["split"], got.record["text_column"]) == (None, "text")
    assert got.record["file_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_changed_file_is_read_again(tmp_path, tokenizer):
    first = calibrate(str(write_table(tmp_path, "jsonl", [{"text": "ab" * 250}])), tokenizer)
    second = calibrate(str(write_table(tmp_path, "jsonl", [{"text": "bc" * 250}])), tokenizer)
    assert not torch.equal(first.tokens, second.tokens)


@pytest.mark.parametrize(("name", "content"), [("bad.jsonl", '{"text": "a"}\n{oops\n'), ("bad.parquet", "nothing")])
def test_broken_table(tmp_path, tokenizer, name, content):
    (tmp_path / name).write_text(content)
    error = refused(str(tmp_path / name), tokenizer, name, "cannot be read")
    assert error.__cause__ is not None


def test_column_of_a_text_file(text_file, tokenizer):
    refused(str(text_file), tokenizer, "'other'", "a .txt file has no columns", text_column="other")


def write_all(folder: Path, rows: list[str]) -> dict[str, Path]:
    """Write the same rows to files, and to folders of both kinds."""
    table = [{"text": row} for row in rows]
    (folder / "files").mkdir()
    write_table(folder / "files", "jsonl", table)
    Dataset.from_list(table).save_to_disk(folder / "rows")
    DatasetDict(train=Dataset.from_list(table)).save_to_disk(folder / "saved")
    (folder / "lines.txt").write_text("".join(row + "\n" for row in rows))
    places = {
        "files": folder / "files",
        "rows": folder / "rows",
        "saved": folder / "saved",
        "txt": folder / "lines.txt",
    }
    return places | {kind: write_table(folder, kind, table) for kind in ("jsonl", "json", "parquet")}


@pytest.mark.parametrize(
    ("split", "first", "end"), [("train", 0, 40), ("train[:10]", 0, 10), ("train[10%:]", 4, 40), ("train[-3:]", 37, 40)]
)
def test_slices_of_files_and_folders(tmp_path, tokenizer, split, first, end):
    for kind, path in write_all(tmp_path, DOCUMENTS).items():
        rows = DOCUMENTS[first:end]
        expected = "".join(row + "\n" for row in rows) if kind == "txt" else "\n\n".join(rows)
        got = calibrate(str(path), tokenizer, samples=2, dataset_split=split)
        assert torch.equal(got.tokens, draw(cut(expected, tokenizer, 16), 2, 0)), kind
        assert got.record["split"] == split
        got = evaluation_windows(str(path), tokenizer, sequence_length=16, split=split)
        assert torch.equal(got.tokens, cut(expected, tokenizer, 16)), kind


def test_slices_of_data_in_memory(tokenizer):
    rows = Dataset.from_dict({"text": DOCUMENTS})
    expected = draw(cut("\n\n".join(DOCUMENTS[5:15]), tokenizer, 16), 2, 0)
    for data in (rows, DatasetDict(train=rows), DatasetDict(train=rows, test=rows)):
        assert torch.equal(calibrate(data, tokenizer, samples=2, dataset_split="train[5:15]").tokens, expected)
    both = calibrate(DatasetDict(train=rows, test=rows), tokenizer, samples=2, dataset_split="train[5:10]+test[10:15]")
    assert torch.equal(both.tokens, expected)


@pytest.mark.parametrize("split", ["test", "train[", "train[:x]", "test[:10]", ""])
def test_split_that_files_and_folders_do_not_have(tmp_path, tokenizer, split):
    for path in write_all(tmp_path, DOCUMENTS).values():
        refused(str(path), tokenizer, repr(split), "splits: train", "train[:10%]", dataset_split=split)


def test_streamed_dataset_has_no_slices(tokenizer):
    streamed = Dataset.from_dict({"text": DOCUMENTS}).to_iterable_dataset()
    refused(streamed, tokenizer, "'train[:10]'", "streamed", dataset_split="train[:10]")


# Lists, conversations, datasets


def test_list_of_strings(tokenizer):
    got = calibrate(DOCUMENTS, tokenizer)
    assert torch.equal(got.tokens, draw(cut("\n\n".join(DOCUMENTS), tokenizer, 16), 8, 0))
    assert got.record["name"] == "in memory: 40 texts"


def test_column_of_a_dataset_is_a_list(tokenizer):
    column = Dataset.from_dict({"text": DOCUMENTS})["text"]
    assert torch.equal(calibrate(column, tokenizer).tokens, calibrate(DOCUMENTS, tokenizer).tokens)


@pytest.mark.parametrize(
    ("items", "parts"),
    [
        ([], ["found none"]),
        (["text", [1, 2]], ["numbers and text"]),
        (["text", CHATS[0]], ["conversation and text"]),
        (["text", None], ["NoneType and text"]),
        ([b"bytes"], ["found bytes"]),
        ([[["nested"]]], ["found list"]),
        (["", ""], ["no text"]),
        ([{"text": "row"}], ["'role' and 'content'", "text"]),
    ],
)
def test_list_that_cannot_be_read(chat_tokenizer, items, parts):
    refused(items, chat_tokenizer, *parts)


def test_other_types_are_refused(tokenizer):
    refused((text for text in DOCUMENTS), tokenizer, "generator", "expected a name")


def render(conversations):
    return "".join("<s>" + "".join(f"<{m['role']}>{m['content']}" for m in chat) for chat in conversations)


def test_conversations_go_through_the_chat_template(chat_tokenizer):
    got = calibrate(CHATS, chat_tokenizer)
    assert torch.equal(got.tokens, draw(cut(render(CHATS), chat_tokenizer, 16), 8, 0))
    assert (got.tokens == 256).any()  # the template's own special token is one token
    assert got.record["name"] == "in memory: 30 conversations"


def test_window_that_begins_with_a_conversation_is_opened_once(chat_tokenizer):
    opening = make_tokenizer("<s> $A")
    opening.chat_template = chat_tokenizer.chat_template
    got = evaluation_windows(CHATS, opening, sequence_length=16)
    assert got.tokens[:, 0].tolist() == [256] * len(got.tokens)
    assert got.tokens[0, 1] != 256
    assert torch.equal(got.tokens[:, 1:], cut(render(CHATS), opening, 16)[:, 1:])


def test_single_conversation(chat_tokenizer):
    messages = [message for chat in CHATS for message in chat]
    got = calibrate(messages, chat_tokenizer)
    assert torch.equal(got.tokens, draw(cut(render([messages]), chat_tokenizer, 16), 8, 0))


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("kind", ["jsonl", "dataset"])
def test_column_of_conversations(tmp_path, chat_tokenizer, column, kind):
    rows = [{"source": "a", "id": "b", column: chat} for chat in CHATS]
    dataset = Dataset.from_list(rows) if kind == "dataset" else str(write_table(tmp_path, "jsonl", rows))
    got = calibrate(dataset, chat_tokenizer)
    assert torch.equal(got.tokens, calibrate(CHATS, chat_tokenizer).tokens)
    assert got.record["text_column"] == column


def test_conversations_without_a_template(tokenizer):
    refused(CHATS, tokenizer, "chat template")


def test_template_that_refuses(chat_tokenizer):
    chats = [*CHATS, [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]]
    error = refused(chats, chat_tokenizer, "user, tool", "no tools here")
    assert error.__cause__ is not None


def test_dataset_without_a_usual_column_takes_its_only_string_column(tokenizer):
    got = calibrate(Dataset.from_dict({"id": list(range(40)), "body": DOCUMENTS}), tokenizer)
    assert torch.equal(got.tokens, calibrate(DOCUMENTS, tokenizer).tokens)
    assert got.record["text_column"] == "body"
    assert got.record["name"] == "in memory: Dataset"


def test_content_column(tokenizer):
    got = calibrate(Dataset.from_dict({"title": ["t"] * 40, "content": DOCUMENTS}), tokenizer)
    assert got.record["text_column"] == "content"


def test_named_column_goes_before_the_usual_one(tokenizer):
    dataset = Dataset.from_dict({"text": ["t"] * 40, "body": DOCUMENTS})
    got = calibrate(dataset, tokenizer, text_column="body")
    assert torch.equal(got.tokens, calibrate(DOCUMENTS, tokenizer).tokens)


def test_wrong_column(tokenizer):
    dataset = Dataset.from_dict({"title": DOCUMENTS, "body": DOCUMENTS, "id": list(range(40))})
    refused(dataset, tokenizer, "'text'", "title, body, id", text_column="text")
    refused(dataset, tokenizer, "text_column", "one of title, body.")
    refused(dataset, tokenizer, "found int", text_column="id")
    refused(Dataset.from_dict({"id": [1]}), tokenizer, "one of id")


def test_rows_without_text_are_left_out(tokenizer):
    dataset = Dataset.from_dict({"text": [None, *DOCUMENTS[:20], None, *DOCUMENTS[20:]]})
    assert torch.equal(calibrate(dataset, tokenizer).tokens, calibrate(DOCUMENTS, tokenizer).tokens)
    refused(Dataset.from_dict({"text": ["a", None]}).select([1]), tokenizer, "no text")


def test_dataset_without_rows(tokenizer):
    refused(Dataset.from_dict({"text": []}), tokenizer, "no rows")


def splits(**texts):
    return DatasetDict({split: Dataset.from_dict({"text": [(text + "-") * 50]}) for split, text in texts.items()})


@pytest.mark.parametrize(
    ("available", "asked", "calibrated", "evaluated"),
    [
        ({"test": "b", "validation": "c", "train": "a"}, None, "train", "test"),
        ({"train": "a", "validation": "c"}, None, "train", "validation"),
        ({"train": "a", "extra": "c"}, None, "train", "train"),
        ({"only": "a"}, None, "only", "only"),
        ({"train": "a", "extra": "c"}, "extra", "extra", "extra"),
    ],
)
def test_choice_of_the_split(tokenizer, available, asked, calibrated, evaluated):
    data = splits(**available)
    got = calibrate(data, tokenizer, samples=2, dataset_split=asked)
    assert got.record["split"] == calibrated
    assert tokenizer.decode(got.tokens[0]) == f"{available[calibrated]}-" * 8
    got = evaluation_windows(data, tokenizer, sequence_length=16, split=asked)
    assert got.record["split"] == evaluated
    assert tokenizer.decode(got.tokens[0]) == f"{available[evaluated]}-" * 8


def test_split_that_is_not_there(tokenizer):
    refused(splits(test="a", dev="b"), tokenizer, "no split train", "splits: test, dev")
    refused(splits(test="a", dev="b"), tokenizer, "'other'", "splits: test, dev", dataset_split="other")
    refused(splits(test="a"), tokenizer, "'train'", "splits: test", dataset_split="train")
    refused(Dataset.from_dict({"text": [TEXT]}), tokenizer, "'test'", dataset_split="test")


def test_folders(tmp_path, tokenizer):
    splits(train="a", test="b").save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    for split, data in splits(train="a", test="b").items():
        data.to_parquet(tmp_path / "files" / f"{split}.parquet")
    for folder in ("saved", "files"):
        got = calibrate(str(tmp_path / folder), tokenizer, samples=2)
        assert (got.record["name"], got.record["split"]) == (folder, "train")
        assert tokenizer.decode(got.tokens[0]) == "a-" * 8
        got = evaluation_windows(str(tmp_path / folder), tokenizer, sequence_length=16)
        assert got.record["split"] == "test"
        assert tokenizer.decode(got.tokens[0]) == "b-" * 8


def test_folder_without_data(tmp_path, tokenizer):
    error = refused(str(tmp_path), tokenizer, tmp_path.name, ".parquet")
    assert error.__cause__ is not None


LOCAL = """
import sys
from optimum_modegpt.calibration.data import evaluation_windows
class Letters:
    def __call__(self, text, **_): return {"input_ids": [ord(letter) for letter in text]}
    def __len__(self): return 0x110000
for place in sys.argv[1:]:
    print(evaluation_windows(place, Letters(), sequence_length=16).record["available_windows"])
"""


def test_local_text_needs_no_cache(tmp_path):
    places = write_all(tmp_path, DOCUMENTS)
    cache = tmp_path / "cache"
    cache.write_text("a file in the way of the folder")
    environment = {**os.environ, "HF_HOME": str(cache), "TMPDIR": str(tmp_path)}
    run = run_forked(LOCAL, [*map(str, places.values())], env=environment)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.split()) == len(places)
    assert not list(tmp_path.glob("tmp*"))


# Streamed and large sources


def counted(read: list[int]) -> IterableDataset:
    def rows():
        for number in range(100_000):
            read.append(number)
            yield {"text": f"row {number} " * 10}

    return IterableDataset.from_generator(rows)


def test_streamed_dataset_is_read_as_far_as_needed(tokenizer):
    read: list[int] = []
    got = calibrate(counted(read), tokenizer, samples=20)
    assert got.tokens.shape == (20, 16)
    assert len(set(read)) < 1100  # the shuffle buffer and a few more
    assert got.record["name"] == "in memory: IterableDataset"
    assert got.record["sha256"] == calibrate(counted([]), tokenizer, samples=20).record["sha256"]
    assert got.record["sha256"] != calibrate(counted([]), tokenizer, samples=20, seed=1).record["sha256"]


def test_seed_chooses_the_documents_of_a_stream(tokenizer):
    chosen = []
    for seed in (0, 1):
        text = " ".join(tokenizer.batch_decode(calibrate(counted([]), tokenizer, samples=20, seed=seed).tokens))
        chosen.append(set(re.findall(r"row (\d+) ", text)))
    assert len(chosen[0] & chosen[1]) < len(chosen[0]) / 2


def test_streamed_dataset_is_evaluated_in_order(tokenizer):
    read: list[int] = []
    got = evaluation_windows(counted(read), tokenizer, sequence_length=16, max_windows=20)
    whole = "\n\n".join(f"row {number} " * 10 for number in range(100))
    assert torch.equal(got.tokens, cut(whole, tokenizer, 16)[:20])
    assert max(read) < 100
    with pytest.raises(CalibrationDataError, match="max_windows"):
        evaluation_windows(counted([]), tokenizer, sequence_length=16)


def test_streamed_dataset_that_ends_too_soon(tokenizer):
    refused(Dataset.from_dict({"text": ["short"]}).to_iterable_dataset(), tokenizer, "shorter than one window")


def test_stream_that_breaks_off(tokenizer):
    def rows():
        yield {"text": "a"}
        raise ConnectionError("the line went dead")

    error = refused(IterableDataset.from_generator(rows), tokenizer, "the line went dead", "list of strings")
    assert error.__cause__ is not None


class Counting:
    """A tokenizer whose tokens are letters. It counts the letters that it encodes."""

    def __init__(self):
        self.letters = 0

    def __call__(self, text, *, add_special_tokens, verbose):
        self.letters += len(text)
        return {"input_ids": [ord(letter) for letter in text]}

    def __len__(self):
        return 256


def test_large_dataset_is_tokenised_in_part():
    large = Dataset.from_dict({"text": [(chr(97 + number) + "- ,") * 250_000 for number in range(20)]})
    runs = [calibrate(large, counting := Counting(), seed=seed).tokens for seed in (0, 0, 1)]
    assert counting.letters < 2**18  # the beginning of one document, once to count and once to cut
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    got = evaluation_windows(large, counting, sequence_length=16, max_windows=4)
    assert got.tokens.unique().tolist() == sorted(map(ord, "a- ,"))
    small = large.select([0, 2])  # its table is still large
    assert calibrate(small, counting).record["available_windows"] == (2 * 10**6 + 2) // 16
    listed = calibrate(large["text"], counting, seed=0)
    assert torch.equal(listed.tokens, runs[0])


LARGE = 17 * 10**6
"""Number of characters of a text of which only a part is read."""


def test_large_text_file_is_read_in_part(tmp_path):
    numbers = " ".join(map(str, range(5 * 10**6 // 2)))[:LARGE]
    (tmp_path / "large.txt").write_text(numbers)
    (tmp_path / "small.txt").write_text(numbers[:10_000])
    large, small = str(tmp_path / "large.txt"), str(tmp_path / "small.txt")
    runs = [calibrate(large, counting := Counting(), seed=seed, samples=20, length=1024) for seed in (0, 0, 1)]
    assert counting.letters < 10**5
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    assert not torch.equal(runs[0].tokens, runs[2].tokens)
    found = [int(number) for number in re.findall(r" (\d+) ", "".join(map(chr, runs[0].tokens[0].tolist())))]
    assert min(found) > 10**4  # the text is drawn from all of the file, not from its beginning
    whole = evaluation_windows(small, Counting(), sequence_length=16, max_windows=20).tokens
    assert torch.equal(evaluation_windows(large, counting, sequence_length=16, max_windows=20).tokens, whole)
    assert counting.letters < 3 * 10**5


@pytest.mark.parametrize("letters", ["x", "x ", "x\n", "x   "])
def test_line_of_any_kind_is_cut_into_pieces(letters):
    text = letters * 10_000
    found = list(parsing.pieces(text, 64))
    assert "".join(found) == text
    assert max(map(len, found)) <= 128


def prepending_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer like SentencePiece, which adds ▁ before a text and merges words with the ▁ before them."""
    words = ["▁the", "▁a", "▁cat", "▁sat"]
    letters = sorted({*"".join(words), *"\n,.", "▁"})
    merges = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    tokens = dict.fromkeys([*letters, *("".join(pair) for pair in merges)])
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("kind", ["demo", "prepending"])
@pytest.mark.parametrize("line_end", ["\n", " ", "\n\n", ",\n  "])
def test_pieces_have_the_tokens_of_the_whole(monkeypatch, kind, line_end):
    if kind == "demo":
        tokenizer, text = (
            AutoTokenizer.from_pretrained(demo.MODEL_DIR),
            demo.EVALUATION_TEXT.read_text(encoding="utf-8"),
        )
    else:
        tokenizer, text = prepending_tokenizer(), "the cat sat, a cat\n" * 2000
    text = text[:30_000].replace("\n", line_end)
    whole = parsing.encode(tokenizer, text)
    monkeypatch.setattr(parsing, "WHOLE_TEXT", 100)
    monkeypatch.setattr(parsing, "PIECE", 97)
    assert torch.equal(parsing.encode(tokenizer, text), whole)


# Blank rows and degenerate windows


@pytest.mark.parametrize("kind", ["list", "dataset", "jsonl", "parquet"])
def test_blank_rows_add_nothing_to_calibration(tmp_path, tokenizer, kind):
    rows = ["", *(row for document in DOCUMENTS for row in (document, " \n\t", ""))]
    table = [{"text": row} for row in rows]
    data = {"list": rows, "dataset": Dataset.from_list(table)}.get(kind) or str(write_table(tmp_path, kind, table))
    assert torch.equal(calibrate(data, tokenizer).tokens, calibrate(DOCUMENTS, tokenizer).tokens)
    got = evaluation_windows(data, tokenizer, sequence_length=16)  # as for published perplexities
    assert torch.equal(got.tokens, cut("\n\n".join(rows), tokenizer, 16))


def test_text_without_a_word_is_refused(tmp_path, tokenizer):
    (tmp_path / "lines.txt").write_text("\n \n" * 3000)
    for data in ([""] * 3000, Dataset.from_dict({"text": ["", " "] * 1500}), str(tmp_path / "lines.txt")):
        refused(data, tokenizer, "contains no text")
        with pytest.raises(CalibrationDataError, match="contains no text"):
            evaluation_windows(data, tokenizer, sequence_length=16)


def windows_of(count: int, length: int, distinct: int) -> torch.Tensor:
    return (torch.arange(length) % distinct).expand(count, -1).contiguous()


@pytest.mark.parametrize(
    ("length", "distinct", "fewest"),
    [
        (2, 2, 0),
        (2, 1, 2),
        (8, 1, 2),
        (15, 2, 0),
        (16, 1, 2),
        (16, 2, 0),
        (24, 2, 3),
        (24, 3, 0),
        (32, 3, 4),
        (512, 3, 4),
        (512, 4, 0),
    ],
)
def test_windows_of_few_tokens_are_no_text(length, distinct, fewest, caplog):
    good = torch.arange(20 * length).view(20, length) % 1000
    poor = windows_of(20, length, distinct)
    some, most = torch.cat([good, poor[:3]]), torch.cat([good[:10], poor[:11]])
    if not fewest:
        assert describe_degenerate(calibrate(poor, None, context=length)) is None
        assert evaluation_windows(poor, None, sequence_length=length).record["windows"] == 20
        return
    few = f"windows contain fewer than {fewest} distinct tokens"
    assert f"3 of the 23 {few}" in str(describe_degenerate(calibrate(some, None, samples=23, context=length)))
    refused(most, None, f"11 of the 21 {few}", samples=21, context=length)
    assert not caplog.records
    evaluation_windows(some, None, sequence_length=length)
    assert f"3 of the 23 {few}" in caplog.text
    with pytest.raises(CalibrationDataError, match=f"11 of the 21 {few}"):
        evaluation_windows(most, None, sequence_length=length)


def test_a_window_of_one_token_after_the_opening_one_is_not_degenerate():
    ids = torch.tensor([[1, 5]] * 8)
    assert describe_degenerate(TokenWindows(ids, {"first_token": "<s>"})) is None


def test_long_runs_of_blank_lines_add_nothing_to_calibration(tmp_path, tokenizer):
    lines = [f"The cat number {number} sat on the mat." for number in range(200)]
    (tmp_path / "long.txt").write_text("\n \n\t\n" * 500 + ("\n \n\t\n" * 4).join(lines))
    (tmp_path / "short.txt").write_text("\n\n" + "\n\n".join(lines))
    long, short = (calibrate(str(tmp_path / name), tokenizer).tokens for name in ("long.txt", "short.txt"))
    assert torch.equal(long, short)


def test_opening_token_is_not_counted():
    ids = windows_of(8, 16, 1)
    ids[:, 0] = 5
    assert describe_degenerate(TokenWindows(ids, {"first_token": None})) is None
    assert describe_degenerate(TokenWindows(ids, {"first_token": "<s>"})) is not None


# Token ids


@pytest.mark.parametrize(
    "make",
    [
        lambda ids: ids,
        lambda ids: ids.to(torch.int32),
        lambda ids: ids.numpy().astype(np.uint16),
        lambda ids: ids.tolist(),
        list,
        lambda ids: tuple(row.numpy() for row in ids),
    ],
    ids=["tensor", "int32", "numpy", "lists", "tensors", "arrays"],
)
def test_ready_windows_are_all_taken_in_their_order(make):
    ids = torch.arange(96).view(6, 16)
    got = calibrate(make(ids), None)
    assert got.tokens.dtype == torch.int64
    assert torch.equal(got.tokens, ids)
    assert (got.record["windows"], got.record["available_windows"]) == (6, 6)
    assert got.record["name"] == "in memory: token ids (6, 16)"


def test_more_ready_windows_than_asked_for():
    ids = torch.arange(320).view(20, 16)
    got = calibrate(ids, None, seed=2)
    assert torch.equal(got.tokens, draw(ids, 8, 2))
    assert got.record["available_windows"] == 20


@pytest.mark.parametrize("make", [lambda ids: ids, lambda ids: ids.tolist(), lambda ids: ids.numpy()])
def test_token_ids_of_one_text_are_cut(make):
    ids = torch.arange(333)
    got = calibrate(make(ids), None)
    assert torch.equal(got.tokens, draw(ids[:320].view(20, 16), 8, 0))
    refused(make(ids[:100]), None, "6 windows", "num_samples=8")


@pytest.mark.parametrize("ids", [torch.arange(96).view(6, 16), torch.arange(96)], ids=["windows", "text"])
def test_token_ids_are_not_opened(ids, bos_tokenizer):
    before = ids.clone()
    got = calibrate(ids, bos_tokenizer, samples=6)
    assert set(got.tokens[:, 0].tolist()) == {0, 16, 32, 48, 64, 80}
    assert got.record["first_token"] is None
    got = evaluation_windows(ids, bos_tokenizer, sequence_length=16)
    assert torch.equal(got.tokens, before.view(6, 16))
    assert got.record["first_token"] is None
    assert torch.equal(ids, before)


def test_length_of_ready_windows():
    ids = torch.arange(192).view(6, 32)
    refused(ids, None, "32 tokens", "at most 16", "sequence_length")
    assert calibrate(ids, None, context=64).tokens.shape == (6, 32)
    refused(ids, None, "32 tokens", "24", context=24)
    assert calibrate(ids, None, length=64).tokens.shape == (6, 32)
    assert calibrate(ids, None, length=32, sequence_length=32).record["sequence_length"] == 32
    refused(ids, None, "32 tokens", "at most 16", sequence_length=16, context=64)


@pytest.mark.parametrize(
    ("ids", "parts"),
    [
        (torch.rand(6, 16), ["torch.float32", "integers"]),
        (torch.ones(6, 16, dtype=torch.bool), ["torch.bool"]),
        (np.random.default_rng(0).random((6, 16)), ["float64"]),
        ([[0.5] * 16] * 6, ["torch.float64"]),
        (torch.zeros(2, 3, 16, dtype=torch.int64), ["(2, 3, 16)"]),
        (torch.zeros(0, 16, dtype=torch.int64), ["(0, 16)"]),
        ([[1, 2, 3], [1, 2]], ["equal length", "from 2 to 3"]),
        (torch.full((6, 16), -1), ["from -1"]),
    ],
)
def test_token_ids_that_cannot_be_used(ids, parts):
    refused(ids, None, *parts)


def test_token_ids_beyond_the_vocabulary(tokenizer):
    ids = torch.arange(250, 266).view(1, 16)
    refused(ids, tokenizer, "250 to 265", "257")
    refused(ids, None, "250 to 265", "260", vocab_size=260)
    assert calibrate(ids, tokenizer, vocab_size=300).record["windows"] == 1


def test_token_ids_have_no_split():
    refused(torch.arange(96).view(6, 16), None, "no splits", dataset_split="train")


IDS = torch.arange(128).view(8, 16)


def encodings(ids: torch.Tensor, **more) -> list[dict]:
    rows = ids.tolist()
    return [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row, **more} for row in rows]


ENCODED = {
    "dicts": lambda: encodings(IDS),
    "dicts of tensors": lambda: [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in IDS],
    "encodings": lambda: [BatchEncoding(row) for row in encodings(IDS)],
    "batch": lambda: BatchEncoding({"input_ids": IDS.tolist(), "attention_mask": [[1] * 16] * 8}),
    "batch of tensors": lambda: BatchEncoding({"input_ids": IDS}),
    "dict": lambda: {"input_ids": IDS.numpy()},
    "dataset": lambda: Dataset.from_list(encodings(IDS)),
    "dataset of tensors": lambda: Dataset.from_list(encodings(IDS)).with_format("torch"),
    "stream": lambda: Dataset.from_list(encodings(IDS)).to_iterable_dataset(),
    "other column": lambda: Dataset.from_dict({"input_ids": IDS.tolist(), "id": ["x"] * 8}),
}


@pytest.mark.parametrize("kind", ENCODED)
def test_output_of_a_tokenizer(kind, bos_tokenizer):
    got = evaluation_windows(ENCODED[kind](), bos_tokenizer, sequence_length=32, max_windows=8)
    assert torch.equal(got.tokens, IDS)
    assert got.record["first_token"] is None
    got = calibrate(ENCODED[kind](), bos_tokenizer)
    assert sorted(got.tokens.tolist()) == IDS.tolist()
    assert calibrate(ENCODED[kind](), None, samples=3).record["windows"] == 3


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_tokenised_table(tmp_path, tokenizer, kind):
    path = write_table(tmp_path, kind, encodings(IDS))
    got = calibrate(str(path), tokenizer)
    assert torch.equal(got.tokens, IDS)
    assert (got.record["name"], got.record["text_column"]) == (path.name, "input_ids")


def test_encoding_of_one_text_is_cut():
    got = evaluation_windows({"input_ids": list(range(70))}, None, sequence_length=16)
    assert torch.equal(got.tokens, torch.arange(64).view(4, 16))


def test_text_goes_before_token_ids(tokenizer):
    both = Dataset.from_dict({"input_ids": IDS.tolist(), "text": DOCUMENTS[:8]})
    assert torch.equal(calibrate(both, tokenizer).tokens, calibrate(DOCUMENTS[:8], tokenizer).tokens)
    assert torch.equal(calibrate(both, tokenizer, text_column="input_ids").tokens, IDS)
    renamed = both.rename_column("input_ids", "tokens")
    assert torch.equal(calibrate(renamed, tokenizer, text_column="tokens").tokens, IDS)


def test_large_tokenised_dataset_is_read_in_part():
    ids = torch.arange(2**17 * 34).view(-1, 1024) % 1000
    large = Dataset.from_dict({"input_ids": ids.numpy()})
    assert large.data.nbytes > 2**24
    got = calibrate(large, None, length=1024, samples=5, seed=3)
    assert torch.equal(got.tokens, draw(ids, 5, 3))
    assert got.record["available_windows"] == 5
    assert torch.equal(evaluation_windows(large, None, sequence_length=1024, max_windows=4).tokens, ids[:4])


def padded(mask: list[int]) -> dict:
    return {"input_ids": list(range(len(mask))), "attention_mask": mask}


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([padded([1] * 16 + [0] * 4), padded([1] * 20)], ["attention_mask hides padding", "without padding"]),
        ([padded([1] * 8 + [0] + [1] * 8)], ["attention_mask hides padding or other tokens"]),
        ([padded([1] * 16), padded([1] * 12)], ["equal length", "from 12 to 16", "one list of ids"]),
        ([padded([]), padded([1] * 16), padded([1] * 16)], ["found (0,)"]),
        ([{"input_ids": [1.5] * 16}], ["must be integers"]),
    ],
)
def test_tokenised_rows_that_cannot_be_used(tmp_path, tokenizer, rows, parts):
    refused(rows, tokenizer, *parts)
    refused(Dataset.from_list(rows), tokenizer, "input_ids", *parts)
    refused(str(write_table(tmp_path, "jsonl", rows)), tokenizer, "odd [name].jsonl", *parts)


@pytest.mark.parametrize("value", ["text", None, ["a", "b"]])
def test_input_ids_that_are_none(tokenizer, value):
    refused([{"input_ids": value}], tokenizer, "must be integers, found")


# Evaluation


def test_evaluation_windows_are_in_order(text_file, tokenizer):
    expected = cut(text_file.read_text(encoding="utf-8"), tokenizer, 16)
    got = evaluation_windows(str(text_file), tokenizer, sequence_length=16)
    assert torch.equal(got.tokens, expected)
    got = evaluation_windows(str(text_file), tokenizer, sequence_length=16, max_windows=5)
    assert torch.equal(got.tokens, expected[:5])
    assert (got.record["windows"], got.record["available_windows"]) == (5, len(expected))


def test_only_the_first_windows_of_a_long_text_are_tokenised(tmp_path):
    (tmp_path / "one line.txt").write_text("the cat sat on the mat " * 10**5)
    got = evaluation_windows(str(tmp_path / "one line.txt"), counting := Counting(), sequence_length=16, max_windows=4)
    assert counting.letters < 2**18
    assert got.record["windows"] == 4 < got.record["available_windows"]


def test_opening_token_is_read_and_not_scored(text_file, bos_tokenizer):
    model = dense("llama-gqa-tied")
    windows = evaluation_windows(str(text_file), bos_tokenizer, sequence_length=16, max_windows=4).tokens
    found = perplexity(model, windows)
    with torch.no_grad():
        chances = model(windows).logits.double().log_softmax(-1)  # (windows, length, vocabulary)
    nats = [-chances[row, at, windows[row, at + 1]] for row in range(4) for at in range(15)]
    assert found.tokens == len(nats)
    assert found.perplexity == pytest.approx(float(torch.stack(nats).mean().exp()), rel=1e-6)


def test_evaluation_of_fewer_windows_than_asked_for(tokenizer):
    got = evaluation_windows(["ab" * 12], tokenizer, sequence_length=16, max_windows=9)
    assert tokenizer.batch_decode(got.tokens) == ["ab" * 8]
    assert got.record["windows"] == 1


def test_evaluation_text_shorter_than_a_window(tokenizer):
    with pytest.raises(CalibrationDataError, match="shorter than one window of 16"):
        evaluation_windows(["short"], tokenizer, sequence_length=16)


def test_evaluation_of_ready_windows():
    ids = torch.arange(96).view(6, 16)
    assert torch.equal(evaluation_windows(ids, None, sequence_length=32, max_windows=2).tokens, ids[:2])
    with pytest.raises(CalibrationDataError, match="16 tokens, expected at most 8"):
        evaluation_windows(ids, None, sequence_length=8)
    with pytest.raises(CalibrationDataError, match="vocabulary of 50"):
        evaluation_windows(ids, None, sequence_length=16, vocab_size=50)


@pytest.mark.parametrize("options", [{"max_windows": 0}, {"sequence_length": 1}])
def test_evaluation_bounds(text_file, tokenizer, options):
    with pytest.raises(InvalidConfig, match="at least"):
        evaluation_windows(str(text_file), tokenizer, **{"sequence_length": 16, **options})


# The Hub, without a network


def plant(cache: Path, repo: str, subset: str, **texts) -> None:
    """Write the files that `datasets` has in its cache after it has downloaded `repo`."""
    files = {}
    for split, documents in texts.items():
        files[split] = str(cache / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    builder = load_dataset_builder("json", subset, data_files=files, cache_dir=cache / "built")
    builder.download_and_prepare()
    owner, name = repo.split("/")
    place = cache / f"{owner}___{name}" / subset / "0.0.0" / COMMIT
    place.parent.mkdir(parents=True)
    Path(builder.cache_dir).rename(place)
    for file in place.glob("json-*"):
        file.rename(place / file.name.replace("json-", f"{name}-"))
    info = json.loads((place / "dataset_info.json").read_text())
    (place / "dataset_info.json").write_text(json.dumps({**info, "dataset_name": name, "config_name": subset}))


@pytest.fixture
def hub(tmp_path):
    return {"cache_dir": tmp_path, "local_files_only": True, "token": None}


def test_hub_dataset_from_the_cache(hub, tokenizer):
    rows = ["", " = Title = \n", *DOCUMENTS]
    plant(hub["cache_dir"], "Salesforce/wikitext", "wikitext-2-raw-v1", train=rows, test=["", "b-" * 50])
    got = calibrate("wikitext2", tokenizer, hub=hub)
    assert torch.equal(got.tokens, draw(cut("\n\n".join(rows[1:]), tokenizer, 16), 8, 0))
    assert {key: got.record[key] for key in ("name", "split", "revision", "text_column", "file_sha256")} == {
        "name": "wikitext2",
        "split": "train",
        "revision": COMMIT,
        "text_column": "text",
        "file_sha256": None,
    }
    got = evaluation_windows("wikitext2", tokenizer, sequence_length=16, hub=hub)
    assert (got.record["split"], tokenizer.decode(got.tokens[0])) == ("test", "\n\n" + "b-" * 7)
    got = calibrate("Salesforce/wikitext", tokenizer, samples=2, hub=hub, dataset_split="test")
    assert (got.record["name"], got.record["split"]) == ("Salesforce/wikitext", "test")
    assert calibrate("wikitext2", tokenizer, samples=2, hub=hub, dataset_split="train[:50%]").record["windows"] == 2


def test_split_that_a_hub_dataset_does_not_have(hub, tokenizer):
    plant(hub["cache_dir"], "Salesforce/wikitext", "wikitext-2-raw-v1", train=DOCUMENTS)
    error = refused("wikitext2", tokenizer, "split nope", "train", hub=hub, dataset_split="nope")
    assert isinstance(error.__cause__, ValueError)


def test_c4_is_streamed(hub, tokenizer):
    plant(hub["cache_dir"], "allenai/c4", "en", train=DOCUMENTS * 50, validation=["b-" * 50])
    counting = Counting()
    got = calibrate("c4", counting, hub=hub)
    assert (got.record["name"], got.record["split"], got.record["revision"]) == ("c4", "train", COMMIT)
    assert counting.letters < 1000
    got = evaluation_windows("c4", tokenizer, sequence_length=16, max_windows=3, hub=hub)
    assert (got.record["split"], tokenizer.decode(got.tokens[0])) == ("validation", "b-" * 8)
    got = calibrate("c4", tokenizer, samples=2, hub=hub, dataset_split="validation")
    assert got.record["split"] == "validation"


def test_alpaca_takes_its_text_column(hub, tokenizer):
    plant(hub["cache_dir"], "tatsu-lab/alpaca", "default", train=DOCUMENTS)
    assert calibrate("alpaca", tokenizer, hub=hub).record["text_column"] == "text"


def test_hub_dataset_that_is_not_in_the_cache(hub, tokenizer):
    error = refused("wikitext2", tokenizer, "Salesforce/wikitext", "find cache", "list of strings", hub=hub)
    assert error.__cause__ is not None
    assert str(hub["cache_dir"]) in str(error)
    assert "HF_DATASETS_CACHE" in str(error)
    assert "HF_HOME" in str(error)


@pytest.mark.parametrize("local_files_only", [True, False])  # the suite is offline, so both read the cache alone
def test_revision_that_is_not_in_the_cache(hub, tokenizer, local_files_only):
    hub = {**hub, "local_files_only": local_files_only}
    plant(hub["cache_dir"], "Salesforce/wikitext", "wikitext-2-raw-v1", train=DOCUMENTS)
    got = calibrate("wikitext2", tokenizer, hub={**hub, "revision": COMMIT})
    assert got.record["revision"] == COMMIT
    parts = ("revision v9", f"which has {COMMIT}", str(hub["cache_dir"]))
    refused("wikitext2", tokenizer, *parts, "HF_DATASETS_CACHE", "HF_HUB_OFFLINE", hub={**hub, "revision": "v9"})


def test_older_revision_in_the_cache(hub, tokenizer):
    plant(hub["cache_dir"], "Salesforce/wikitext", "wikitext-2-raw-v1", train=DOCUMENTS)
    builds = hub["cache_dir"] / "Salesforce___wikitext" / "wikitext-2-raw-v1" / "0.0.0"
    shutil.copytree(builds / COMMIT, builds / COMMIT[::-1])
    os.utime(builds / COMMIT, (1, 1))
    assert calibrate("wikitext2", tokenizer, hub=hub).record["revision"] == COMMIT[::-1]
    assert calibrate("wikitext2", tokenizer, hub={**hub, "revision": COMMIT}).record["revision"] == COMMIT


OFFLINE = """
import optimum_modegpt.calibration.data as data
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import CalibrationDataError
import sys
cache, table = sys.argv[1:]
class Letters:
    chat_template = None
    def __call__(self, text, **_): return {"input_ids": [ord(letter) for letter in text]}
    def __len__(self): return 0x110000
for name in ("wikitext2", "c4", "alpaca", "someone/something"):
    try:
        data.calibration_windows(ModeGPTConfig(dataset=name), Letters(), sequence_length=8, hub={"cache_dir": cache})
    except CalibrationDataError as error:
        print(name, "|", type(error.__cause__).__name__, "|", error)
print(data.calibration_windows(ModeGPTConfig(dataset=table, num_samples=2), Letters(), sequence_length=8).tokens.shape)
"""


def test_no_network(tmp_path):
    table = write_table(tmp_path, "jsonl", [{"text": TEXT}])
    words = [str(tmp_path / "cache"), str(table)]
    run = run_forked(OFFLINE, words, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    run.check_returncode()
    *refusals, shape = run.stdout.splitlines()
    assert [line.split(" | ")[0] for line in refusals] == ["wikitext2", "c4", "alpaca", "someone/something"]
    for line, path in zip(refusals, ["Salesforce/wikitext", "allenai/c4", "tatsu-lab/alpaca", "someone/"], strict=True):
        assert "ConnectionError" in line
        assert path in line
        assert "a local .txt" in line
    assert shape == "torch.Size([2, 8])"  # local files still work
