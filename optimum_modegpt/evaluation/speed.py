"""Measure the speed of prefill and decoding of a model and a reference, which take turns in one run.

A compressed block launches a few more kernels than a dense one. If launching kernels takes longer than their work,
because the model or batch is small or the device is fast, then compression saves only memory. `torch.compile` removes
most of that launch cost.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from optimum_modegpt.errors import EvaluationError
from optimum_modegpt.evaluation.fidelity import check_vocabularies
from optimum_modegpt.evaluation.perplexity import context_of, evaluating
from optimum_modegpt.kv_cache import cache_argument, cache_bytes, cache_of
from optimum_modegpt.progress import bar
from optimum_modegpt.quantities import dtype_name
from optimum_modegpt.stages import StageClock

SEED = 0
"""Seed of the token ids."""


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of repeated measurements."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        """Compute the spread of at least one value."""
        found = list(values)
        return Spread(statistics.median(found), min(found), max(found))


@dataclass(frozen=True)
class Speed:
    """Speed and memory of one model at one setting."""

    first_token_seconds: Spread
    """Seconds from the call to the first new token on the host."""
    prefill_tokens_per_second: Spread
    """Prompt tokens of the whole batch divided by the time to the first token."""
    decode_tokens_per_second: Spread
    """New tokens of the whole batch after the first one, with one token per step and the key-value cache."""
    cache_bytes_per_token: float | None
    """Bytes of keys and values in all blocks. None for a model without a key-value cache."""
    peak_memory: int
    """Bytes of the weights plus the largest rise of memory during a run. See `memory_kind`."""


@dataclass(frozen=True)
class Setting:
    """Batch size, prompt length and compilation of one row."""

    batch_size: int
    prompt_length: int
    compiled: bool = False


@dataclass(frozen=True)
class Row:
    """Results of both models at one setting. Ratios are of single repeats, and above 1 if the model is faster."""

    setting: Setting
    model: Speed | None
    """None if the model did not fit into memory."""
    reference: Speed | None = None
    prefill_ratio: Spread | None = None
    decode_ratio: Spread | None = None
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Size:
    """Number and size of a model's weights in the dtype in which it ran. Tied ones count once."""

    parameters: int
    weight_bytes: int
    """Bytes in memory."""
    disk_bytes: int | None = None
    """Bytes of the safetensors files that the model was loaded from. None if unknown."""


@dataclass(frozen=True)
class Benchmark:
    """Results at all settings, and the conditions of the measurement."""

    rows: tuple[Row, ...]
    model: Size
    reference: Size | None
    new_tokens: int
    repeats: int
    machine: dict[str, Any]
    memory_kind: str
    """Kind of memory in `Speed.peak_memory`: "device memory" or, on a CPU, the "sampled resident size" of the process
    that both models share."""
    notes: tuple[str, ...] = ()
    """Deviations from the requested settings."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, safe for JSON."""
        return asdict(self)


def benchmark(
    model: PreTrainedModel,
    reference: PreTrainedModel | None = None,
    *,
    batch_sizes: Sequence[int] = (1, 8),
    prompt_lengths: Sequence[int] = (128, 1024),
    new_tokens: int = 32,
    repeats: int = 5,
    compile: bool = False,
    progress: bool = False,
) -> Benchmark:
    """Measure the speed at every batch size and prompt length on random token ids.

    Each setting runs twice before it is timed: once as a warm-up, and once to measure memory. In each repeat, the two
    models take turns, and the order alternates, so that a slowdown of the machine affects both. If a setting does not
    fit into memory, its row reports this.

    Args:
        model: the model, on the device to run it on.
        reference: the model to compare with, on the same device.
        batch_sizes: numbers of sequences per batch.
        prompt_lengths: numbers of tokens per prompt. Prompts are truncated to fit the context with the new tokens.
        new_tokens: decoding steps after the first token.
        repeats: measurements of each setting.
        compile: whether to also measure all settings under `torch.compile`, with a static cache. This resets earlier
            compilations of this process.
        progress: whether to show a progress bar.

    Raises:
        EvaluationError: a number is below 1, the context is too short for the new tokens, or the two models predict
            different tokens.
    """
    models = {"model": model}
    if reference is not None:
        check_vocabularies(model, reference)
        models["reference"] = reference
    smallest = min(*batch_sizes, *prompt_lengths, new_tokens, repeats)
    if smallest < 1:
        raise EvaluationError(f"a batch size, length or number of runs is {smallest}; expected at least 1.")
    lengths, notes = _within_context(models.values(), prompt_lengths, new_tokens)
    settings = []
    for compiled in [False, True] if compile else [False]:
        for batch_size in dict.fromkeys(batch_sizes):
            for length in lengths:
                settings.append(Setting(batch_size, length, compiled))
    generator = torch.Generator().manual_seed(SEED)
    total = len(settings) * repeats
    with evaluating(*models.values()), bar(desc="benchmark", unit="run", total=total, shown=progress) as shown:
        rows = tuple(_row(models, setting, generator, new_tokens, repeats, shown) for setting in settings)
    return Benchmark(
        rows=rows,
        model=_size(model),
        reference=None if reference is None else _size(reference),
        new_tokens=new_tokens,
        repeats=repeats,
        machine=_machine(model),
        memory_kind=StageClock(model.device).memory_kind,
        notes=notes,
    )


def _within_context(
    models: Iterable[PreTrainedModel], lengths: Sequence[int], new_tokens: int
) -> tuple[list[int], tuple[str, ...]]:
    """Return the distinct lengths, truncated to the contexts of all models, and a note on each truncated one."""
    room = max(lengths)
    for model in models:
        context = context_of(model.config)
        if context is not None:
            room = min(room, context - new_tokens)
    context = room + new_tokens
    if room < 1:
        raise EvaluationError(f"a context of {context} tokens is too short for a prompt and {new_tokens} new tokens.")
    because = f"to {room}: the context is {context}, with {new_tokens} new tokens"
    distinct, notes = {}, []
    for length in lengths:
        distinct[min(length, room)] = None
        if length > room:
            notes.append(f"prompts of {length} tokens were truncated {because}")
    return list(distinct), tuple(notes)


def _row(
    models: Mapping[str, PreTrainedModel],
    setting: Setting,
    generator: torch.Generator,
    new_tokens: int,
    repeats: int,
    shown: Any,
) -> Row:
    model = models["model"]
    shape = (setting.batch_size, setting.prompt_length)
    ids = torch.randint(model.config.get_text_config().vocab_size, shape, generator=generator).to(model.device)
    runners = {name: _Runner(each, ids, setting.compiled, new_tokens) for name, each in models.items()}
    failures = []
    for repeat in range(-2, repeats):  # the first is a warm-up, the second measures memory
        order = list(runners) if repeat % 2 else list(reversed(runners))
        for name in order:
            if not runners[name].measure(repeat):
                del runners[name]
                failures.append(f"{name}: out of memory")
        shown.update(repeat >= 0)
    speeds = {name: runner.speed() for name, runner in runners.items()}
    row = Row(setting, speeds.get("model"), speeds.get("reference"), failures=tuple(failures))
    if len(runners) < 2:
        return row
    ours, theirs = runners["model"], runners["reference"]
    return replace(
        row,
        prefill_ratio=_ratio(ours.first_seconds, theirs.first_seconds),
        decode_ratio=_ratio(ours.decode_seconds, theirs.decode_seconds),
    )


class _Runner:
    """Measures one model on one batch of prompts (batch, length)."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, compiled: bool, new_tokens: int) -> None:
        self.model, self.ids, self.compiled, self.new_tokens = model, ids, compiled, new_tokens
        self.forward: Callable[..., Any] = model
        if compiled:
            torch.compiler.reset()  # otherwise the changed shapes of the next setting would be compiled as dynamic
            self.forward = torch.compile(model)
        self.first_seconds: list[float] = []
        self.decode_seconds: list[float] = []
        self.cache_bytes: float | None = None
        self.peak_memory = 0

    def measure(self, repeat: int) -> bool:
        """Measure memory in repeat −1, and time from repeat 0 on. Return False if memory does not suffice."""
        try:
            if repeat == -1:
                clock = StageClock(self.model.device)
                before = clock.in_use()
                with clock.stage("run"):
                    self._run()
                self.peak_memory = _size(self.model).weight_bytes + clock.stages[-1].peak_memory - before
            else:
                first, decode = self._run()
                if repeat >= 0:
                    self.first_seconds.append(first)
                    self.decode_seconds.append(decode)
        except RuntimeError as error:
            # The allocator of the host has no exception class of its own.
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                return False
            raise
        return True

    def _run(self) -> tuple[float, float]:
        """Return the seconds of the prefill and of all steps after the first token."""
        name, token, cache = cache_argument(self.model), self.ids, None
        if self.compiled:
            cache = StaticCache(self.model.config, max_cache_len=self.ids.shape[1] + self.new_tokens)
        start = first = time.perf_counter()
        for step in range(1 + self.new_tokens):
            output = self.forward(input_ids=token, **{name: cache}, use_cache=True, logits_to_keep=1)
            token, cache = output.logits[:, -1:].argmax(-1), cache_of(output)  # (batch, 1)
            if step == 0:
                token.cpu()  # waits for the device
                first = time.perf_counter()
        token.cpu()
        end = time.perf_counter()
        self.cache_bytes = cache_bytes(cache)
        return first - start, end - first

    def speed(self) -> Speed:
        """Return the results of all repeats."""
        batch, length = self.ids.shape
        return Speed(
            first_token_seconds=Spread.of(self.first_seconds),
            prefill_tokens_per_second=Spread.of(batch * length / seconds for seconds in self.first_seconds),
            decode_tokens_per_second=Spread.of(batch * self.new_tokens / seconds for seconds in self.decode_seconds),
            cache_bytes_per_token=None if self.cache_bytes is None else self.cache_bytes / batch,
            peak_memory=self.peak_memory,
        )


def _ratio(seconds: list[float], reference: list[float]) -> Spread:
    """Return how many times as fast as the reference a model was in each repeat."""
    return Spread.of(theirs / ours for ours, theirs in zip(seconds, reference, strict=True))


def _size(model: PreTrainedModel) -> Size:
    return Size(model.num_parameters(), model.get_memory_footprint())


def _machine(model: PreTrainedModel) -> dict[str, Any]:
    backend = getattr(torch, model.device.type)
    name = platform.processor() or platform.machine()
    if hasattr(backend, "get_device_name"):
        name = backend.get_device_name(model.device)
    return {
        "device": str(model.device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "dtype": dtype_name(model.dtype),
        "attention": model.config._attn_implementation,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
