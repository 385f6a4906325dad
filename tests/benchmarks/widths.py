"""Measure the cost of widths on this machine: MLPs with multiples of 1 to 128, and attention of several head dims.

python tests/benchmarks/widths.py --json widths.json

Each width takes turns with the dense one. Its cost is the time per operation relative to the dense width: 1.10 means
10 % more time than the number of operations suggests. All values are medians of the repeats. With one thread on a CPU,
the CPU time of the thread is measured, which other load on the machine affects little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import machine
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from optimum_modegpt.stages import compute_device

D_MODEL, MLP, KEPT = 1024, 2816, 0.7
STEPS = (1, 8, 16, 32, 64, 128)
HEADS, KV_HEADS, HEAD_DIM = 16, 4, 64
HEAD_DIMS = (40, 44, 48, 52, 56, 60, 62)
PROMPT, CACHED = 256, 1024
"""Tokens of the prompt, and tokens in the cache of a decoding step."""
SHORTEST = 0.005
"""Minimum seconds of one measurement. Shorter work is repeated."""
Works = dict[int, Callable[[], Any]]
"""The function to measure at each width, the dense width first."""


def main() -> None:
    options = parse()
    device = compute_device(None if options.device == "auto" else options.device, torch.device("cpu"))
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    tables: dict[str, dict[str, Any]] = {}
    for dtype in options.dtypes:
        place = {"device": device, "dtype": getattr(torch, dtype)}
        for part, tasks in (("MLP", mlp(options.scale, place)), ("attention", attention(place))):
            name = f"{part}, {dtype}"
            tables[name] = {task: measure(works, clock, options.repeats) for task, works in tasks.items()}
            print(f"{table(name, tables[name])}\n", flush=True)
    if options.json is not None:
        shapes = {"d_model": D_MODEL * options.scale, "heads": HEADS, "kv_heads": KV_HEADS}
        shapes |= {"prompt": PROMPT, "cached": CACHED, "repeats": options.repeats}
        record = {"machine": machine(options.device), "shapes": shapes, "tables": tables}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], help="dtypes of weights and activations"
    )
    parser.add_argument("--device", default="auto", help="where to compute")
    parser.add_argument(
        "--scale", type=int, default=1, help="factor of d_model and MLP width; 4 gives the widths of 7B"
    )
    parser.add_argument("--repeats", type=int, default=25, help="measurements of each width")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    return parser.parse_args()


# -------------------------------------------------------------------------------------------------------------- work


def mlp(scale: int, place: dict[str, Any]) -> dict[str, Works]:
    """Return the measurements of an up and a down projection, for one token and for a prompt."""
    d_model, dense = D_MODEL * scale, MLP * scale
    widths = [dense, *(multiple(KEPT * dense, step) for step in STEPS)]
    ups = {width: torch.randn(width, d_model, **place) for width in widths}
    downs = {width: torch.randn(d_model, width, **place) for width in widths}

    def run(x: Tensor, width: int) -> Tensor:
        return linear(linear(x, ups[width]), downs[width])

    token, prompt = torch.randn(1, d_model, **place), torch.randn(PROMPT, d_model, **place)
    return {
        "decode": {width: partial(run, token, width) for width in widths},
        "prefill": {width: partial(run, prompt, width) for width in widths},
    }


def multiple(width: float, step: int) -> int:
    """Return an odd multiple of `step` near `width`, which is not a multiple of a larger step."""
    return int(width // (2 * step)) * 2 * step + step


def attention(place: dict[str, Any]) -> dict[str, Works]:
    """Return the measurements of grouped-query attention, for one token with a cache and for a prompt."""

    def decode(dim: int) -> Callable[[], Tensor]:
        rows, *cache = (torch.randn(1, KV_HEADS, n, dim, **place) for n in (HEADS // KV_HEADS, CACHED, CACHED))
        return partial(scaled_dot_product_attention, rows, *cache)

    def prefill(dim: int) -> Callable[[], Tensor]:
        heads = [torch.randn(1, PROMPT, n, dim, **place).transpose(1, 2) for n in (HEADS, KV_HEADS, KV_HEADS)]
        return partial(scaled_dot_product_attention, *heads, is_causal=True, enable_gqa=True)

    dims = (HEAD_DIM, *HEAD_DIMS)
    return {"decode": {dim: decode(dim) for dim in dims}, "prefill": {dim: prefill(dim) for dim in dims}}


# --------------------------------------------------------------------------------------------------------- measuring


def measure(works: Works, clock: Callable[[], float], repeats: int) -> dict[int, dict[str, float]]:
    """Return the median microseconds and the cost of each width."""
    dense, first = next(iter(works.items()))
    seconds(first, clock, 1)  # warms up
    calls = max(1, round(SHORTEST / seconds(first, clock, 1)))
    found: dict[int, list[float]] = {width: [] for width in works}
    for _ in range(repeats):
        for width, work in works.items():
            found[width].append(seconds(work, clock, calls))
    results = {}
    for width, times in found.items():
        relative = statistics.median(a / b for a, b in zip(times, found[dense], strict=True))
        results[width] = {
            "microseconds": round(statistics.median(times) * 1e6, 1),
            "cost": round(relative * dense / width, 3),
        }
    return results


def seconds(work: Callable[[], Any], clock: Callable[[], float], calls: int) -> float:
    """Return the seconds of one call, including its work on the device."""
    start = clock()
    for _ in range(calls):
        result = work()
    result.flatten()[0].item()  # waits for the device
    return (clock() - start) / calls


def table(name: str, tasks: dict[str, dict[int, dict[str, float]]]) -> str:
    """Format a table with one row per width: microseconds and cost of each task."""
    lines = [name, f"{'width':>12}" + "".join(f"{f'{task}, µs':>15}{'cost':>7}" for task in tasks)]
    for width in next(iter(tasks.values())):
        cells = [found[width] for found in tasks.values()]
        lines.append(f"{width:>12,}" + "".join(f"{one['microseconds']:>15,.0f}{one['cost']:>7.2f}" for one in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
