"""Format a comparison as rows for the command line and the page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from optimum_modegpt.comparison.records import Comparison


@dataclass(frozen=True)
class Row:
    """One formatted measure of both models. `ratio` is the model's value divided by the reference's."""

    name: str
    model: str
    reference: str
    ratio: str


def distances(found: Comparison) -> dict[str, str]:
    """Return a mapping measure -> formatted difference between the model and the reference."""
    prompts = len(found.records)
    parts = {"  in prompts": found.kl_of_prompts, "  in continuations": found.kl_of_continuations}
    return {
        "KL divergence": f"{found.kl:.4f} nats per position, {found.kl_max:.3f} at the worst",
        **{name: f"{kl:.4f}" for name, kl in parts.items() if kl is not None},
        "top-1 agreement": f"{found.top1_agreement:.2%} of positions",
        "top-5 overlap": f"{found.top5_overlap:.2%} of the reference's five most likely tokens",
        "same continuation": f"{found.equal_continuations} of {prompts} prompt{'s' if prompts > 1 else ''}",
    }


def rows(found: Comparison) -> list[Row]:
    """Return the rows of all measures that are available for both models."""
    return [
        Row(name, form(ours), form(theirs), f"{ours / theirs:.3f}" if theirs else "")
        for name, ours, theirs, form in _measures(found)
        if ours is not None and theirs is not None
    ]


def table(found: Comparison) -> str:
    """Format the whole comparison as text."""
    lines = [f"{'':<28}{'model':>14}{'reference':>14}{'ratio':>9}"]
    lines += [f"{row.name:<28}{row.model:>14}{row.reference:>14}{row.ratio:>9}" for row in rows(found)]
    lines += [f"{name:<28}{text}" for name, text in distances(found).items()]
    return "\n".join([*lines, f"{'compared on':<28}{extent(found)}"])


def extent(found: Comparison) -> str:
    """Describe the amount of text, the devices and the dtypes of the comparison."""
    devices = {found.setting[f"{name}_device"] for name in ("model", "reference")}
    dtypes = {found.setting[f"{name}_dtype"] for name in ("model", "reference")}
    prompts = len(found.records)
    return (
        f"{prompts:,} prompt{'s' if prompts > 1 else ''}, {found.positions:,} positions; "
        f"{' and '.join(sorted(devices))}, {' and '.join(sorted(dtypes))}, batch size 1"
    )


def size(number: float) -> str:
    """Format a number of bytes in a suitable unit."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:,.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:,.2f} GiB"


def milliseconds(seconds: float) -> str:
    """Format a time in seconds as milliseconds."""
    return f"{1000 * seconds:,.2f} ms"


def _measures(found: Comparison) -> Iterator[tuple[str, Any, Any, Any]]:
    ours, theirs = found.costs, found.reference_costs
    yield "perplexity of the prompts", found.perplexity, found.reference_perplexity, "{:.4f}".format
    yield "parameters", ours.parameters, theirs.parameters, "{:,}".format
    for name, key in (
        ("weights", "weight_bytes"),
        ("KV cache per token", "cache_bytes_per_token"),
        ("peak device memory", "peak_device_bytes"),
    ):
        yield name, getattr(ours, key), getattr(theirs, key), size
    for name, first, second in (
        ("time to first token", ours.first_token, theirs.first_token),
        ("time per further token", ours.per_token, theirs.per_token),
    ):
        for key, words in (("median", ""), ("p95", ", p95")):
            yield name + words, getattr(first, key, None), getattr(second, key, None), milliseconds
