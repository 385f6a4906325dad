"""Watches a served model: compares a sampled share of live requests with the model that it replaced."""

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
"""Rotary embeddings that rewrite their table in a forward pass, by the length of the text."""
STATUS = {
    "unchecked": "none was set",
    "warming up": "not judged yet, too few requests were compared",
    "held": "all held",
}
"""In words for people; for those that are broken `MonitorSummary.broken` has them."""
Sink = Callable[[dict[str, Any]], None]
Watcher = Callable[[Any, Sequence[Any], Mapping[str, Any]], None]
"""Takes what `generate` returned, and its arguments."""


@dataclass(frozen=True)
class MonitorSummary:
    """What a monitor saw until now; means over requests."""

    requests: int
    """Sequences that were served while it watched."""
    compared: int
    skipped: int
    """Chosen, but left out because the queue was full."""
    waiting: int
    """Chosen, and not compared yet."""
    errors: int
    """Requests that could not be observed, compared, or written to the sink; each was logged."""
    last_error: str | None
    kl: float | None
    """Mean KL(reference ‖ model), in nats per position; None before the first comparison, like all that follow."""
    kl_max: float | None
    top1_agreement: float | None
    top5_overlap: float | None
    recent_kl: float | None
    """Exponentially weighted mean with the span of the window: the newest of `window` requests weighs 2 / (window + 1).
    The thresholds hold for this and the next."""
    recent_agreement: float | None
    status: Literal["unchecked", "warming up", "held", "broken"]
    """Unchecked without thresholds; warming up until `window` requests were compared."""
    broken: tuple[str, ...]
    """The thresholds that do not hold now, in words."""

    def to_dict(self) -> dict[str, Any]:
        """All of it, safe for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rows = [
            f"requests: {self.requests:,} served, {self.compared:,} compared, {self.skipped:,} skipped for a full "
            f"queue, {self.waiting:,} waiting, {self.errors:,} errors"
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
    """Compares a share of the requests to `model` with what `reference` would have predicted.

        with CanaryMonitor(model, reference, thresholds=Thresholds(max_kl=0.1), sink="canary.jsonl") as monitor:
            with monitor.watching():
                serve(model)
        print(monitor.summary())

    A thread of its own reads prompt and answer with both models, at every position as in `compare`. The request waits
    for nothing but the copy of its token ids to the host; a full queue skips and counts. The answers are those without
    a monitor, bit for bit: nothing of the model, its mode or the global random state is touched. The comparison takes
    its share of the device, though: two forward passes over each chosen request. Put the reference on another device,
    or lower `fraction`, where that matters. Start it in the process that serves; threads do not survive a fork.
    Nothing that goes wrong later reaches the serving code: it is logged, counted, and shown by `summary`. A monitor
    that is dropped without `close` ends, and what waits is not compared.

    Args:
        model: the served model, in evaluation mode.
        reference: the one it replaced, in evaluation mode, on any device.
        fraction: of the requests that are compared, chosen by a generator of the monitor's own.
        seed: of that generator; the same requests in the same order are chosen again.
        window: span in compared requests of the recent means, and how many it takes before thresholds are judged.
        queue_size: chosen requests that may wait.
        thresholds: for the recent means; `max_kl` and `min_agreement`.
        sink: a file that JSON lines are added to, one for each comparison, or a function that takes each record.

    Raises:
        InvalidConfig: a number is out of range, or a threshold cannot be watched.
        EvaluationError: the models have other vocabularies, or one of them is in training mode.
        UnsupportedModel: a forward pass changes a model's rotary table, and with it answers that are being written.
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
        # Simple, for its `put` may be called by the garbage collector at any moment.
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
        """While it lasts, every `model.generate` is observed, also one that a pipeline calls."""
        with _watched(self.model, self._observe_call):
            yield self.model

    def observe(
        self,
        input_ids: Tensor,
        output_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
    ) -> None:
        """Tells of requests that were served; for serving code that does not call `model.generate`.

        Args:
            input_ids: prompts, (requests, prompt length), padded on either side where `attention_mask` says so.
            output_ids: prompts and answers, (requests or a multiple, length), as `generate` returns them.
            attention_mask: 1 at each token of a prompt that counts; None where all do.
            generation_config: with which the answers were written, for the tokens that end and pad them; the model's
                own says what it leaves open.
        """
        with self._counting_errors("a request could not be observed"):
            stops = _Stops.of(_generation_config(self.model, generation_config, {}))
            self._observe(input_ids, output_ids, attention_mask, stops)

    def summary(self) -> MonitorSummary:
        """What was seen until now."""
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
        """Waits until every chosen request was compared."""
        with self._idle:
            self._idle.wait_for(lambda: self._waiting == 0)

    def close(self) -> None:
        """Compares what still waits, and ends the thread; later requests are not observed."""
        with self._lock:
            self._closed = True
        self._end()
        self._thread.join()

    # -------------------------------------------------------------------------------------------- on the request's path

    def _observe_call(self, output: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Observes the requests of one `generate` call from its output and arguments."""
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
        """Serving goes on whatever happens here; `summary` and the log tell of it."""
        try:
            yield
        except Exception as error:
            with self._lock:
                self._errors += 1
                self._last_error = f"{what}: {type(error).__name__}: {error}"
            logger.warning("canary: %s", self._last_error, exc_info=error)


def _work(monitor: weakref.ref[CanaryMonitor], requests: queue.SimpleQueue[_Request | None]) -> None:
    """Handles requests until the monitor is closed or gone, which the thread must not keep alive."""
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
        raise EvaluationError("output_ids must be the prompts with the answers behind them, as generate gives them.")
    read = prompt if mask is None else prompt[mask.cpu().bool()]
    if len(read) == 0:
        raise EvaluationError("the attention mask hides every token of a prompt; there is nothing to compare.")
    return _Request(number, read, stops.until_end(answer))


def _prompts(arguments: Mapping[str, Any]) -> Tensor:
    """Returns the token ids that `generate` reads if it is called with these arguments."""
    given = (arguments.get(name) for name in ("inputs", "input_ids"))
    ids = next((each for each in given if each is not None), None)
    if ids is None or arguments.get("inputs_embeds") is not None:
        raise EvaluationError(
            "generate was called without token ids or with inputs_embeds; only prompts of token ids are compared."
        )
    return ids


def _generation_config(model: Any, config: GenerationConfig | None, arguments: Mapping[str, Any]) -> GenerationConfig:
    """Merges the arguments of a `generate` call, its generation config and the model's, as `generate` does."""
    merged, _ = model._prepare_generation_config(config, **arguments)
    return merged


def _attention_mask(model: Any, ids: Tensor, given: Tensor | None, config: GenerationConfig) -> Tensor:
    """Returns the attention mask of a `generate` call; without one, `generate` infers it from the padding token."""
    if given is not None:
        return given
    model._prepare_special_tokens(config, device=ids.device)
    return model._prepare_attention_mask_for_generation(ids, config, {})


@dataclass(frozen=True)
class _Stops:
    """The tokens that end an answer, and the token that pads an answer which ended early."""

    ends: Any
    pad: int | None

    @classmethod
    def of(cls, config: GenerationConfig) -> _Stops:
        """Returns the stop tokens of a complete generation config."""
        return cls(config.eos_token_id, config.pad_token_id)

    def until_end(self, answer: Tensor) -> Tensor:
        """The answer with the token that ended it and without the padding after it."""
        ends = torch.as_tensor([] if self.ends is None else self.ends).cpu().flatten()
        found = torch.isin(answer, ends).nonzero()
        if len(found):
            return answer[: int(found[0]) + 1]
        # What ended it may have been no token of its own: a stop string, for one.
        written = answer.new_zeros(0) if self.pad is None else (answer != self.pad).nonzero()
        return answer[: int(written[-1]) + 1] if len(written) else answer


class _Watched:
    """Stands in for a model's `generate`, and tells all who watch what it returned."""

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
    """Inside, `watcher` is told of every `generate`. Several on one model may end in any order."""
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
            # Someone else may have wrapped it meanwhile; then it stays below theirs, with nobody to tell.
            if not watched.watchers and vars(model).get("generate") is watched:
                del model.generate
                if watched.own is not None:
                    model.generate = watched.own


class _Totals:
    """Running means of the records, and exponentially weighted ones without the pull of their start."""

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
    """Opens the file anew for each record, so that it may be rotated; once now, so that a wrong path shows here."""
    if given is None or callable(given):
        return given or (lambda record: None)

    def append(*records: dict[str, Any]) -> None:
        with Path(given).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    append()
    return append


def _check_numbers(fraction: float, window: int, queue_size: int, thresholds: Thresholds | None) -> None:
    if not 0 <= fraction <= 1:
        raise InvalidConfig(f"fraction must lie in [0, 1], found {fraction}.")
    for name, value in (("window", window), ("queue_size", queue_size)):
        if value < 1:
            raise InvalidConfig(f"{name} must be at least 1, found {value}.")
    if thresholds is not None and thresholds.max_perplexity_ratio is not None:
        raise InvalidConfig("a monitor takes max_kl and min_agreement; for max_perplexity_ratio use compare.")


def _check_models(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    check_vocabularies(model, reference)
    for name, each in (("served model", model), ("reference", reference)):
        if each.training:
            raise EvaluationError(f"the {name} is in training mode; call its eval() before it is watched.")
        if changing := sorted({kind for module in each.modules() for kind in _rope_types(module)} & {*CHANGING_ROPE}):
            raise UnsupportedModel(
                f"the {name} has rotary embeddings of type {changing[0]}: each forward pass may rewrite their table, "
                "and the monitor's thread would change answers that are being written. Use compare on a prompt file."
            )


def _rope_types(module: torch.nn.Module) -> Iterable[Any]:
    found = getattr(module, "rope_type", None)
    return found.values() if isinstance(found, dict) else [found]
