"""What was done: `Report`, the record of one compression, as dataclasses and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimum_modegpt.errors import EvaluationError

PARTS = ("mlp", "qk", "vo")
"""The three pairs of matrices of a decoder block, in the order of the paper (types I, II, III)."""

REPORT_VERSION = 1


@dataclass(frozen=True)
class PartReport:
    """One part of one block: kept width, dense width, fraction of its weights removed, relative error of its fit."""

    rank: int
    dense_rank: int
    sparsity: float
    relative_error: float | None = None
    """‖target − fit‖ / ‖target‖ over the calibration tokens, target the part's output; for qk the estimated relative
    error of the attention logits; None where nothing was fitted."""


@dataclass(frozen=True)
class BlockReport:
    """One decoder block, by part."""

    index: int
    parts: dict[str, PartReport]


@dataclass(frozen=True)
class Stage:
    """One stage of the walk: wall-clock seconds and the peak memory in bytes while it ran."""

    name: str
    seconds: float
    peak_memory: int
    floor: dict[str, float] = field(default_factory=dict)
    """By step, the seconds that its matrix products alone take at the rate of the device; empty where there are none
    worth counting."""


@dataclass(frozen=True)
class Parameters:
    """Number of parameters: of the cut projections' weights, and of the whole model (tied ones once, no buffers)."""

    blocks_before: int
    blocks_after: int
    total_before: int
    total_after: int


def count_parameters(model: Any) -> int:
    """Parameters of a torch module: tied ones once, no buffers."""
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Report:
    """The record of one compression."""

    base_model: str | None
    revision: str | None
    config: dict[str, Any]
    requested_sparsity: float
    achieved_sparsity: float
    parameters: Parameters
    blocks: tuple[BlockReport, ...]
    calibration: dict[str, Any]
    """name, split, revision, sha256 of the token ids, windows, sequence_length."""
    stages: tuple[Stage, ...]
    memory_kind: str
    """What `Stage.peak_memory` is: "device memory" or "sampled resident size"."""
    device: str
    batch_size: int | None = None
    """Windows per forward pass: as many as at first, or as were left where memory did not suffice."""
    streams: str | None = None
    """Where the residual streams were kept: on the "device", in "host" memory or in "files"."""
    processes: int = 1
    """How many compressed it together, each on its share of the calibration; stages and device are the first one's."""
    sensitivities: dict[str, list[list[float]]] = field(default_factory=dict)
    """"block.part" -> measured [sparsity, KL divergence in nats per token]; empty unless the allocation measured it."""
    sensitivity_budget: dict[str, Any] = field(default_factory=dict)
    """Windows for moments and for divergences, and the ratios, that the sensitivities were measured with."""
    influences: list[float] = field(default_factory=list)
    """Block influence 1 − E cos(input, output) of every block; empty unless the allocation used it."""
    self_check: dict[str, Any] = field(default_factory=dict)
    """Tokens, difference, tolerance and seconds of the finished model's check; see `walk.self_check.SelfCheck`."""
    warnings: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    weight_bytes: int | None = None
    """Size of the safetensors files; None until the model is saved."""
    weights_sha256: str | None = None
    """Digest of the weights when they were first saved; other weights were changed since."""
    report_version: int = REPORT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-safe dicts and lists."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`."""
        blocks = tuple(
            BlockReport(b["index"], {part: PartReport(**values) for part, values in b["parts"].items()})
            for b in data["blocks"]
        )
        return cls(
            **{
                **data,
                "parameters": Parameters(**data["parameters"]),
                "blocks": blocks,
                "stages": tuple(Stage(**stage) for stage in data["stages"]),
                "warnings": tuple(data["warnings"]),
            }
        )

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Reads a report written by `save`.

        Raises:
            EvaluationError: a newer version wrote it, or it is no report.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            version = data["report_version"]
            if version <= REPORT_VERSION:
                return cls.from_dict(data)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise EvaluationError(
                f"{path} is no report of a compression: {type(error).__name__} {error}. Compress or download it again."
            ) from error
        raise EvaluationError(
            f"{path} says report_version {version}; this code reads up to {REPORT_VERSION}. Update optimum-modegpt."
        )

    def summary(self) -> str:
        """A short table: ranks and errors per block, what was removed, time and memory."""
        together = f", {self.processes} processes" if self.processes > 1 else ""
        rows = [f"{'block':>5}" + "".join(f"{part:>22}" for part in PARTS)]
        for block in self.blocks:
            rows.append(f"{block.index:>5}" + "".join(f"{_cell(block.parts[part]):>22}" for part in PARTS))
        p = self.parameters
        seconds = sum(stage.seconds for stage in self.stages)
        floor = sum(sum(stage.floor.values()) for stage in self.stages)
        paced = f" ({seconds / floor:.1f} times its matrix products at this device's rate)" if floor else ""
        peak = max((stage.peak_memory for stage in self.stages), default=0)
        rows += [
            f"removed {self.achieved_sparsity:.2%} of the block projections (asked for {self.requested_sparsity:.2%}): "
            f"{p.blocks_before:,} -> {p.blocks_after:,} weights",
            f"all parameters {p.total_before:,} -> {p.total_after:,} ({1 - p.total_after / p.total_before:.2%} fewer)",
            f"{seconds:.1f} s{paced}, peak {self.memory_kind} {peak / 2**20:,.0f} MiB on {self.device}{together}",
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join(rows)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draws kept widths per block and part; see `optimum_modegpt.plot.plot_ranks`."""
        from optimum_modegpt.plot import plot_ranks

        return plot_ranks(self, path)


def _cell(part: PartReport) -> str:
    error = "" if part.relative_error is None else f" err {part.relative_error:.3f}"
    return f"{part.rank}/{part.dense_rank}{error}"
