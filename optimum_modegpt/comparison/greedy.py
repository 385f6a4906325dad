"""Generate one greedy continuation, and measure its latency and memory."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from optimum_modegpt.kv_cache import cache_bytes, cache_of
from optimum_modegpt.stages import StageClock


@dataclass(frozen=True)
class Continuation:
    """New tokens (tokens,) on the CPU, and the cost of generating them at batch size 1."""

    tokens: Tensor
    first_token_seconds: float
    """Seconds from the call to the first token: the setup of `generate` and the prefill."""
    seconds_per_token: float | None
    """Mean over the tokens after the first. None if there is only one token."""
    cache_bytes_per_token: float | None
    """Bytes of keys and values in all blocks. None for a model without a key-value cache."""
    working_bytes: int | None
    """Peak device memory minus the memory in use before. None if the allocator does not report it, as on a CPU."""


class _Ticks(BaseStreamer):
    """Records the times at which `generate` passes on the prompt and each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def continuation(model: PreTrainedModel, ids: Tensor, max_new_tokens: int, end_tokens: Any) -> Continuation:
    """Generate a greedy continuation of `ids` (tokens,) until one of the end tokens."""
    batch = ids[None].to(model.device)
    ticks, clock = _Ticks(), StageClock(model.device)
    measured, before = nullcontext(), 0
    if clock.allocator:
        measured, before = clock.stage("generate"), clock.in_use()
    # `generate` takes every setting that a call omits from the model's own config, so that one is replaced.
    own = model.generation_config
    model.generation_config = GenerationConfig(return_dict_in_generate=True, eos_token_id=end_tokens, pad_token_id=0)
    try:
        with measured:
            start = time.perf_counter()
            output: Any = model.generate(  # pyright: ignore[reportCallIssue]
                batch, attention_mask=batch.new_ones(batch.shape), max_new_tokens=max_new_tokens, streamer=ticks
            )
    finally:
        model.generation_config = own
    _, first, *_ = ticks.times
    tokens = output.sequences[0, len(ids) :].cpu()
    return Continuation(
        tokens=tokens,
        first_token_seconds=first - start,
        seconds_per_token=(ticks.times[-1] - first) / (len(tokens) - 1) if len(tokens) > 1 else None,
        cache_bytes_per_token=cache_bytes(cache_of(output)),
        working_bytes=clock.stages[-1].peak_memory - before if clock.stages else None,
    )
