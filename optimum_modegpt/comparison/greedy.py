"""One greedy continuation: what a model writes, how fast, and what memory it takes for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from optimum_modegpt.kv_cache import cache_bytes, cache_of
from optimum_modegpt.stages import StageClock


@dataclass(frozen=True)
class Continuation:
    """New tokens (tokens,) on the CPU, and the cost of writing them at batch size 1."""

    tokens: Tensor
    first_token_seconds: float
    """From the call to the first token: the prefill and what `generate` prepares."""
    seconds_per_token: float | None
    """Mean over the tokens after the first; None where there is only one."""
    cache_bytes_per_token: float | None
    """Of keys and values in all blocks; None for a model without such a cache."""
    working_bytes: int | None
    """How far device memory rose above what stood there before; None where the allocator does not tell, as on a CPU."""


class _Ticks(BaseStreamer):
    """Notes when `generate` hands over the prompt, and then each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def continuation(model: PreTrainedModel, ids: Tensor, max_new_tokens: int, stops: dict[str, Any]) -> Continuation:
    """What `model` writes after `ids` (tokens,), the likeliest token each time.

    `stops` are the token ids that end or pad a text: eos_token_id and pad_token_id.
    """
    batch = ids[None].to(model.device)
    ticks, clock = _Ticks(), StageClock(model.device)
    before = clock.allocator.memory_allocated(model.device) if clock.allocator else 0
    with clock.stage("generate") if clock.allocator else nullcontext():
        start = time.perf_counter()
        with _greedy(model, stops):
            output: Any = model.generate(  # pyright: ignore[reportCallIssue]
                batch, attention_mask=batch.new_ones(batch.shape), max_new_tokens=max_new_tokens, streamer=ticks
            )
    _, first, *_ = ticks.times
    tokens = output.sequences[0, len(ids) :].cpu()
    return Continuation(
        tokens=tokens,
        first_token_seconds=first - start,
        seconds_per_token=(ticks.times[-1] - first) / (len(tokens) - 1) if len(tokens) > 1 else None,
        cache_bytes_per_token=cache_bytes(cache_of(output)),
        working_bytes=clock.stages[-1].peak_memory - before if clock.stages else None,
    )


@contextmanager
def _greedy(model: PreTrainedModel, stops: dict[str, Any]) -> Iterator[None]:
    """Inside, the model's own generation config asks for nothing but the likeliest token.

    It is put aside whole: `generate` takes from it whatever a call leaves out, and two models may differ in it.
    """
    own: Any = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, use_cache=True, return_dict_in_generate=True, bos_token_id=own.bos_token_id, **stops
    )
    try:
        yield
    finally:
        model.generation_config = own


def stops_of(model: PreTrainedModel) -> dict[str, Any]:
    """What ends a text of this model, for `continuation`; a pad token is named even where none is needed."""
    config: Any = model.generation_config
    ends = config.eos_token_id
    first = ends[0] if isinstance(ends, list) else ends
    return {"eos_token_id": ends, "pad_token_id": first if config.pad_token_id is None else config.pad_token_id}
