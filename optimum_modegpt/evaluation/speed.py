"""Measure the speed of prefill and decoding of a model and a reference, which take turns in one run.

Limits of the speedup: a compressed block launches as many kernels as a dense one, and a few more to select the kept
rotary pairs. If launching kernels takes longer than their work, because the model or batch is small or the device is
fast, then compression saves only memory. `torch.compile` removes most of that launch cost. Embeddings and the language
model's head keep their size, so their time does not change. The attention over a long context shrinks only with the
head widths.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from optimum_modegpt.errors import EvaluationError
from optimum_modegpt.evaluation.fidelity import check_vocabularies
from optimum_modegpt.evaluation.perplexity import evaluating
from optimum_modegpt.kv_cache import cache_argument, cache_bytes, cache_of
from optimum_modegpt.progress import bar
from optimum_modegpt.stages import StageClock

SEED = 0
"""Seed of the token ids."""

Measured = TypeVar("Measured")


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
    notes: tuple[str, ...] = field(default=())
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
        EvaluationError: a number is below 1, the context is too short for the new tokens, or the two models are on
            different devices or predict different tokens.
    """
    models = {"model": model} | ({} if reference is None else {"reference": reference})
    _check(list(models.values()), (*batch_sizes, *prompt_lengths, new_tokens, repeats))
    lengths, notes = _within_context(models.values(), prompt_lengths, new_tokens)
    settings = [
        Setting(size, length, compiled)
        for compiled in ((False, True) if compile else (False,))
        for size in dict.fromkeys(batch_sizes)
        for length in lengths
    ]
    generator = torch.Generator().manual_seed(SEED)
    total = len(settings) * repeats
    with evaluating(*models.values()), bar(desc="benchmark", unit="run", total=total, shown=progress) as shown:
        rows = tuple(_row(models, one, generator, new_tokens, repeats, shown) for one in settings)
    sizes = {name: _size(each) for name, each in models.items()}
    kind = StageClock(model.device).memory_kind
    return Benchmark(rows, sizes["model"], sizes.get("reference"), new_tokens, repeats, _machine(model), kind, notes)


def _check(models: list[PreTrainedModel], numbers: tuple[int, ...]) -> None:
    if min(numbers) < 1:
        raise EvaluationError(f"a batch size, length or number of runs is {min(numbers)}; expected at least 1.")
    check_vocabularies(models[0], models[-1])
    if models[0].device != models[-1].device:
        raise EvaluationError(
            f"the model is on {models[0].device}, the reference on {models[-1].device}; put both on one device."
        )


def _within_context(
    models: Iterable[PreTrainedModel], lengths: Sequence[int], new_tokens: int
) -> tuple[list[int], tuple[str, ...]]:
    """Return the distinct lengths, truncated to both contexts, and a note on each truncated one."""
    limits = [getattr(each.config.get_text_config(), "max_position_embeddings", None) for each in models]
    context = min((limit for limit in limits if limit is not None), default=None)
    if context is None:
        return list(dict.fromkeys(lengths)), ()
    if context <= new_tokens:
        raise EvaluationError(f"a context of {context} tokens is too short for a prompt and {new_tokens} new tokens.")
    room = context - new_tokens
    notes = tuple(
        f"prompts of {length} tokens were truncated to {room}: the context is {context}, with {new_tokens} new tokens"
        for length in lengths
        if length > room
    )
    return list(dict.fromkeys(min(length, room) for length in lengths)), notes


# ---------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class _Run:
    """Measurements of one prefill and its decoding steps."""

    first_token: float
    """Seconds to the first token."""
    decode: float
    """Seconds of all steps after the first token."""
    cache_bytes: float | None
    """Bytes of the cache for one token of one sequence."""


def _row(
    models: dict[str, PreTrainedModel],
    setting: Setting,
    generator: torch.Generator,
    new_tokens: int,
    repeats: int,
    shown: Any,
) -> Row:
    first = models["model"]
    shape = (setting.batch_size, setting.prompt_length)
    vocabulary = first.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, shape, generator=generator).to(first.device)
    forwards = {name: _forward(model, setting) for name, model in models.items()}
    runs: dict[str, list[_Run]] = {name: [] for name in models}
    peaks: dict[str, int] = {}
    failures: dict[str, str] = {}
    for repeat in range(-2, repeats):  # the first is a warm-up, the second measures memory
        for name in [*models] if repeat % 2 else [*models][::-1]:
            if name in failures:
                continue
            run = partial(_run, models[name], forwards[name], ids, setting, new_tokens)
            found = _fitting(run if repeat != -1 else partial(_peak, models[name], run))
            if found is None:
                failures[name] = f"{name}: out of memory"
            elif isinstance(found, int):
                peaks[name] = found
            elif repeat >= 0:
                runs[name].append(found)
        shown.update(repeat >= 0)
    speeds = {name: _speed(runs[name], peaks[name], setting, new_tokens) for name in models if name not in failures}
    ratios = _ratios(runs["model"], runs["reference"]) if len(speeds) == 2 else (None, None)
    return Row(setting, speeds.get("model"), speeds.get("reference"), *ratios, tuple(failures.values()))


def _forward(model: PreTrainedModel, setting: Setting) -> Callable[..., Any]:
    if not setting.compiled:
        return model
    torch.compiler.reset()  # otherwise the changed shapes of the next setting would be compiled as dynamic
    return torch.compile(model)


def _fitting(measure: Callable[[], Measured]) -> Measured | None:
    """Return the result of `measure`, or None if it runs out of memory on an accelerator or on the host."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:
        if "can't allocate memory" in str(
            error
        ):  # the message of the host allocator, which has no exception class of its own
            return None
        raise


def _peak(model: PreTrainedModel, run: Callable[[], _Run]) -> int:
    """Return the bytes of the weights plus the rise of memory during `run`."""
    clock = StageClock(model.device)
    before = clock.in_use()
    with clock.stage("run"):
        run()
    return _size(model).weight_bytes + clock.stages[-1].peak_memory - before


def _run(model: PreTrainedModel, forward: Callable[..., Any], ids: Tensor, setting: Setting, new_tokens: int) -> _Run:
    cache = StaticCache(model.config, max_cache_len=ids.shape[1] + new_tokens) if setting.compiled else None
    start = time.perf_counter()
    name = cache_argument(model)
    output = forward(input_ids=ids, **{name: cache}, use_cache=True, logits_to_keep=1)
    token = _likeliest(output)
    token.cpu()  # waits for the device
    first = time.perf_counter()
    for _ in range(new_tokens):
        output = forward(input_ids=token, **{name: cache_of(output)}, use_cache=True, logits_to_keep=1)
        token = _likeliest(output)
    token.cpu()
    end = time.perf_counter()
    taken = cache_bytes(cache_of(output))
    return _Run(first - start, end - first, None if taken is None else taken / len(ids))


def _likeliest(output: Any) -> Tensor:
    """Return the most likely next tokens, (batch, 1)."""
    return output.logits[:, -1:].argmax(-1)


# ------------------------------------------------------------------------------------------------------------ results


def _speed(runs: list[_Run], peak: int, setting: Setting, new_tokens: int) -> Speed:
    return Speed(
        first_token_seconds=Spread.of(run.first_token for run in runs),
        prefill_tokens_per_second=Spread.of(
            setting.batch_size * setting.prompt_length / run.first_token for run in runs
        ),
        decode_tokens_per_second=Spread.of(setting.batch_size * new_tokens / run.decode for run in runs),
        cache_bytes_per_token=runs[-1].cache_bytes,
        peak_memory=peak,
    )


def _ratios(ours: list[_Run], theirs: list[_Run]) -> tuple[Spread, Spread]:
    pairs = list(zip(ours, theirs, strict=True))
    return (
        Spread.of(other.first_token / one.first_token for one, other in pairs),
        Spread.of(other.decode / one.decode for one, other in pairs),
    )


def _size(model: PreTrainedModel) -> Size:
    tensors = [*model.parameters(), *model.buffers()]
    return Size(model.num_parameters(), sum(one.numel() * one.element_size() for one in tensors))


def _machine(model: PreTrainedModel) -> dict[str, Any]:
    backend = getattr(torch, model.device.type)
    return {
        "device": str(model.device),
        "device_name": backend.get_device_name(model.device)
        if hasattr(backend, "get_device_name")
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
