"""Monitor a served model: compare a sample of live requests with the predictions of the model that it replaced."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import random
import statistics
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from optimum_modegpt.comparison.compare import distances
from optimum_modegpt.comparison.thresholds import Thresholds
from optimum_modegpt.errors import EvaluationError, InvalidConfig, UnsupportedModel
from optimum_modegpt.evaluation.fidelity import check_vocabularies

logger = logging.getLogger(__name__)

Sink = Callable[[dict[str, Any]], object]


@dataclass
class MonitorSummary:
    """Results of a monitor so far. Means are over requests, and None before the first comparison."""

    requests: int = 0
    """Sequences served while the monitor was watching."""
    compared: int = 0
    skipped: int = 0
    """Sampled requests that were skipped because the queue was full."""
    waiting: int = 0
    """Sampled requests that are not compared yet."""
    errors: int = 0
    """Requests that could not be observed, compared or written to the sink. Each one was logged."""
    last_error: str | None = None
    kl: float | None = None
    """Mean KL(reference ‖ model), in nats per position."""
    kl_max: float | None = None
    top1_agreement: float | None = None
    top5_overlap: float | None = None
    recent_kl: float | None = None
    recent_agreement: float | None = None
    """Means over the last `window` compared requests. The thresholds apply to these two."""
    status: Literal["unchecked", "warming up", "held", "broken"] = "unchecked"
    """"unchecked" without thresholds, "warming up" until `window` requests were compared."""
    broken: tuple[str, ...] = ()
    """Descriptions of the thresholds that are currently broken."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, safe for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        text = (
            f"requests: {self.requests:,} served, {self.compared:,} compared, {self.skipped:,} skipped because of a "
            f"full queue, {self.waiting:,} waiting, {self.errors:,} errors\n"
        )
        if self.last_error is not None:
            text += f"last error: {self.last_error}\n"
        if self.compared:
            text += f"KL divergence {self.kl:.4f} nats per position, {self.recent_kl:.4f} over the last requests\n"
            text += f"top-1 agreement {self.top1_agreement:.2%}, {self.recent_agreement:.2%} over the last requests\n"
        return text + f"thresholds: {'; '.join(self.broken) or self.status}"


class CanaryMonitor:
    """Compares a sample of the requests to `model` with the predictions of `reference`.

        with CanaryMonitor(model, reference, thresholds=Thresholds(max_kl=0.1), sink="canary.jsonl") as monitor:
            with monitor.watching():
                serve(model)
        print(monitor.summary())

    A background thread reads prompt and answer with both models and compares every position, as `compare` does. A
    request waits only for the copy of its token ids to the host. Answers are bit-identical to those without a monitor:
    the model, its mode and the global random state are not changed. However, the comparison runs two forward passes
    over each sampled request. If that matters, put the reference on another device or lower `fraction`. Create the
    monitor in the serving process, because threads do not survive a fork. Errors of the comparison do not reach the
    serving code. They are logged, counted and shown by `summary`.

    Args:
        model: the served model, in evaluation mode.
        reference: the model that it replaced, in evaluation mode, on any device.
        fraction: fraction of requests to compare, sampled by the monitor's own random generator.
        seed: seed of that generator. The same seed samples the same requests of the same sequence.
        window: number of compared requests in the recent means, and before thresholds are checked.
        queue_size: maximum number of waiting requests. If the queue is full, a request is skipped and counted.
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
        self.thresholds = thresholds or Thresholds()
        if not 0 <= fraction <= 1:
            raise InvalidConfig(f"fraction must be in [0, 1], found {fraction}.")
        if window < 1 or queue_size < 1:
            raise InvalidConfig(f"window and queue_size must be at least 1, found {window} and {queue_size}.")
        if self.thresholds.max_perplexity_ratio is not None:
            raise InvalidConfig("a monitor accepts max_kl and min_agreement; for max_perplexity_ratio use compare.")
        _check_models(model, reference)
        self.model: Any = model
        self.reference = reference
        self.fraction, self.queue_size = fraction, queue_size
        self._sink = _appending(Path(sink)) if isinstance(sink, str | Path) else sink
        self._random = random.Random(seed)
        self._recent: deque[tuple[float, float]] = deque(maxlen=window)
        self._summary = MonitorSummary(status="unchecked" if self.thresholds == Thresholds() else "warming up")
        self._lock = threading.Lock()
        self._closed = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="modegpt-canary")
        self._last: Future[None] | None = None

    def __enter__(self) -> CanaryMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def watching(self) -> Iterator[PreTrainedModel]:
        """Observe every call of `model.generate` within the context, including calls by a pipeline."""
        model = self.model
        generate, replaced = model.generate, vars(model).get("generate")
        active = True

        @functools.wraps(generate)
        def watched(*args: Any, **kwargs: Any) -> Any:
            output = generate(*args, **kwargs)
            if active:
                with self._counting_errors("a request could not be observed"):
                    self._observe_call(output, *args, **kwargs)
            return output

        model.generate = watched
        try:
            yield model
        finally:
            active = False
            # If other code has wrapped `generate` in the meantime, this wrapper stays inside theirs and does nothing.
            if vars(model).get("generate") is watched:
                del model.generate
                if replaced is not None:
                    model.generate = replaced

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
            config, _ = self.model._prepare_generation_config(generation_config)
            self._observe(input_ids, output_ids, attention_mask, config)

    def summary(self) -> MonitorSummary:
        """Return the results so far."""
        with self._lock:
            return dataclasses.replace(self._summary)

    def flush(self) -> None:
        """Wait until every sampled request was compared."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Compare the waiting requests, and end the thread, as Python does at exit. Later requests are not observed."""
        with self._lock:
            self._closed = True
        self._thread.shutdown()

    # -------------------------------------------------------------------------------------------- on the request's path

    def _observe_call(
        self, output: Any, inputs: Any = None, generation_config: Any = None, *_: Any, **given: Any
    ) -> None:
        """Observe the requests of one `generate` call from its output and its arguments."""
        ids = inputs
        if ids is None:
            ids = given.get("input_ids")
        if ids is None or given.get("inputs_embeds") is not None:
            raise EvaluationError(
                "generate was called without token ids or with inputs_embeds; only prompts of token ids are compared."
            )
        config, _ = self.model._prepare_generation_config(generation_config, **given)
        mask = given.get("attention_mask")
        if mask is None:  # inferred as `generate` does
            self.model._prepare_special_tokens(config, device=ids.device)
            mask = self.model._prepare_attention_mask_for_generation(ids, config, {})
        self._observe(ids, getattr(output, "sequences", output), mask, config)

    def _observe(self, inputs: Tensor, outputs: Tensor, masks: Tensor | None, config: Any) -> None:
        repeats = len(outputs) // len(inputs)
        for row, output in enumerate(outputs):
            sampled = None
            if self._random.random() < self.fraction:
                mask = None if masks is None else masks[row // repeats].cpu().bool()
                sampled = _split(inputs[row // repeats].cpu(), output.cpu(), mask, config)
            with self._lock:
                if self._closed:
                    return
                number = self._summary.requests
                self._summary.requests += 1
                if sampled is None:
                    continue
                if self._summary.waiting >= self.queue_size:
                    self._summary.skipped += 1
                    continue
                self._summary.waiting += 1
                self._last = self._thread.submit(self._compare, number, *sampled)

    # --------------------------------------------------------------------------------------------------- in the thread

    @torch.inference_mode()
    def _compare(self, number: int, prompt: Tensor, answer: Tensor) -> None:
        with self._counting_errors(f"request {number} could not be compared"):
            found = distances(self.model, self.reference, prompt, answer)
            record = {
                "request": number,
                "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
                "prompt_tokens": len(prompt),
                "answer_tokens": len(answer),
                **found.means(),
                "kl_of_answer": float(found.kl[~found.in_prompt].mean()),
            }
            self._add(record)
            if self._sink is not None:
                self._sink(record)
        with self._lock:
            self._summary.waiting -= 1

    def _add(self, record: dict[str, Any]) -> None:
        """Add a record to the summary, and the recent means and the status to the record."""
        with self._lock:
            found = self._summary
            found.compared += 1
            self._recent.append((record["kl"], record["top1_agreement"]))
            for name in ("kl", "top1_agreement", "top5_overlap"):
                mean = getattr(found, name) or 0.0
                setattr(found, name, mean + (record[name] - mean) / found.compared)
            found.kl_max = max(found.kl_max or 0.0, record["kl_max"])
            divergences, agreements = zip(*self._recent, strict=True)
            found.recent_kl, found.recent_agreement = statistics.fmean(divergences), statistics.fmean(agreements)
            before = found.status
            if before != "unchecked" and len(self._recent) == self._recent.maxlen:
                checks = self.thresholds.checks(found.recent_kl, found.recent_agreement)
                found.broken = tuple(str(check) for check in checks if not check.held)
                found.status = "broken" if found.broken else "held"
            record["recent_kl"], record["recent_agreement"] = found.recent_kl, found.recent_agreement
            record["status"], broken = found.status, found.broken
        if broken and before != "broken":
            logger.warning("canary: thresholds broken over the last requests: %s", "; ".join(broken))
        elif before == "broken" and not broken:
            logger.warning("canary: all thresholds hold again over the last requests")

    @contextmanager
    def _counting_errors(self, action: str) -> Iterator[None]:
        """Log and count an error of the body, which `summary` reports, instead of raising it into the serving code."""
        try:
            yield
        except Exception as error:
            with self._lock:
                self._summary.errors += 1
                self._summary.last_error = f"{action}: {type(error).__name__}: {error}"
            logger.warning("canary: %s: %s", action, error, exc_info=error)


def _split(prompt: Tensor, ids: Tensor, mask: Tensor | None, config: Any) -> tuple[Tensor, Tensor]:
    """Split a served sequence into its prompt and its answer (tokens,), without the padding before and after them."""
    answer = ids[len(prompt) :]
    if len(answer) == 0 or not torch.equal(ids[: len(prompt)], prompt):
        raise EvaluationError("output_ids must be the prompts followed by the answers, as generate returns them.")
    if mask is not None:
        prompt = prompt[mask]
    if len(prompt) == 0:
        raise EvaluationError("the attention mask hides every token of a prompt; at least one token must be visible.")
    if config.eos_token_id is not None:
        ended = torch.isin(answer, torch.as_tensor(config.eos_token_id).cpu()).nonzero()
        if len(ended):
            return prompt, answer[: int(ended[0]) + 1]
    if config.pad_token_id is not None:  # an answer may end without an end token, for example at a stop string
        written = (answer != config.pad_token_id).nonzero()
        if len(written):
            return prompt, answer[: int(written[-1]) + 1]
    return prompt, answer


def _appending(file: Path) -> Sink:
    """Return a function that appends a record to a file. It opens the file each time, so that it may be rotated."""
    file.open("a", encoding="utf-8").close()  # raises an error early if the path is wrong

    def append(record: Mapping[str, Any]) -> None:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")

    return append


def _check_models(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    check_vocabularies(model, reference)
    for name, each in (("served model", model), ("reference", reference)):
        if each.training:
            raise EvaluationError(f"the {name} is in training mode; call its eval() first.")
        for module in each.modules():
            kinds = getattr(module, "rope_type", None)
            for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
                if kind in ("dynamic", "longrope"):  # their forward pass changes the table for long texts
                    raise UnsupportedModel(
                        f"the {name} has rotary embeddings of type {kind}: each forward pass may update their table, "
                        "so the monitor's thread would change concurrent answers. Use compare on a prompt file instead."
                    )
