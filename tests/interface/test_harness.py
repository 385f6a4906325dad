"""Test tasks of lm-eval: its own command and calculations by hand give the same scores; side effects and errors."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from checkpoints import RECIPE, save_dense, save_text
from lm_eval.tasks import TaskManager
from tiny_models import compressed as tiny_compressed
from tiny_models import tokenizer
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from optimum_modegpt.cli import main as cli
from optimum_modegpt.cli.tables import tasks_table
from optimum_modegpt.errors import EvaluationError
from optimum_modegpt.evaluation.harness import Score, Tasks, harness, load_tasks, mean_score

NAMES = ["ours", "last", "written"]
MEMBERS = ("pick", "choose")

TASK = """\
task: {name}
output_type: {output_type}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {documents}}}, cache_dir: {cache}}}
test_split: test
doc_to_text: "{{{{question}}}}"
metadata: {{version: 2.0}}
metric_list:
"""
CHOICE = """\
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
doc_to_choice: "{{choices}}"
doc_to_target: answer
"""
LAST = """\
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
doc_to_target: "{{' ' + word}}"
"""
WRITTEN = """\
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
doc_to_target: "{{word}}"
generation_kwargs: {until: ["e"], max_gen_toks: 6, do_sample: false}
filter_list:
  - {name: first, filter: [{function: take_first}]}
"""
GROUP = """\
group: ours
task: [pick, choose]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
"""


def documents(seed: int, count: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)

    def word() -> str:
        return "".join(draw.choices("aeionrst", k=draw.randint(2, 6)))

    return [
        {
            "question": f"{word()} {word()}",
            "choices": [word() for _ in range(3)],
            "answer": draw.randrange(3),
            "word": word(),
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three kinds of tasks, a group, and a task whose data cannot be reached."""
    folder = tmp_path_factory.mktemp("tasks")
    kinds = {
        "pick": ("multiple_choice", CHOICE),
        "choose": ("multiple_choice", CHOICE),
        "last": ("loglikelihood", LAST),
        "written": ("generate_until", WRITTEN),
    }
    for seed, (name, (output_type, rest)) in enumerate(kinds.items()):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents(seed, 8 + 4 * seed)))
        text = TASK.format(name=name, output_type=output_type, documents=data, cache=folder / "cache") + rest
        (folder / f"{name}.yaml").write_text(text)
    (folder / "ours.yaml").write_text(GROUP)
    far = TASK.format(name="far", output_type="multiple_choice", documents="x", cache=folder / "cache") + CHOICE
    (folder / "far.yaml").write_text(far.replace("dataset_path: json", "dataset_path: nobody/nothing"))
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    place = tmp_path_factory.mktemp("results")
    text = save_text(place / "text.txt")
    flags = [part for key, value in RECIPE.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    assert cli.main(["compress", str(dense), "--output", str(place / "small"), "--dataset", str(text), *flags]) == 0
    return place / "small"


@pytest.fixture(scope="module")
def outside(folder: Path, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Run lm-eval's own command on the saved model, with the remote code in its folder."""
    output = tmp_path_factory.mktemp("outside")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--tasks", ",".join(NAMES)),
            *("--model_args", f"pretrained={small},trust_remote_code=True"),
            *("--include_path", folder, "--output_path", output),
        ],
        env={**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_MODULES_CACHE": str(output / "modules")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def result() -> dict[str, Any]:
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
        return json.loads(next(output.rglob("results_*.json")).read_text())

    yield result
    process.kill()
    process.wait()


@pytest.fixture(scope="module", autouse=True)
def own_index() -> Iterator[None]:
    """Omit lm-eval's own tasks, because listing them takes ten seconds. The commands of the guides use them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
        yield


@pytest.fixture(scope="module")
def tasks(folder: Path, outside: Any) -> Tasks:
    """Load the tasks. `outside` is requested so that its process starts earlier."""
    return load_tasks(NAMES, include_path=folder)


@pytest.fixture(scope="module")
def model(small: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(small)


@pytest.fixture(scope="module")
def scores(model: Any, tasks: Tasks) -> dict[str, dict[str, Score]]:
    return harness(model, tokenizer(), tasks)


# ----------------------------------------------------------------------------------------------------------- numbers


def log_likelihood(model: Any, question: str, continuation: str) -> float:
    """Return the log-likelihood of the characters of the continuation, which are one token each."""
    ids = torch.tensor([tokenizer()(question + continuation).input_ids])
    with torch.inference_mode():
        rows = model(ids).logits[0, :-1].log_softmax(-1)
    return float(rows.gather(1, ids[0, 1:, None])[-len(continuation) :].sum())


def test_choices_are_scored_as_by_hand(model: Any, scores: dict[str, dict[str, Score]]) -> None:
    for seed, name in enumerate(MEMBERS):
        count = 8 + 4 * seed
        right = right_by_length = 0
        for document in documents(seed, count):
            sums = [log_likelihood(model, document["question"], f" {each}") for each in document["choices"]]
            by_length = [each / len(choice) for each, choice in zip(sums, document["choices"], strict=True)]
            right += int(np.argmax(sums) == document["answer"])
            right_by_length += int(np.argmax(by_length) == document["answer"])
        share = right / count
        assert scores[name]["acc"].value == pytest.approx(share)
        assert scores[name]["acc"].stderr == pytest.approx((share * (1 - share) / (count - 1)) ** 0.5)
        assert scores[name]["acc_norm"].value == pytest.approx(right_by_length / count)


def test_last_words_are_scored_as_by_hand(model: Any, scores: dict[str, dict[str, Score]]) -> None:
    sums = [log_likelihood(model, each["question"], f" {each['word']}") for each in documents(2, 16)]
    assert scores["last"]["perplexity"].value == pytest.approx(float(np.exp(-np.mean(sums))), rel=1e-3)
    assert scores["last"]["perplexity"].higher_is_better is False


def test_fields_of_a_score(scores: dict[str, dict[str, Score]]) -> None:
    expected = Score(scores["pick"]["acc"].value, scores["pick"]["acc"].stderr, True, 8, 0, 1, 2.0, lm_eval.__version__)
    assert scores["pick"]["acc"] == expected
    assert list(scores["written"]) == ["exact_match,first"]
    assert scores["written"]["exact_match,first"].higher_is_better is True


def test_a_group_has_the_mean_over_its_samples(tasks: Tasks, scores: dict[str, dict[str, Score]]) -> None:
    assert tasks.names == NAMES
    assert set(scores) == {*NAMES, *MEMBERS}
    first, second = (scores[name]["acc"] for name in MEMBERS)
    assert scores["ours"]["acc"].value == pytest.approx((8 * first.value + 12 * second.value) / 20)
    assert scores["ours"]["acc"].samples == 20


def test_lm_eval_loads_the_model_with_the_plugin(
    small: Path, tasks: Tasks, scores: dict[str, dict[str, Score]]
) -> None:
    found: Any = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(small)},
        device="cpu",
        tasks=["pick", "last"],
        task_manager=tasks.manager,
        bootstrap_iters=0,
    )
    assert found["results"]["pick"]["acc,none"] == scores["pick"]["acc"].value
    assert found["results"]["last"]["perplexity,none"] == pytest.approx(scores["last"]["perplexity"].value)


def test_examples_limit_and_batches(model: Any, folder: Path, scores: dict[str, dict[str, Score]]) -> None:
    pick = load_tasks(["pick"], include_path=folder)
    found = harness(model, tokenizer(), pick, num_fewshot=1, limit=3)["pick"]["acc"]
    assert (found.samples, found.num_fewshot) == (3, 1)
    batched = harness(model, tokenizer(), pick, batch_size=5)["pick"]["acc"]
    assert batched == replace(scores["pick"]["acc"], batch_size=5, num_fewshot=batched.num_fewshot)


# -------------------------------------------------------------------------------------------------------- the caller


def test_the_caller_is_left_as_he_was(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, words = tiny_compressed("opt").train(), tokenizer()
    words.pad_token = None
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    loggers = [logging.getLogger(name) for name in (None, "lm_eval", "lm_eval.evaluator", "lm_eval.models.huggingface")]

    def state() -> Any:
        logs = [(logger.level, logger.handlers[:], logger.propagate) for logger in loggers]
        drawn = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        return drawn, logs, words.pad_token, model.training, vars(tqdm)["__init__"]

    before = state()
    found = harness(model, words, load_tasks(["last", "written"], include_path=folder))
    assert state() == before
    assert found
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "it/s" not in printed.err
    assert "%|" not in printed.err


def test_git_is_not_asked_for_a_commit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\necho fatal: not a git repository >&2\nexit 128\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    harness(tiny_compressed("llama-gqa-tied"), tokenizer(), load_tasks(["pick"], include_path=folder), limit=1)
    assert "fatal" not in capfd.readouterr().err


def test_bars_are_shown_where_they_are_wanted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harness(tiny_compressed("opt"), tokenizer(), load_tasks(["pick"], include_path=folder), progress=True)
    assert "Running loglikelihood requests" in capsys.readouterr().err


def test_the_model_is_not_held(folder: Path) -> None:
    model = tiny_compressed("opt")
    seen, tasks = weakref.ref(model), load_tasks(["pick"], include_path=folder)
    harness(model, tokenizer(), tasks)
    del model
    gc.collect()
    assert seen() is None


# ----------------------------------------------------------------------------------------------------------- refusals


def test_unknown_task_names_close_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Path(lm_eval.tasks.__file__).with_name("hellaswag")
    both = TaskManager(include_path=[folder, own], include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path: both)
    with pytest.raises(EvaluationError, match=r"has no task 'helaswag'\. Did you mean .*\bhellaswag\b"):
        load_tasks(["pick", "helaswag"], include_path=folder)
    with pytest.raises(EvaluationError, match="`lm_eval ls tasks` lists all"):
        load_tasks(["§§§§§§"], include_path=folder)


def test_pattern(folder: Path) -> None:
    assert load_tasks(["p*"], include_path=folder).names == ["pick"]


def test_task_without_reachable_data_is_named(folder: Path) -> None:
    with pytest.raises(EvaluationError, match=r"(?s)the task 'far' cannot be loaded: .*nobody/nothing.*connection"):
        load_tasks(["pick", "far"], include_path=folder)


def test_task_in_two_places_is_refused(folder: Path) -> None:
    with pytest.raises(EvaluationError, match=r"'pick': found in both 'ours' and 'pick'\. Name either"):
        load_tasks(["ours", "pick"], include_path=folder)


def test_folder_of_tasks_must_be_one(folder: Path) -> None:
    with pytest.raises(EvaluationError, match="is not a folder"):
        load_tasks(["pick"], include_path=folder / "pick.yaml")


def test_a_model_that_cannot_run_a_task(folder: Path) -> None:
    short = tiny_compressed("opt", max_position_embeddings=6)
    with pytest.raises(EvaluationError, match=r"cannot run written on this model: .*maximum sequence length \(6\)"):
        harness(short, tokenizer(), load_tasks(["written"], include_path=folder))


def test_a_broken_model_does_not_pass_for_a_weak_one(folder: Path) -> None:
    model: Any = tiny_compressed("llama-gqa-tied")
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    for name in ("ours", "last"):
        with pytest.raises(EvaluationError, match=r"is not finite\. Its weights or activations overflow"):
            harness(model, tokenizer(), load_tasks([name], include_path=folder))


@pytest.mark.parametrize("missing", ["lm_eval", "lm_eval.result_schema"])
def test_without_lm_eval_or_with_an_old_one(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"lm-eval 0\.4\.12 or later .*pip install 'optimum-modegpt\[eval\]'"):
        load_tasks(["pick"])


# ------------------------------------------------------------------------------------------------------- the command


def evaluate(*arguments: Any) -> int:
    return cli.main(["evaluate", *map(str, arguments)])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert evaluate(*arguments) == 2
    return capsys.readouterr().err


def test_before_and_after(
    small: Path,
    dense: Path,
    folder: Path,
    scores: dict[str, dict[str, Score]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = tmp_path / "renamed"
    shutil.copytree(small, place)
    flags = ["--tasks", ",".join(NAMES), "--include-path", folder, "--json", tmp_path / "scores"]
    assert evaluate(place, "--reference", dense, *flags, "--update-card") == 0
    result, table = json.loads((tmp_path / "scores").read_text()), capsys.readouterr().out
    assert set(result) == {"model", "settings", "tasks", "reference_tasks"}
    assert list(result["tasks"]) == list(result["reference_tasks"]) == NAMES
    for name, metrics in result["tasks"].items():
        assert {metric: Score(**score) for metric, score in metrics.items()} == scores[name]
    before, after = (result[key]["ours"]["acc"] for key in ("reference_tasks", "tasks"))
    row = next(line for line in table.splitlines() if line.startswith("ours"))
    assert f"{before['value']:.4f} ± {before['stderr']:.4f}" in row
    assert f"{after['value']:.4f} ± {after['stderr']:.4f}" in row
    assert f"{after['value'] - before['value']:+.4f} ± " in row
    assert row.endswith(f"{after['value'] / before['value']:.1%}")
    assert "mean of 3" in table
    assert f"card updated: {place / 'README.md'}" in table
    kept = json.loads((place / "evaluation.json").read_text())
    assert (kept["tasks"], kept["reference_tasks"]) == (result["tasks"], result["reference_tasks"])
    assert "exact_match" in (place / "README.md").read_text()


def test_a_card_of_a_persons_own_is_left_alone_and_that_is_told(
    small: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = shutil.copytree(small, tmp_path / "own")
    (place / "README.md").write_text("Mine.")
    assert evaluate(place, "--tasks", "pick", "--include-path", folder, "--update-card") == 0
    told = f"{place / 'README.md'} is not a generated card and was not changed; the result is in evaluation.json."
    assert told in capsys.readouterr().out
    assert (place / "README.md").read_text() == "Mine."
    assert json.loads((place / "evaluation.json").read_text())["tasks"]["pick"]


def test_tasks_and_a_text(small: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = save_text(tmp_path / "text.txt", seed=3)
    flags = ["--tasks", "pick", "--limit", 2, "--include-path", folder, "--json", tmp_path / "scores"]
    assert evaluate(small, "--dataset", text, "--max-windows", 2, *flags) == 0
    result, table = json.loads((tmp_path / "scores").read_text()), capsys.readouterr().out
    assert result["perplexity"] > 1
    assert result["tasks"]["pick"]["acc"]["samples"] == 2
    assert table.startswith("perplexity")
    assert "difference" not in table


def test_tasks_are_checked_before_the_model_is_loaded(
    small: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    flags = ["--include-path", folder, "--tasks"]
    assert "has no task 'pikc'. Did you mean pick" in refusal(capsys, tmp_path / "empty", *flags, "last,pikc")
    assert "no file named" in refusal(capsys, tmp_path / "empty", *flags, "pick")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "3"], "--limit requires --tasks"),
        (["--num-fewshot", "0"], "--num-fewshot requires --tasks"),
        (["--tasks", "pick", "--max-windows", "3"], "--max-windows requires --dataset"),
        (["--update-card"], "--update-card requires the folder of a compressed model"),
    ],
)
def test_flags_that_would_say_nothing(
    flags: list[str], message: str, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, dense, *flags)


def test_number_of_examples_must_be_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluate("model", "--tasks", "pick", "--num-fewshot", "-1")
    assert "--num-fewshot: expected an integer" in capsys.readouterr().err


def test_a_trial_does_not_go_into_a_card(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "a card shows whole tasks" in refusal(capsys, small, "--tasks", "pick", "--limit", 2, "--update-card")
    assert not (small / "evaluation.json").exists()


@pytest.mark.parametrize("names", ["", "pick,,last", " "])
def test_empty_names_are_refused(names: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluate("model", "--tasks", names)
    assert "names separated by commas" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- the table


def score(value: float, stderr: float | None = 0.03, higher: bool = True) -> Score:
    return Score(value, stderr, higher, 1000, 0, 1, 1.0, "9.9")


def test_table() -> None:
    before = {"a": {"acc": score(0.5), "acc_norm": score(0.8)}, "b": {"perplexity": score(4e9, None, False)}}
    after = {"a": {"acc": score(0.4), "acc_norm": score(0.6, 0.04)}, "b": {"perplexity": score(5e9, None, False)}}
    lines = [" ".join(line.split()) for line in tasks_table(after, before).splitlines()]
    assert lines[1].endswith(" 80.0%")
    assert lines[2:] == [
        "a acc_norm 0 1,000 0.8000 ± 0.0300 0.6000 ± 0.0400 -0.2000 ± 0.0500 75.0%",
        "b perplexity 0 1,000 4.0000e+09 5.0000e+09 +1.0000e+09",
        "± is one standard error; lm-eval 9.9",
    ]


def test_mean_takes_each_tasks_main_metric() -> None:
    scores = {
        "a": {"acc": score(0.1), "acc_norm": score(0.6)},
        "b": {"acc": score(0.4)},
        "c": {"exact_match,strict-match": score(0.2), "exact_match,flexible-extract": score(0.9)},
        "d": {"perplexity": score(9.0, higher=False)},
    }
    row = next(line for line in tasks_table(scores, None).splitlines() if line.startswith("mean of 3"))
    assert row.split() == f"mean of 3 * 0 3,000 0.4000 ± {0.03 / 3**0.5:.4f}".split()
    assert mean_score([score(0.2, None), score(0.4)]).stderr is None


# ------------------------------------------------------------------------------------------------------ from outside


def test_lm_eval_from_outside_finds_the_same(scores: dict[str, dict[str, Score]], outside: Any) -> None:
    found = outside()["results"]
    for name, metrics in scores.items():
        for metric, score in metrics.items():
            key, _, chosen = metric.partition(",")
            assert found[name][f"{key},{chosen or 'none'}"] == pytest.approx(score.value, rel=1e-5)
            assert found[name][f"{key}_stderr,{chosen or 'none'}"] == pytest.approx(score.stderr, rel=1e-5)
