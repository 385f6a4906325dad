"""Test the comparison of two models, its command, thresholds and page, and the monitor of live requests."""

from __future__ import annotations

import functools
import gc
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import weakref
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_dense
from tiny_models import compressed, dense, tokenizer, tokens
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from optimum_modegpt import (
    CanaryMonitor,
    Comparison,
    EvaluationError,
    InvalidConfig,
    Thresholds,
    UnsupportedModel,
    compare,
    comparison_page,
    fidelity,
)
from optimum_modegpt.cli import main as cli
from optimum_modegpt.comparison.compare import distances as measured
from optimum_modegpt.comparison.compare import first_difference
from optimum_modegpt.comparison.prompts import read_prompts
from optimum_modegpt.comparison.records import PromptComparison

SCRIPT = '</p><script>alert("x")</script><img src=x onerror=alert(1)>'
PROMPTS = ["the ferry", "x", "a doctor's helper", SCRIPT[:28]]
NEW = 8


@pytest.fixture(scope="module")
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a model and a reference with slightly different weights."""
    reference, model = dense("llama-gqa-tied"), dense("llama-gqa-tied")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model, reference


@pytest.fixture(scope="module")
def found(models: tuple[PreTrainedModel, PreTrainedModel]) -> Comparison:
    return compare(*models, tokenizer(), PROMPTS, max_new_tokens=NEW)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, models: tuple[PreTrainedModel, PreTrainedModel]) -> list[Path]:
    """Save both models, and return the folders in the order of the command."""
    root = tmp_path_factory.mktemp("models")
    models[0].save_pretrained(root / "small")
    tokenizer().save_pretrained(root / "small")
    return [save_dense(root / "dense"), root / "small"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(PROMPTS) + "\n")
    return file


def greedy(model: PreTrainedModel, prompt: str) -> Tensor:
    """Return the ids of a prompt and its greedy continuation, generated without a cache."""
    ids = torch.tensor([tokenizer()(prompt).input_ids])
    with torch.no_grad():
        for _ in range(NEW):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
            if ids[0, -1] == 2:
                break
    return ids


# ------------------------------------------------------------------------------------------------------------- measures


class Predicts(torch.nn.Module):
    """A fake model that predicts the same logits at every position."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(probabilities).log()

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return type("Output", (), {"logits": self.logits.expand(*input_ids.shape, -1)})


def test_distances_by_hand() -> None:
    model: Any = Predicts([0.1, 0.2, 0.3, 0.15, 0.05, 0.12, 0.08])
    reference: Any = Predicts([0.4, 0.2, 0.1, 0.1, 0.1, 0.06, 0.04])
    found = measured(model, reference, torch.tensor([3]), torch.tensor([0, 2]))
    kl = 0.4 * math.log(4) + 0.1 * math.log(1 / 3) + 0.1 * math.log(2 / 3) + 0.1 * math.log(2) - 0.1 * math.log(2)
    assert found.kl.tolist() == pytest.approx([kl, kl], rel=1e-5)
    assert found.top1.tolist() == [0, 0]
    assert found.top5.tolist() == pytest.approx([0.8, 0.8])  # 4 is not among the model's five, 5 is
    assert found.nats.tolist() == pytest.approx([-math.log(0.1), -math.log(0.3)])
    assert found.reference_nats.tolist() == pytest.approx([-math.log(0.4), -math.log(0.1)])


def test_a_record_is_that_of_a_direct_calculation(
    found: Comparison, models: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    model, reference = models
    for record, prompt in zip(found.records, PROMPTS, strict=True):
        text, own = greedy(reference, prompt), greedy(model, prompt)
        length = record.prompt_tokens
        direct = fidelity(model, reference, text)
        assert record.prompt == prompt
        assert record.positions == text.shape[1] - 1 == length - 1 + record.reference.tokens
        assert record.kl == pytest.approx(direct.kl, rel=1e-4)
        assert record.top1_agreement == pytest.approx(direct.top1_agreement)
        assert record.reference.continuation == tokenizer().decode(text[0, length:], skip_special_tokens=True)
        assert record.model.continuation == tokenizer().decode(own[0, length:], skip_special_tokens=True)
        assert record.parting_token == first_difference(own[0, length:].tolist(), text[0, length:].tolist())
        assert record.kl_of_continuation == pytest.approx(sum(record.kl_by_token) / len(record.kl_by_token))
        assert record.kl_max >= max(record.kl_by_token)
        if length > 1:
            direct = fidelity(model, reference, text[:, :length])
            assert record.kl_of_prompt == pytest.approx(direct.kl, rel=1e-4)
            assert record.model.perplexity == pytest.approx(direct.perplexity, rel=1e-5)
            assert record.reference.perplexity == pytest.approx(direct.reference_perplexity, rel=1e-5)
    assert found.records[1].kl_of_prompt is found.records[1].perplexity_ratio is None


def test_sums_count_every_position_once(found: Comparison) -> None:
    records = found.records
    assert found.positions == sum(record.positions for record in records)
    assert found.kl == pytest.approx(sum(record.kl * record.positions for record in records) / found.positions)
    read = sum(record.prompt_tokens - 1 for record in records)
    assert found.kl_of_prompts is not None
    parts = found.kl_of_prompts * read + found.kl_of_continuations * (found.positions - read)
    assert found.kl == pytest.approx(parts / found.positions)
    nats = sum(math.log(r.model.perplexity) * (r.prompt_tokens - 1) for r in records if r.model.perplexity)
    assert found.perplexity == pytest.approx(math.exp(nats / read))
    assert 0 < found.kl < found.kl_max
    assert 0 < found.top1_agreement < 1
    assert found.worst_first()[0].kl == max(record.kl for record in records)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_model_is_its_own_equal(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    found = compare(models[1], models[1], tokenizer(), PROMPTS, max_new_tokens=NEW)
    assert (found.kl, found.kl_max, found.top1_agreement, found.top5_overlap) == (0, 0, 1, 1)
    assert found.perplexity_ratio == 1
    assert found.equal_continuations == len(PROMPTS)
    assert all(record.parting_token is record.parting_character is None for record in found.records)


def test_costs_are_those_of_each_model() -> None:
    model, reference = compressed("llama-gqa-tied"), dense("llama-gqa-tied")
    found = compare(model, reference, tokenizer(), ["the ferry"], max_new_tokens=NEW)
    kept = sum(widths.qk + widths.vo for widths in model.config.widths())
    assert found.costs.cache_bytes_per_token == 2 * 4 * kept
    assert found.reference_costs.cache_bytes_per_token == 2 * 4 * 3 * (8 + 8)
    assert found.costs.weight_bytes == model.get_memory_footprint() < found.reference_costs.weight_bytes
    for costs in (found.costs, found.reference_costs):
        assert costs.per_token is not None
        assert 0 < costs.per_token.median <= costs.per_token.p95
        assert 0 < costs.first_token.median <= costs.first_token.p95
    assert found.costs.peak_device_bytes is None  # a CPU's allocator does not tell


GENERATION: dict[str, Any] = {
    "do_sample": True,
    "temperature": 9.0,
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [*range(3, 200)],
    "sequence_bias": [[[97], 50.0]],
    "bad_words_ids": [[98]],
    "min_new_tokens": NEW,
    "num_beams": 4,
    "stop_strings": ["a"],
    "penalty_alpha": 0.6,
    "prompt_lookup_num_tokens": 2,
    "assistant_early_exit": 1,
    "token_healing": True,
    "cache_implementation": "static",
}


@pytest.mark.parametrize("setting", GENERATION)
def test_both_are_greedy_for_all_generation_configs(
    setting: str, models: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    model = dense("llama-gqa-tied")
    own: Any = model.generation_config
    setattr(own, setting, GENERATION[setting])
    found = compare(model, models[1], tokenizer(), PROMPTS, max_new_tokens=NEW)
    assert found.equal_continuations == len(PROMPTS)
    assert model.generation_config is own


@pytest.mark.parametrize(
    ("first", "second", "expected"), [("abc", "abc", None), ("abc", "abd", 2), ("ab", "abc", 2), ("", "", None)]
)
def test_parting(first: str, second: str, expected: int | None) -> None:
    assert first_difference(first, second) == expected


def test_long_prompts_are_cut_with_a_warning(
    models: tuple[PreTrainedModel, PreTrainedModel], caplog: pytest.LogCaptureFixture
) -> None:
    text = "".join(map(str, range(40)))
    found = compare(*models, tokenizer(), ["short", text], max_new_tokens=NEW)
    record = found.records[1]
    assert (record.prompt_tokens, record.cut_tokens) == (64 - NEW, 70 - (64 - NEW))
    assert "1 of 2 prompts are longer than the 56 tokens" in caplog.text
    assert record.kl == pytest.approx(compare(*models, tokenizer(), [text[-56:]], max_new_tokens=NEW).kl)


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([], NEW, "expected at least one prompt"),
        (["a", " \n"], NEW, "prompt 2 is empty"),
        (["a"], 64, "leaves no room for a prompt in a context of 64"),
        ([[{"role": "user", "content": "a"}]], NEW, "prompt 1 cannot be formatted with the chat template: .* not set"),
    ],
)
def test_invalid_prompts_are_refused(
    prompts: Any, new: int, message: str, models: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    with pytest.raises(EvaluationError, match=message):
        compare(*models, tokenizer(), prompts, max_new_tokens=new)


def test_weights_that_are_not_finite_are_refused(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    model = dense("llama-gqa-tied")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(EvaluationError, match="not finite"):
        compare(model, models[1], tokenizer(), ["a"], max_new_tokens=2)


# -------------------------------------------------------------------------------------------------------------- prompts


def chat_tokenizer() -> Any:
    found = tokenizer()
    found.chat_template = (
        "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return found


def test_every_kind_of_file_is_read(tmp_path: Path, models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    chat = [{"role": "user", "content": "two"}]
    objects = [{"prompt": "one"}, {"messages": chat}, {"text": "three"}, "four"]
    contents = {
        "p.txt": "one\n\n two\n",
        "p.jsonl": "\n".join(map(json.dumps, objects)),
        "p.json": json.dumps(objects),
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    assert read_prompts(tmp_path / "p.txt") == ["one", " two"]
    expected = ["one", chat, "three", "four"]
    assert read_prompts(tmp_path / "p.jsonl") == read_prompts(tmp_path / "p.json") == expected
    found = compare(*models, chat_tokenizer(), expected, max_new_tokens=2)
    assert found.records[1].prompt == "[user]two[assistant]"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "a", "ends in .txt, .jsonl, .json"),
        ("p.txt", " \n", "contains no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{', "cannot be read as prompts: line 2 is not valid JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"question": "b"}', 'line 2: expected .* found {"question": "b"}'),
        ("p.jsonl", '{"messages": "a"}\n{"messages": []}', "line 1|line 2"),
        ("p.json", '{"prompt": "a"}', "expected a list, found dict"),
        ("p.json", "[3]", "item 1: expected"),
        ("p.json", "[" * 200_000, "recursion"),
        ("p.txt", None, "cannot be read as prompts"),
    ],
)
def test_a_bad_file_is_refused(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(EvaluationError, match=message):
        read_prompts(tmp_path / name)


# ----------------------------------------------------------------------------------------------------------- thresholds


def test_thresholds_are_inclusive_and_told(found: Comparison) -> None:
    exact = Thresholds(found.kl, found.top1_agreement, found.perplexity_ratio)
    assert [check.held for check in found.check(exact)] == [True, True, True]
    below = Thresholds(max_kl=found.kl * 0.99, min_agreement=min(1.0, found.top1_agreement * 1.01))
    assert [check.held for check in found.check(below)] == [False, False]
    assert str(found.check(below)[0]).startswith("BROKEN: KL divergence is")
    assert found.check(Thresholds()) == ()


@pytest.mark.parametrize("limits", [{"max_kl": -1}, {"min_agreement": 95}, {"max_kl": math.nan}])
def test_limits_out_of_range_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(InvalidConfig, match=f"{next(iter(limits))} must be between"):
        Thresholds(**limits)


def test_a_limit_of_a_missing_measure_is_refused(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    found = compare(*models, tokenizer(), ["x"], max_new_tokens=2)
    assert found.perplexity is found.kl_of_prompts is None
    with pytest.raises(EvaluationError, match="needs prompts of at least two tokens"):
        found.check(Thresholds(max_perplexity_ratio=1.1))


# -------------------------------------------------------------------------------------------------------------- command


def run(folders: list[Path], prompts: Path, *flags: Any) -> int:
    arguments = ["compare", *folders, "--prompts", prompts, "--max-new-tokens", NEW, *flags]
    return cli.main([str(argument) for argument in arguments])


def test_the_exit_code_in_a_process_of_its_own(folders: list[Path], prompts: Path) -> None:
    command = [sys.executable, "-m", "optimum_modegpt", "compare", *folders, "--prompts", prompts, "--max-kl", "0"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 1, done.stderr
    assert re.search(r"^BROKEN: KL divergence is 0\.\d{4}, allowed at most 0$", done.stdout, re.MULTILINE)
    assert "Traceback" not in done.stderr


def test_exit_codes(
    folders: list[Path], prompts: Path, found: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folders, prompts) == 0
    assert run(folders, prompts, "--max-kl", 9, "--min-agreement", 0.01, "--max-perplexity-ratio", 99) == 0
    assert capsys.readouterr().out.count("held: ") == 3
    assert run(folders, prompts, "--max-kl", 9, "--min-agreement", 1, "--json", tmp_path / "all.json") == 1
    assert "BROKEN: top-1 agreement" in capsys.readouterr().out
    written = json.loads((tmp_path / "all.json").read_text())
    assert [outcome["held"] for outcome in written["thresholds"]] == [True, False]
    assert written["kl"] == pytest.approx(found.kl)
    assert written["records"][0].keys() == found.records[0].to_dict().keys()
    assert run(folders, tmp_path / "none.txt") == 2
    assert run(folders, prompts, "--min-agreement", 80) == 2
    assert "for 80.0 % write 0.8" in capsys.readouterr().err
    assert cli.main(["compare", *map(str, folders)]) == 2
    assert "--prompts is missing" in capsys.readouterr().err


def test_the_compressed_model_before_the_dense_one_is_refused(
    folders: list[Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, dense_folder = tmp_path / "small", folders[0]
    compressed("llama-gqa-tied").save_pretrained(small)
    assert run([small, dense_folder], prompts, "--max-kl", 9) == 2
    assert f"Name the dense one first: compare {dense_folder} {small}" in capsys.readouterr().err


def test_a_broken_configuration_is_told_before_any_work(
    folders: list[Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in range(2):
        pair = [*folders]
        pair[place] = shutil.copytree(folders[place], tmp_path / f"broken{place}")
        config = json.loads((pair[place] / "config.json").read_text())
        (pair[place] / "config.json").write_text(json.dumps({**config, "attention_bias": "x"}))
        assert run(pair, prompts, "--max-kl", 9) == 2
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        assert f"broken{place}' cannot be loaded" in errors


def test_results_are_written_if_a_limit_cannot_be_checked(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.txt").write_text("x\n")
    files = ["--json", tmp_path / "all.json", "--html", tmp_path / "page.html"]
    assert run(folders, tmp_path / "one.txt", "--max-perplexity-ratio", 2, *files) == 2
    printed = capsys.readouterr()
    assert "needs prompts of at least two tokens" in printed.err
    assert "KL divergence" in printed.out
    assert json.loads((tmp_path / "all.json").read_text())["kl"] > 0
    assert "No threshold was checked" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_an_interrupted_run_names_the_file_that_stays(
    folders: list[Path],
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    to_dict, file = PromptComparison.to_dict, tmp_path / "records.jsonl"

    def interrupted(record: PromptComparison) -> dict[str, Any]:
        if record.index == 2:
            raise KeyboardInterrupt
        return to_dict(record)

    monkeypatch.setattr(PromptComparison, "to_dict", interrupted)
    assert run(folders, prompts, "--jsonl", file) == 130
    assert capsys.readouterr().err.endswith(f"Interrupted. {file} contains the prompts measured so far.\n")
    assert len(file.read_text().splitlines()) == 2


def test_no_file_is_written_over_another(
    folders: list[Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, page = prompts.read_text(), tmp_path / "page.html"
    assert run(folders, prompts, "--jsonl", prompts.parent / "." / prompts.name) == 2
    assert run(folders, prompts, "--html", page, "--json", page) == 2
    assert capsys.readouterr().err.count("is named twice") == 2
    assert prompts.read_text() == before
    assert not page.exists()


def test_a_line_is_written_as_soon_as_its_prompt_is_measured(
    folders: list[Path], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, seen = tmp_path / "records.jsonl", []
    to_dict = PromptComparison.to_dict

    def counting(record: PromptComparison) -> dict[str, Any]:
        seen.append(len(file.read_text().splitlines()))
        return to_dict(record)

    monkeypatch.setattr(PromptComparison, "to_dict", counting)
    assert run(folders, prompts, "--jsonl", file) == 0
    assert seen[: len(PROMPTS)] == [0, 1, 2, 3]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    assert len({tuple(line) for line in lines}) == 1


# ----------------------------------------------------------------------------------------------------------------- page


class Page(HTMLParser):
    """Collects tags, attributes, and the text outside of styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data if self.tags[-1:] != ["style"] else ""


def test_the_page_needs_nothing_and_runs_nothing(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    reference = dense("llama-gqa-tied")
    found = compare(models[0], reference, tokenizer(), [SCRIPT[:50], *PROMPTS], max_new_tokens=NEW)
    text = comparison_page(found, found.check(Thresholds(max_kl=0)), model=SCRIPT, reference='"><b>')
    assert text.startswith("<!doctype html>")
    page = Page(text)
    assert not {"script", "img", "link", "iframe", "object", "b"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "href", "srcset", "onerror"} & names
    assert not re.search(r"https?:|url\(|@import", text)
    assert "default-src 'none'" in text
    assert SCRIPT in page.text
    for record in found.records:
        assert record.prompt in page.text


def test_the_page_contains_the_results(found: Comparison) -> None:
    checks = found.check(Thresholds(max_kl=0, min_agreement=0))
    text = comparison_page(found, checks, model="small", reference="dense")
    page = Page(text)
    assert "1 of 2 thresholds broken" in page.text
    assert f"{found.kl:.4f}" in page.text
    assert page.tags.count("details") == len(PROMPTS)
    assert page.tags.count("svg") == 6
    worst = found.worst_first()
    places = [text.index(f"Prompt {record.index + 1}, ") for record in worst]
    assert places == sorted(places)
    assert page.tags.count("mark") == 2 * sum(record.parting_character is not None for record in worst)
    assert "nan" not in re.sub(r"<(p|span)[^>]*>.*?</\1>", "", text, flags=re.DOTALL)
    assert "No threshold was checked" in comparison_page(found, (), model="small", reference="dense")


@pytest.mark.parametrize("prompts", [["x"], ["the ferry", "the ferry"]])
def test_the_page_of_few_or_equal_prompts(prompts: list[str], models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    found = compare(models[1], models[1], tokenizer(), prompts, max_new_tokens=1)
    page = Page(comparison_page(found, (), model="same", reference="same"))
    assert page.tags.count("svg") == 5  # no second token, no time per further token
    assert "same continuation" in page.text


def test_the_command_writes_the_page(folders: list[Path], prompts: Path, tmp_path: Path) -> None:
    assert run(folders, prompts, "--html", tmp_path / "page.html") == 0
    assert Page((tmp_path / "page.html").read_text(encoding="utf-8")).tags.count("details") == len(PROMPTS)


# -------------------------------------------------------------------------------------------------------------- monitor


def served(model: PreTrainedModel, requests: int = 6, **flags: Any) -> list[Tensor]:
    """Generate sampled answers to left-padded prompts, with the global random generator."""
    torch.manual_seed(0)
    answers = []
    for request in range(requests):
        ids, mask = tokens(2, 9, seed=request), torch.ones(2, 9, dtype=torch.int64)
        ids[0, :4], mask[0, :4] = 0, 0
        answers.append(model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=True, **flags))
    return answers


def test_answers_are_the_same_with_and_without_a_monitor(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    model, reference = models
    alone = served(model)
    state = torch.get_rng_state()
    with CanaryMonitor(model, reference, fraction=1) as monitor, monitor.watching() as watched:
        assert watched is model
        answers = served(model)
        monitor.flush()
    assert all(torch.equal(one, other) for one, other in zip(alone, answers, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert "generate" not in vars(model)
    assert monitor.summary().compared == 12


def test_a_live_request_is_measured_as_in_compare(
    models: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path
) -> None:
    model, reference = models
    with CanaryMonitor(model, reference, fraction=1, sink=tmp_path / "live.jsonl") as monitor, monitor.watching():
        answers = served(model, requests=1, return_dict_in_generate=True)[0]["sequences"]
    records = [json.loads(line) for line in (tmp_path / "live.jsonl").read_text().splitlines()]
    assert [record["request"] for record in records] == [0, 1]
    assert [record["prompt_tokens"] for record in records] == [5, 9]
    for record, row in zip(records, answers, strict=True):
        read = row[row != 0][: record["prompt_tokens"] + record["answer_tokens"]]
        direct = fidelity(model, reference, read[None])
        assert record["kl"] == pytest.approx(direct.kl, rel=1e-4)
        assert record["top1_agreement"] == pytest.approx(direct.top1_agreement)
    summary = monitor.summary()
    assert (summary.requests, summary.compared, summary.errors, summary.status) == (2, 2, 0, "unchecked")
    assert summary.kl == pytest.approx(sum(record["kl"] for record in records) / 2)
    assert summary.kl_max == max(record["kl_max"] for record in records)


@pytest.mark.parametrize(
    ("pad", "masked", "given"),
    [
        (0, True, {"attention_mask": torch.tensor([[0] * 4 + [1] * 5, [1] * 9])}),
        (0, True, {}),
        (0, True, {"attention_mask": None}),
        (5, True, {"pad_token_id": 5}),
        (5, True, {"generation_config": GenerationConfig(pad_token_id=5)}),
        (2, False, {"pad_token_id": 2}),  # the end token: transformers infers nothing
        (2, False, {"pad_token_id": None}),
        (0, False, {"attention_mask": torch.ones(2, 9, dtype=torch.int64)}),
    ],
)
def test_a_prompt_is_read_with_the_mask_that_generate_uses(
    pad: int, masked: bool, given: dict[str, Any], models: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    (model, reference), given = models, dict(given)
    ids = tokens(2, 9).clamp(min=6)
    ids[0, :4] = pad
    records: list[dict[str, Any]] = []
    with CanaryMonitor(model, reference, fraction=1, sink=records.append) as monitor, monitor.watching():
        flags: dict[str, Any] = {"input_ids": ids, "max_new_tokens": 3, "do_sample": False}
        answers = model.generate(**flags, **given)
        model.generate(None, given.pop("generation_config", None), **flags, **given)
    assert monitor.summary().last_error is None
    assert [record["prompt_tokens"] for record in records] == [5 if masked else 9, 9] * 2
    for record, row in zip(records, answers[[0, 1, 0, 1]], strict=True):
        read = row[9 - record["prompt_tokens"] : 9 + record["answer_tokens"]]
        assert record["kl"] == pytest.approx(fidelity(model, reference, read[None]).kl, rel=1e-4)


def test_calls_without_prompts_of_ids_are_errors_and_forward_is_not_observed(
    models: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    model, ids = models[0], tokens(1, 6)
    embedded = model.get_input_embeddings()(tokens(1, 6, seed=1))
    with CanaryMonitor(*models, fraction=1) as monitor, monitor.watching():
        model(ids)
        assert monitor.summary().requests == 0
        model.generate(ids, inputs_embeds=embedded, max_new_tokens=2)
        monitor.observe(ids, torch.cat((ids, ids), dim=1), attention_mask=torch.zeros_like(ids))
    summary = monitor.summary()
    assert (summary.compared, summary.errors) == (0, 2)
    assert "the attention mask hides every token" in str(summary.last_error)


def test_the_share_is_drawn_by_the_monitors_own_seed(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    def chosen(seed: int) -> list[int]:
        records: list[dict[str, Any]] = []
        with CanaryMonitor(*models, fraction=0.3, seed=seed, sink=records.append) as monitor:
            for request in range(40):
                ids = tokens(1, 4, seed=request)
                monitor.observe(ids, torch.cat((ids, ids), dim=1))
                torch.rand(1)
        assert monitor.summary().requests == 40
        return [record["request"] for record in records]

    assert chosen(1) == chosen(1) != chosen(2)
    assert 4 < len(chosen(1)) < 24


def test_a_full_queue_skips_and_never_waits(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    hold, ids = threading.Event(), tokens(1, 8)
    with CanaryMonitor(*models, fraction=1, queue_size=2, sink=lambda record: hold.wait(30) or None) as monitor:
        for _ in range(10):
            monitor.observe(ids[:, :4], ids)
        summary = monitor.summary()
        assert summary.requests == 10
        assert summary.skipped >= 7  # two wait, at most one is in work
        hold.set()
    done = monitor.summary()
    assert done.compared == 10 - done.skipped
    assert (done.waiting, done.errors) == (0, 0)


def test_many_threads_lose_nothing(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    ids = tokens(1, 6)
    with CanaryMonitor(*models, fraction=1, queue_size=100) as monitor:
        serving = [
            threading.Thread(target=lambda: [monitor.observe(ids[:, :4], ids) for _ in range(10)]) for _ in range(8)
        ]
        for thread in serving:
            thread.start()
        for thread in serving:
            thread.join()
    summary = monitor.summary()
    assert (summary.requests, summary.compared, summary.skipped) == (80, 80, 0)


def test_nothing_that_fails_reaches_the_server(
    models: tuple[PreTrainedModel, PreTrainedModel], caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = models[0], tokens(1, 6)

    def broken(record: dict[str, Any]) -> None:
        raise OSError("the disk is full")

    with CanaryMonitor(*models, fraction=1, sink=broken) as monitor, monitor.watching():
        embedded = model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=2)
        assert embedded.shape == (1, 2)
        monitor.observe(ids, ids[:, 4:])  # the answer alone
        monitor.observe(ids[:, :4], ids)
        monitor.flush()
        summary = monitor.summary()
    assert summary.errors == 3
    assert summary.last_error is not None
    assert "the disk is full" in summary.last_error
    assert "without token ids" in caplog.text
    assert "followed by the answers" in caplog.text


def test_a_broken_threshold_shows_once_in_the_log_and_always_in_the_summary(
    models: tuple[PreTrainedModel, PreTrainedModel], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    ids, records = tokens(1, 8), list[dict[str, Any]]()
    limits, shown = Thresholds(max_kl=1e-9), list[str]()
    with CanaryMonitor(*models, fraction=1, window=3, thresholds=limits, sink=records.append) as monitor:
        assert monitor.summary().status == "warming up"
        assert str(monitor.summary()).endswith("thresholds: warming up")
        for _ in range(5):
            monitor.observe(ids[:, :4], ids)
            monitor.flush()
            shown.append(str(monitor.summary()).rpartition("thresholds: ")[2])
    assert shown[0] == "warming up"
    assert [record["status"] for record in records] == ["warming up"] * 2 + ["broken"] * 3
    assert caplog.text.count("thresholds broken over the last requests: BROKEN: KL divergence") == 1
    assert monitor.summary().status == "broken"
    assert monitor.summary().broken[0].startswith("BROKEN: KL divergence")
    assert str(monitor.summary()).startswith("requests: 5 served, 5 compared, 0 skipped because of a full queue")
    assert str(monitor.summary()).endswith(f"thresholds: {monitor.summary().broken[0]}")
    assert monitor.summary().recent_kl == pytest.approx(records[0]["kl"])
    monitor.close()
    monitor.observe(ids[:, :4], ids)
    assert monitor.summary().requests == 5


def test_the_recent_mean_is_that_of_the_window(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    records: list[dict[str, Any]] = []
    with CanaryMonitor(*models, fraction=1, window=3, sink=records.append) as monitor:
        for request in range(4):
            ids = tokens(1, 8, seed=request)
            monitor.observe(ids[:, :4], ids)
    summary, kl = monitor.summary(), [record["kl"] for record in records]
    assert summary.kl == pytest.approx(sum(kl) / 4)
    assert summary.recent_kl == records[-1]["recent_kl"] == pytest.approx(sum(kl[1:]) / 3)


@pytest.mark.parametrize("given", ["argument", "config", "positional"])
def test_stop_tokens_of_a_call_end_the_answer(given: str, models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    model, ids = models[0], tokens(3, 6)
    flags: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    free = model.generate(ids, eos_token_id=None, **flags)
    stops: dict[str, Any] = {"eos_token_id": [int(free[0, 8])], "pad_token_id": 5}
    expected = [row.index(stops["eos_token_id"][0]) + 1 for row in free[:, 6:].tolist() if free[0, 8] in row]
    assert expected[0] <= 3
    records: list[dict[str, Any]] = []
    with CanaryMonitor(*models, fraction=1, sink=records.append) as monitor, monitor.watching():
        config = GenerationConfig(**stops, **flags)
        if given == "argument":
            model.generate(ids, **stops, **flags)
        elif given == "config":
            model.generate(ids, generation_config=config)
        else:
            model.generate(ids, config)
        monitor.observe(ids, model.generate(ids, config), generation_config=config)
    lengths = [record["answer_tokens"] for record in records]
    assert [length for length in lengths if length < 12] == expected * 3
    assert len(lengths) == 9


def test_padding_behind_a_stop_string_is_no_answer(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    model, ids = models[0], tokens(3, 6)
    flags: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 5}
    free = model.generate(ids, **flags)[:, 6:]
    stop = tokenizer().decode(free[0, 2])
    records: list[dict[str, Any]] = []
    with CanaryMonitor(*models, fraction=1, sink=records.append) as monitor, monitor.watching():
        model.generate(ids, stop_strings=[stop], tokenizer=tokenizer(), **flags)
    assert records[0]["answer_tokens"] == free[0].tolist().index(free[0, 2]) + 1


def test_several_watch_one_model_and_end_in_any_order(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    model: Any = models[0]
    ids = tokens(1, 6)
    with CanaryMonitor(*models, fraction=1) as first, CanaryMonitor(*models, fraction=1) as second:
        one, other = first.watching(), second.watching()
        one.__enter__()
        other.__enter__()
        model.generate(ids, max_new_tokens=2)
        one.__exit__(None, None, None)
        model.generate(ids, max_new_tokens=2)
        other.__exit__(None, None, None)
        model.generate(ids, max_new_tokens=2)
    del model.generate  # the wrapper of the first, which does nothing any more
    assert (first.summary().requests, second.summary().requests) == (1, 2)


def test_a_wrapper_that_came_later_stays(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    model: Any = models[0]
    with CanaryMonitor(*models, fraction=1) as monitor:
        with monitor.watching():
            watched = model.generate
            later = model.generate = functools.partial(watched, max_new_tokens=2)
        assert model.generate is later
        assert model.generate(tokens(1, 6)).shape == (1, 8)
        del model.generate
    assert monitor.summary().requests == 0


@pytest.mark.parametrize("at_work", [False, True])
def test_a_monitor_that_is_dropped_ends(at_work: bool) -> None:
    model, reference, ids = dense("llama-gqa-tied"), dense("llama-gqa-tied"), tokens(1, 8)
    began, hold = threading.Event(), threading.Event()

    def sink(record: dict[str, Any]) -> None:
        began.set()
        hold.wait(30)

    monitor = CanaryMonitor(model, reference, fraction=1, queue_size=2, sink=sink)
    seen = weakref.ref(model)
    if at_work:
        for _ in range(4):
            monitor.observe(ids[:, :4], ids)
        began.wait(30)
        (thread,) = (each for each in threading.enumerate() if each.name.startswith("modegpt-canary"))
    del monitor, model, reference
    hold.set()
    if at_work:
        thread.join(30)
        assert not thread.is_alive()
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_tables_that_a_forward_pass_changes_are_refused(kind: str) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32, **factors}
    changing, fixed = dense("llama-gqa-tied", rope_parameters=rope), dense("llama-gqa-tied")
    with pytest.raises(UnsupportedModel, match=f"the served model has rotary embeddings of type {kind}"):
        CanaryMonitor(changing, fixed)
    with pytest.raises(UnsupportedModel, match=f"the reference has rotary embeddings of type {kind}"):
        CanaryMonitor(fixed, changing)


def test_invalid_arguments_of_a_monitor_are_refused(
    models: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path
) -> None:
    model, reference = models
    with pytest.raises(InvalidConfig, match=r"fraction must be in \[0, 1\], found 5"):
        CanaryMonitor(model, reference, fraction=5)
    with pytest.raises(InvalidConfig, match="window and queue_size must be at least 1, found 0 and 64"):
        CanaryMonitor(model, reference, window=0)
    with pytest.raises(InvalidConfig, match="for max_perplexity_ratio use compare"):
        CanaryMonitor(model, reference, thresholds=Thresholds(max_perplexity_ratio=2))
    with pytest.raises(EvaluationError, match="predicts 260 tokens, the reference 300"):
        CanaryMonitor(model, dense("llama-gqa-tied", vocab_size=300))
    with pytest.raises(EvaluationError, match="reference is in training mode"):
        CanaryMonitor(model, dense("opt").train())
    with pytest.raises(OSError, match="nowhere"):
        CanaryMonitor(model, reference, sink=tmp_path / "nowhere" / "live.jsonl")
