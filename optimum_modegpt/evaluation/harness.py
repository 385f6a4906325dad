"""Run tasks of lm-evaluation-harness on a loaded model."""

from __future__ import annotations

import copy
import difflib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from optimum_modegpt.errors import EvaluationError
from optimum_modegpt.evaluation.perplexity import evaluating
from optimum_modegpt.evaluation.randomness import kept_random_state
from optimum_modegpt.progress import bars_of_libraries

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel

MAIN_METRICS = ("acc_norm", "acc", "exact_match", "f1")
"""Metrics in order of preference for a task's score in a mean over tasks. All are fractions, and higher is better."""


@dataclass(frozen=True)
class Score:
    """One metric of one task, or of a group of tasks."""

    value: float
    stderr: float | None
    """Standard error over the samples. None if lm-eval does not report it."""
    higher_is_better: bool | None
    samples: int
    num_fewshot: int | None
    """Examples before each question. None for a mean over tasks with different numbers."""
    batch_size: int
    """Requests per forward pass. It changes scores slightly because of padding."""
    version: str | float | None
    """Version of the task. Scores of different versions cannot be compared."""
    lm_eval: str
    """Version of lm-eval."""


TaskScores = Mapping[str, Mapping[str, Score]]
"""Scores by task and metric."""


@dataclass(frozen=True)
class Tasks:
    """Tasks and groups of tasks with loaded data, which can be run on any number of models."""

    manager: TaskManager
    roots: tuple[Task | Group, ...]

    @property
    def names(self) -> list[str]:
        """Return the names of the tasks. A group with its own score replaces its members."""
        names, items = [], list(self.roots)
        while items:
            item: Any = items.pop(0)
            if not hasattr(item, "has_aggregation"):
                names.append(item.task_name)
            elif item.has_aggregation:
                names.append(item.name)
            else:
                items = [*item, *items]
        return names


def load_tasks(names: Sequence[str], *, include_path: str | Path | None = None, progress: bool = False) -> Tasks:
    """Load the tasks of these names with their data, and check them. Call this before loading any model.

    Args:
        names: tasks, groups or tags of lm-eval, or patterns such as `mmlu_*`.
        include_path: folder with custom task files, which take precedence over those of lm-eval.
        progress: whether to show the progress bars of downloads.

    Raises:
        EvaluationError: a name is unknown, the data of a task cannot be loaded, or a task is requested twice.
        ImportError: lm-eval is not installed.
    """
    try:
        import lm_eval.models.huggingface
        import lm_eval.result_schema  # noqa: F401 - older versions lack this module and cannot reuse loaded tasks
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f"tasks require lm-eval 0.4.12 or later ({error}): pip install 'optimum-modegpt[eval]'"
        ) from error
    if include_path is not None and not Path(include_path).is_dir():
        raise EvaluationError(f"{include_path} is not a folder; expected a folder with YAML files of tasks.")
    with _kept_to_itself(progress):
        manager = TaskManager(include_path=include_path)
        roots = []
        for name in _known(names, manager):
            roots += _load(name, manager)
        try:
            manager.load(roots)
        except ValueError as error:
            raise EvaluationError(f"tasks are requested twice: {error}. Name either the group or its tasks.") from error
    return Tasks(manager, tuple(roots))


def harness(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Tasks,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> dict[str, dict[str, Score]]:
    """Compute the scores by task or group and by metric, as `lm_eval run --model hf` does for the saved model.

    A metric on filtered answers has the filter in its name, as in `exact_match,strict-match`. The caller's random state
    and tokenizer and the model's mode are not changed.

    Args:
        model: the model, on the device to run it on.
        tokenizer: the model's own tokenizer.
        tasks: the tasks from `load_tasks`.
        num_fewshot: examples before each question. None means each task's own number. A zero-shot task always gets
            none.
        limit: maximum number of samples of each task, for a trial run.
        batch_size: requests per forward pass. None means lm-eval's default of 1, which needs no padding.
        progress: whether to show lm-eval's progress bars.

    Raises:
        EvaluationError: the tasks cannot be run on this model, or a likelihood is not finite.
    """
    import lm_eval
    from lm_eval.models import huggingface

    # lm-eval's decorators hide the signatures of both.
    wrap, run = cast("Any", huggingface.HFLM), cast("Any", lm_eval.simple_evaluate)
    with evaluating(model), _kept_to_itself(progress):
        lm = wrap(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size or 1)
        try:
            found = run(
                lm,
                tasks=list(tasks.roots),
                task_manager=tasks.manager,
                num_fewshot=num_fewshot,
                limit=limit,
                log_samples=False,
            )
        except (ArithmeticError, AssertionError, ValueError) as error:
            raise EvaluationError(f"lm-eval cannot run {', '.join(tasks.names)} on this model: {error}") from error
    for root in tasks.roots:
        _check_finite(root)
    scores = {}
    for name in found["results"]:
        if metrics := _metrics(name, found, lm.batch_size):
            scores[name] = metrics
    return scores


def main_scores(scores: TaskScores) -> list[Score]:
    """Return the score to use in a mean over tasks, for each task that has one of `MAIN_METRICS`."""
    main = []
    for metrics in scores.values():
        by_metric: dict[str, Score] = {}
        for name, score in metrics.items():
            by_metric.setdefault(name.partition(",")[0], score)  # the first filter of a metric
        for name in MAIN_METRICS:
            if name in by_metric:
                main.append(by_metric[name])
                break
    return main


def mean_score(scores: Sequence[Score]) -> Score:
    """Compute the unweighted mean of the scores of several tasks."""
    values, errors, samples, shots = [], [], 0, scores[0].num_fewshot
    for score in scores:
        values.append(score.value)
        errors.append(score.stderr)
        samples += score.samples
        if score.num_fewshot != shots:
            shots = None
    stderr = None
    if None not in errors:
        stderr = math.hypot(*errors) / len(scores)
    value = sum(values) / len(scores)
    return replace(scores[0], value=value, stderr=stderr, samples=samples, num_fewshot=shots, version=None)


def _known(names: Sequence[str], manager: TaskManager) -> list[str]:
    """Return the distinct tasks of names and patterns."""
    known: list[str] = []
    for name in names:
        found = manager.match_tasks([name])
        if not found:
            close = difflib.get_close_matches(name, manager.all_tasks, n=5)
            advice = f"Did you mean {', '.join(close)}?" if close else "`lm_eval ls tasks` lists all."
            raise EvaluationError(f"lm-eval has no task {name!r}. {advice}")
        known += found
    return list(dict.fromkeys(known))


def _load(name: str, manager: TaskManager) -> list[Task | Group]:
    """Load a task, a group, or the tasks of a tag."""
    try:
        found = manager.load(name)
    except Exception as error:  # a task's files and data may raise anything
        raise EvaluationError(
            f"the task {name!r} cannot be loaded: {type(error).__name__}: {error}\n"
            "The data comes from the Hub, unless the task's files say otherwise. Check the connection, or run the task "
            "once on a machine with a connection."
        ) from error
    items = {**found.get("groups", {}), **found["tasks"]}
    for group in found.get("groups", {}).values():
        for member in group.child_names:
            items.pop(member, None)
    return list(items.values())


def _check_finite(root: Any) -> None:
    """Raise if a likelihood of a task, or of a task of a group, is not finite.

    lm-eval treats a likelihood of nan like any other number, so a broken model would look like a weak one.
    """
    if hasattr(root, "get_all_tasks"):
        for task in root.get_all_tasks():
            _check_finite(task)
        return
    for instance in root.instances:
        for answer in instance.resps:
            likelihood = answer[0] if isinstance(answer, tuple) else answer
            if isinstance(likelihood, float) and not math.isfinite(likelihood):
                raise EvaluationError(
                    f"the model's likelihood of an answer in {root.task_name} is not finite. Its weights or "
                    "activations overflow: try another --dtype, and check that the folder is complete."
                )


def _metrics(name: str, found: dict[str, Any], batch_size: int) -> dict[str, Score]:
    """Return the scores of a task from lm-eval's entries `metric,filter` and `metric_stderr,filter`."""
    entry, metrics = found["results"][name], {}
    for key, value in entry.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        stderr = entry.get(f"{metric}_stderr,{chosen}")
        metrics[metric if chosen == "none" else key] = Score(
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, Real) else None,
            higher_is_better=found["higher_is_better"].get(name, {}).get(metric),
            samples=entry["sample_len"],
            num_fewshot=found["n-shot"].get(name),
            batch_size=batch_size,
            version=found["versions"].get(name),
            lm_eval=found["lm_eval_version"],
        )
    return metrics


@contextmanager
def _kept_to_itself(progress: bool) -> Iterator[None]:
    """Undo the side effects of lm-eval within the context.

    lm-eval seeds the global random generators, prints to stdout, shows bars, and asks git for a commit, which prints an
    error outside a repository.
    """
    from lm_eval import evaluator

    original = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: ""
    try:
        with kept_random_state(), redirect_stdout(sys.stderr), bars_of_libraries(progress):
            yield
    finally:
        evaluator.get_git_commit_hash = original
