"""Monitor a served model: compare a sample of live requests with the predictions of the model that it replaced."""

from __future__ import annotations

import dataclasses
import json
import logging
import queue
import random
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from optimum_modegpt.comparison.compare import distances
from optimum_modegpt.comparison.thresholds import Check, Thresholds
from optimum_modegpt.errors import EvaluationError, InvalidConfig, UnsupportedModel
from optimum_modegpt.evaluation.fidelity import check_vocabularies

logger = logging.getLogger(__name__)

MEANS = ("kl", "top1_agreement", "top5_overlap")
CHANGING_ROPE = ("dynamic", "longrope")
"""Types of rotary embeddings that update their table in a forward pass, depending on the length of the text."""
STATUS = {
    "unchecked": "none was set",
    "warming up": "not checked yet, too few requests were compared",
    "held": "all held",
}
"""Descriptions of the statuses. `MonitorSummary.broken` describes the status "broken"."""
Sink = Callable[[dict[str, Any]], None]
Watcher = Callable[[Any, Sequence[Any], Mapping[str, Any]], None]
"""Receives the result of `generate` and its arguments."""


@dataclass(frozen=True)
class MonitorSummary:
    """Results of a monitor so far. Means are over requests."""

    requests: int
    """Sequences served while the monitor was watching."""
    compared: int
    skipped: int
    """Sampled requests that were skipped because the queue was full."""
    waiting: int
    """Sampled requests that are not compared yet."""
    errors: int
    """Requests that could not be observed, compared or written to the sink. Each one was logged."""
    last_error: str | None
    kl: float | None
    """Mean KL(reference ‖ model), in nats per position. This and the next four are None before the first comparison."""
    kl_max: float | None
    top1_agreement: float | None
    top5_overlap: float | None
    recent_kl: float | None
    """Exponentially weighted mean with the span of the window: the newest request has weight 2 / (window + 1). The
    thresholds apply to this and the next field."""
    recent_agreement: float | None
    status: Literal["unchecked", "warming up", "held", "broken"]
    """"unchecked" without thresholds, "warming up" until `window` requests were compared."""
    broken: tuple[str, ...]
    """Descriptions of the thresholds that are currently broken."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, safe for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rows = [
            f"requests: {self.requests:,} served, {self.compared:,} compared, {self.skipped:,} skipped because of a "
            f"full queue, {self.waiting:,} waiting, {self.errors:,} errors"
        ]
        if self.last_error is not None:
            rows.append(f"last error: {self.last_error}")
        if self.kl is not None:
            rows.append(f"KL divergence {self.kl:.4f} nats per position, {self.recent_kl:.4f} over the last requests")
            rows.append(
                f"top-1 agreement {self.top1_agreement:.2%}, {self.recent_agreement:.2%} over the last requests"
            )
        status = "; ".join(self.broken) if self.status == "broken" else STATUS[self.status]
        return "\n".join([*rows, f"thresholds: {status}"])


class CanaryMonitor:
    """Compares a sample of the requests to `model` with the predictions of `reference`.

        with CanaryMonitor(model, reference, thresholds=Thresholds(max_kl=0.1), sink="canary.jsonl") as monitor:
            with monitor.watching():
                serve(model)
        print(monitor.summary())

    A background thread reads prompt and answer with both models and compares every position, as `compare` does. A
    request waits only for the copy of its token ids to the host. If the queue is full, the request is skipped and
    counted. Answers are bit-identical to those without a monitor: the model, its mode and the global random state are
    not changed. However, the comparison uses the device: it runs two forward passes over each sampled request. If that
    matters, put the reference on another device or lower `fraction`. Create the monitor in the serving process, because
    threads do not survive a fork. Later errors do not reach the serving code. They are logged, counted and shown by
    `summary`. If a monitor is garbage-collected without `close`, its thread ends and the waiting requests are dropped.

    Args:
        model: the served model, in evaluation mode.
        reference: the model that it replaced, in evaluation mode, on any device.
        fraction: fraction of requests to compare, sampled by the monitor's own random generator.
        seed: seed of that generator. The same seed samples the same requests of the same sequence.
        window: span of the recent means in compared requests, and number of them before thresholds are checked.
        queue_size: maximum number of waiting requests.
        thresholds: limits of the recent means: `max_kl` and `min_agreement`.
        sink: a file to append one JSON line per comparison to, or a function that receives each record.

    Raises:
        InvalidConfig: a number is out of range, or a threshold cannot be monitored.
        EvaluationError: the models have different vocabularies, or one of them is in training mode.
        UnsupportedModel: a forward pass of a model updates its rotary table, which would change concurrent answers.
        OSError: the file cannot be written.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reference: PreTrainedModel,
        *,
        fraction: float = 0.05,
        seed: int = 0,
        window: int = 100,
        queue_size: int = 64,
        thresholds: Thresholds | None = None,
        sink: Sink | str | Path | None = None,
    ) -> None:
        _check_numbers(fraction, window, queue_size, thresholds)
        _check_models(model, reference)
        self.model, self.reference = model, reference
        self.fraction, self.window = fraction, window
        self.thresholds = thresholds or Thresholds()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._totals = _Totals(window)
        self._requests = self._skipped = self._waiting = self._errors = 0
        self._last_error: str | None = None
        self._was_broken = self._closed = False
        self._sink = _sink(sink)
        self._queue_size = queue_size
        # A SimpleQueue, because the garbage collector may call its `put` at any time.
        self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._end = weakref.finalize(self, self._queue.put, None)
        arguments = weakref.ref(self), self._queue
        self._thread = threading.Thread(target=_work, args=arguments, name="modegpt-canary", daemon=True)
        self._thread.start()

    def __enter__(self) -> CanaryMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def watching(self) -> Iterator[PreTrainedModel]:
        """Observe every call of `model.generate` within the context, including calls by a pipeline."""
        with _watched(self.model, self._observe_call):
            yield self.model

    def observe(
        self,
        input_ids: Tensor,
        output_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
    ) -> None:
        """Observe served requests. Call this from serving code that does not call `model.generate`.

        Args:
            input_ids: prompts, (requests, prompt length), padded on either side if `attention_mask` is given.
            output_ids: prompts and answers, (requests or a multiple, length), as `generate` returns them.
            attention_mask: 1 for each token of a prompt and 0 for padding. None if there is no padding.
            generation_config: the config of the generation, for the tokens that end and pad the answers. The model's
                own config supplies missing values.
        """
        with self._counting_errors("a request could not be observed"):
            stops = _Stops.of(_generation_config(self.model, generation_config, {}))
            self._observe(input_ids, output_ids, attention_mask, stops)

    def summary(self) -> MonitorSummary:
        """Return the results so far."""
        with self._lock:
            totals, checks = self._totals, self._checks()
            return MonitorSummary(
                requests=self._requests,
                compared=totals.count,
                skipped=self._skipped,
                waiting=self._waiting,
                errors=self._errors,
                last_error=self._last_error,
                **totals.means(),
                status=self._status(checks),
                broken=tuple(str(check) for check in checks if not check.held),
            )

    def flush(self) -> None:
        """Wait until every sampled request was compared."""
        with self._idle:
            self._idle.wait_for(lambda: self._waiting == 0)

    def close(self) -> None:
        """Compare the waiting requests, and end the thread. Later requests are not observed."""
        with self._lock:
            self._closed = True
        self._end()
        self._thread.join()

    # -------------------------------------------------------------------------------------------- on the request's path

    def _observe_call(self, output: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Observe the requests of one `generate` call from its output and arguments."""
        with self._counting_errors("a request could not be observed"):
            given = dict(zip(("inputs", "generation_config"), args, strict=False)) | dict(kwargs)
            ids = _prompts(given)
            config = _generation_config(self.model, given.pop("generation_config", None), given)
            mask = _attention_mask(self.model, ids, given.get("attention_mask"), config)
            self._observe(ids, getattr(output, "sequences", output), mask, _Stops.of(config))

    def _observe(self, input_ids: Tensor, output_ids: Tensor, attention_mask: Tensor | None, stops: _Stops) -> None:
        repeats = len(output_ids) // len(input_ids)
        for row in range(len(output_ids)):
            with self._lock:
                if self._closed:
                    return
                number, self._requests = self._requests, self._requests + 1
                chosen = self._random.random() < self.fraction
            if chosen:
                mask = None if attention_mask is None else attention_mask[row // repeats]
                prompt, ids = input_ids[row // repeats].cpu(), output_ids[row].cpu()
                self._put(_request(number, prompt, ids, mask, stops))

    def _put(self, request: _Request) -> None:
        with self._lock:
            if self._closed:
                return
            if self._queue.qsize() >= self._queue_size:
                self._skipped += 1
                return
            self._waiting += 1
            self._queue.put(request)

    # --------------------------------------------------------------------------------------------------- in the thread

    def _handle(self, request: _Request) -> None:
        with self._counting_errors(f"request {request.number} could not be compared"):
            self._compare(request)
        with self._idle:
            self._waiting -= 1
            self._idle.notify_all()

    @torch.inference_mode()
    def _compare(self, request: _Request) -> None:
        found = distances(self.model, self.reference, torch.cat((request.prompt, request.answer)))
        record = {
            "request": request.number,
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "prompt_tokens": len(request.prompt),
            "answer_tokens": len(request.answer),
            "kl": float(found.kl.mean()),
            "kl_of_answer": float(found.kl[len(request.prompt) - 1 :].mean()),
            "kl_max": float(found.kl.max()),
            "top1_agreement": float(found.top1.mean()),
            "top5_overlap": float(found.top5.mean()),
        }
        with self._lock:
            self._totals.add(record)
            means, checks = self._totals.means(), self._checks()
            status = self._status(checks)
            crossed, self._was_broken = (status == "broken") != self._was_broken, status == "broken"
        if crossed:
            now = "a threshold is broken" if status == "broken" else "all thresholds hold again"
            logger.warning("canary: %s over the last requests: %s", now, "; ".join(map(str, checks)))
        self._sink({**record, **{key: means[key] for key in ("recent_kl", "recent_agreement")}, "status": status})

    # ----------------------------------------------------------------------------------------------------------- shared

    def _checks(self) -> tuple[Check, ...]:
        if self._totals.count == 0:
            return ()
        return self.thresholds.checks(
            {"kl": self._totals.recent("kl"), "top1_agreement": self._totals.recent("top1_agreement")}
        )

    def _status(self, checks: tuple[Check, ...]) -> Literal["unchecked", "warming up", "held", "broken"]:
        if self.thresholds == Thresholds():
            return "unchecked"
        if self._totals.count < self.window:
            return "warming up"
        return "held" if all(check.held for check in checks) else "broken"

    @contextmanager
    def _counting_errors(self, what: str) -> Iterator[None]:
        """Log and count an error of the body, which `summary` reports, instead of raising it into the serving code."""
        try:
            yield
        except Exception as error:
            with self._lock:
                self._errors += 1
                self._last_error = f"{what}: {type(error).__name__}: {error}"
            logger.warning("canary: %s", self._last_error, exc_info=error)


def _work(monitor: weakref.ref[CanaryMonitor], requests: queue.SimpleQueue[_Request | None]) -> None:
    """Handle requests until the monitor is closed or garbage-collected. The thread must not keep it alive."""
    while (request := requests.get()) is not None and (living := monitor()) is not None:
        living._handle(request)
        del living


@dataclass(frozen=True)
class _Request:
    number: int
    prompt: Tensor
    answer: Tensor


def _request(number: int, prompt: Tensor, ids: Tensor, mask: Tensor | None, stops: _Stops) -> _Request:
    answer = ids[len(prompt) :]
    if len(answer) == 0 or not torch.equal(ids[: len(prompt)], prompt):
        raise EvaluationError("output_ids must be the prompts followed by the answers, as generate returns them.")
    read = prompt if mask is None else prompt[mask.cpu().bool()]
    if len(read) == 0:
        raise EvaluationError("the attention mask hides every token of a prompt; at least one token must be visible.")
    return _Request(number, read, stops.until_end(answer))


def _prompts(arguments: Mapping[str, Any]) -> Tensor:
    """Return the token ids that `generate` reads if it is called with these arguments."""
    given = (arguments.get(name) for name in ("inputs", "input_ids"))
    ids = next((each for each in given if each is not None), None)
    if ids is None or arguments.get("inputs_embeds") is not None:
        raise EvaluationError(
            "generate was called without token ids or with inputs_embeds; only prompts of token ids are compared."
        )
    return ids


def _generation_config(model: Any, config: GenerationConfig | None, arguments: Mapping[str, Any]) -> GenerationConfig:
    """Merge the arguments of a `generate` call, its generation config and the model's, as `generate` does."""
    merged, _ = model._prepare_generation_config(config, **arguments)
    return merged


def _attention_mask(model: Any, ids: Tensor, given: Tensor | None, config: GenerationConfig) -> Tensor:
    """Return the attention mask of a `generate` call. If none was passed, infer it as `generate` does."""
    if given is not None:
        return given
    model._prepare_special_tokens(config, device=ids.device)
    return model._prepare_attention_mask_for_generation(ids, config, {})


@dataclass(frozen=True)
class _Stops:
    """The tokens that end an answer, and the token that pads an answer that ended early."""

    ends: Any
    pad: int | None

    @classmethod
    def of(cls, config: GenerationConfig) -> _Stops:
        """Return the stop tokens of a complete generation config."""
        return cls(config.eos_token_id, config.pad_token_id)

    def until_end(self, answer: Tensor) -> Tensor:
        """Return the answer up to and including the token that ended it, without the padding after it."""
        ends = torch.as_tensor([] if self.ends is None else self.ends).cpu().flatten()
        found = torch.isin(answer, ends).nonzero()
        if len(found):
            return answer[: int(found[0]) + 1]
        # The answer may have ended without an end token, for example at a stop string.
        written = answer.new_zeros(0) if self.pad is None else (answer != self.pad).nonzero()
        return answer[: int(written[-1]) + 1] if len(written) else answer


class _Watched:
    """Replaces a model's `generate`, and passes its results to all watchers."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.generate: Any = model.generate
        self.own = vars(model).get("generate")
        self.watchers: list[Watcher] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.generate(*args, **kwargs)
        for watcher in tuple(self.watchers):
            watcher(output, args, kwargs)
        return output


_WATCHING = threading.Lock()


@contextmanager
def _watched(model: Any, watcher: Watcher) -> Iterator[None]:
    """Call `watcher` after every `generate` within the context. Several contexts on one model may end in any order."""
    with _WATCHING:
        found = vars(model).get("generate")
        watched = found if isinstance(found, _Watched) else _Watched(model)
        watched.watchers.append(watcher)
        model.generate = watched
    try:
        yield
    finally:
        with _WATCHING:
            watched.watchers.remove(watcher)
            # If other code has wrapped `generate` in the meantime, this wrapper stays inside theirs without watchers.
            if not watched.watchers and vars(model).get("generate") is watched:
                del model.generate
                if watched.own is not None:
                    model.generate = watched.own


class _Totals:
    """Running means of the records, and exponentially weighted means with bias correction."""

    def __init__(self, window: int) -> None:
        self.decay = 1 - 2 / (window + 1)
        self.count, self.weight, self.kl_max = 0, 0.0, 0.0
        self.sums: dict[str, float] = dict.fromkeys(MEANS, 0.0)
        self.weighted: dict[str, float] = dict.fromkeys(MEANS, 0.0)

    def add(self, record: dict[str, Any]) -> None:
        self.count += 1
        self.weight = self.decay * self.weight + 1
        self.kl_max = max(self.kl_max, record["kl_max"])
        for key in self.sums:
            self.sums[key] += record[key]
            self.weighted[key] = self.decay * self.weighted[key] + record[key]

    def recent(self, key: str) -> float | None:
        return self.weighted[key] / self.weight if self.count else None

    def means(self) -> dict[str, float | None]:
        return {
            **{key: total / self.count if self.count else None for key, total in self.sums.items()},
            "kl_max": self.kl_max if self.count else None,
            "recent_kl": self.recent("kl"),
            "recent_agreement": self.recent("top1_agreement"),
        }


def _sink(given: Sink | str | Path | None) -> Sink:
    """Return a function that appends records to a file.

    It opens the file for each record, so that the file may be rotated. The file is opened once here, so that a wrong
    path raises early.
    """
    if given is None or callable(given):
        return given or (lambda record: None)

    def append(*records: dict[str, Any]) -> None:
        with Path(given).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    append()
    return append


def _check_numbers(fraction: float, window: int, queue_size: int, thresholds: Thresholds | None) -> None:
    if not 0 <= fraction <= 1:
        raise InvalidConfig(f"fraction must be in [0, 1], found {fraction}.")
    for name, value in (("window", window), ("queue_size", queue_size)):
        if value < 1:
            raise InvalidConfig(f"{name} must be at least 1, found {value}.")
    if thresholds is not None and thresholds.max_perplexity_ratio is not None:
        raise InvalidConfig("a monitor accepts max_kl and min_agreement; for max_perplexity_ratio use compare.")


def _check_models(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    check_vocabularies(model, reference)
    for name, each in (("served model", model), ("reference", reference)):
        if each.training:
            raise EvaluationError(f"the {name} is in training mode; call its eval() first.")
        if changing := sorted({kind for module in each.modules() for kind in _rope_types(module)} & {*CHANGING_ROPE}):
            raise UnsupportedModel(
                f"the {name} has rotary embeddings of type {changing[0]}: each forward pass may update their table, so "
                "the monitor's thread would change concurrent answers. Use compare on a prompt file instead."
            )


def _rope_types(module: torch.nn.Module) -> Iterable[Any]:
    found = getattr(module, "rope_type", None)
    return found.values() if isinstance(found, dict) else [found]
