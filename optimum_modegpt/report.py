"""Define `Report`, the record of one compression, as dataclasses and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_modegpt.errors import EvaluationError
from optimum_modegpt.modeling.modegpt_family import Part, parts_among
from optimum_modegpt.plot import plot_kept
from optimum_modegpt.quantities import written_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT_VERSION = 1


@dataclass(frozen=True)
class PartReport:
    """Kept width, dense width, fraction of weights removed and relative error of the fit of one part of one block."""

    rank: int
    dense_rank: int
    sparsity: float
    relative_error: float | None = None
    """‖target − fit‖ / ‖target‖ over the calibration tokens, with the part's output as target. For qk, the estimated
    relative error of the attention logits. None if nothing was fitted."""


@dataclass(frozen=True)
class BlockReport:
    """The parts of one decoder block. A block without attention that compression cuts has only "mlp"."""

    index: int
    parts: dict[str, PartReport]


@dataclass(frozen=True)
class Stage:
    """Wall-clock seconds and peak memory in bytes of one stage of the compression."""

    name: str
    seconds: float
    peak_memory: int
    floor: dict[str, float] = field(default_factory=dict)
    """Step -> seconds that its matrix products alone take at the rate of the device. Empty if the products of the stage
    are negligible."""


@dataclass(frozen=True)
class Parameters:
    """Number of weights of the compressed projections, and of parameters of the whole model.

    Tied parameters count once. Buffers do not count.
    """

    blocks_before: int
    blocks_after: int
    total_before: int
    total_after: int


def uncut_sentences(reasons: Sequence[Mapping[Part, str]]) -> tuple[str, ...]:
    """Return a sentence for each reason that leaves parts at full width.

    `reasons` has one mapping part -> reason for each block.
    """
    found: dict[tuple[str, str], int] = {}
    for block in reasons:
        for reason in dict.fromkeys(block.values()):
            parts = " and ".join(part for part, own in block.items() if own == reason)
            found[parts, reason] = found.get((parts, reason), 0) + 1
    sentences = []
    for (parts, reason), count in found.items():
        verb = "stay" if " and " in parts else "stays"
        where = "" if count == len(reasons) else f" in {count} of {len(reasons)} blocks"
        sentences.append(f"{parts} {verb} at full width{where}: {reason}")
    return tuple(sentences)


def target_text(target: Mapping[str, Any]) -> str:
    """Return the requested and the reached size as text; `target` is that of a `Report` or of a record.

    Raises:
        KeyError, TypeError, ValueError: the record was edited, and has no target.
    """
    is_count = target["field"] == "target_parameters"
    reached = f"{target['reached']:,} parameters" if is_count else written_bytes(target["reached"])
    after = f" after quantization to {target['quantization']}" if target.get("quantization") else ""
    return f"{target['field']}={target['requested']}, reached {reached}{after}"


def count_parameters(model: Any) -> int:
    """Return the number of parameters of a torch module. Tied parameters count once, and buffers do not count."""
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
    """Name, split, revision, sha256 of the token ids, windows and sequence_length. Of a mixture also `sources`."""
    stages: tuple[Stage, ...]
    memory_kind: str
    """Kind of memory that `Stage.peak_memory` measures: "device memory" or "sampled resident size"."""
    device: str
    target: dict[str, Any] = field(default_factory=dict)
    """The requested size of the result: `field` of the configuration, `requested` value, `wanted` and `reached` bytes
    or parameters, and the later `quantization` that they count. Empty if a sparsity was requested."""
    compute_dtype: str | None = None
    """The dtype of all computations, which is not that of the model if the device is slow in 16 bits."""
    batch_size: int | None = None
    """Windows per forward pass, after any reduction due to out-of-memory errors."""
    streams: str | None = None
    """Storage of the residual streams: "device", "host" (memory) or "files"."""
    processes: int = 1
    """Number of processes, each of which used a shard of the calibration data. `stages` and `device` are of rank 0."""
    sensitivities: dict[str, list[list[float]]] = field(default_factory=dict)
    """"block.part" -> [sparsity, KL divergence in nats per token], through measured points. Empty unless the
    allocation uses it."""
    sensitivity_budget: dict[str, Any] = field(default_factory=dict)
    """Windows for moments, gradients and divergences, tokens of the last two, and blocks with measured divergences."""
    influences: list[float] = field(default_factory=list)
    """Block influence 1 − E cos(input, output) of every block. Empty unless the allocation used it."""
    uncut: tuple[str, ...] = ()
    """Sentences that name the parts that cannot be cut in this model, with the reason."""
    kept_experts: tuple[tuple[int, ...], ...] = ()
    """The experts that every block with experts kept. Empty if no whole experts were removed."""
    self_check: dict[str, Any] = field(default_factory=dict)
    """Tokens, difference, tolerance and seconds of the check of the finished model. See `walk.self_check.SelfCheck`."""
    warnings: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    commands: dict[str, list[str]] = field(default_factory=dict)
    """Command -> its arguments, except the output folder and the model to recover: `compress`, then `recover`. Local
    paths are shortened to their last part. Empty if an input was an object in memory, and in older reports."""
    weight_bytes: int | None = None
    """Size of the safetensors files in bytes. None until the model is saved."""
    weights_sha256: str | None = None
    """Digest of the weights when they were first saved. A different digest means that the weights were changed."""
    report_version: int = REPORT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-safe dicts and lists."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Create a report from the result of `to_dict`."""
        fields = dict(data)
        blocks = []
        for block in fields.pop("blocks"):
            parts = {part: PartReport(**values) for part, values in block["parts"].items()}
            blocks.append(BlockReport(block["index"], parts))
        return cls(
            parameters=Parameters(**fields.pop("parameters")),
            blocks=tuple(blocks),
            stages=tuple(Stage(**stage) for stage in fields.pop("stages")),
            warnings=tuple(fields.pop("warnings")),
            uncut=tuple(fields.pop("uncut", ())),
            kept_experts=tuple(map(tuple, fields.pop("kept_experts", ()))),
            **fields,
        )

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report written by `save`.

        Raises:
            EvaluationError: a newer version wrote the file, or the file is not a report.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            version = data["report_version"]
            if version <= REPORT_VERSION:
                return cls.from_dict(data)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise EvaluationError(
                f"{path} is not a compression report: {type(error).__name__} {error}. Compress or download it again."
            ) from error
        raise EvaluationError(
            f"{path} has report_version {version}; the supported maximum is {REPORT_VERSION}. Update optimum-modegpt."
        )

    def summary(self) -> str:
        """Return a short table of ranks and errors per block, with the achieved sparsity, time and peak memory."""
        parts = parts_among(block.parts for block in self.blocks)
        rows = ["block" + "".join(f"{part:>22}" for part in parts)]
        for block in self.blocks:
            row = f"{block.index:>5}"
            for part in parts:
                row += f"{_cell(block.parts.get(part)):>22}"
            rows.append(row)
        seconds = floor = peak = 0.0
        for stage in self.stages:
            seconds += stage.seconds
            floor += sum(stage.floor.values())
            peak = max(peak, stage.peak_memory)
        paced = f" ({seconds / floor:.1f} times its matrix products at this device's rate)" if floor else ""
        together = f", {self.processes} processes" if self.processes > 1 else ""
        p, wanted = self.parameters, "for the target" if self.target else "requested"
        rows += [
            f"removed {self.achieved_sparsity:.2%} of the block projections ({wanted} {self.requested_sparsity:.2%}): "
            f"{p.blocks_before:,} -> {p.blocks_after:,} weights",
            f"all parameters {p.total_before:,} -> {p.total_after:,} ({1 - p.total_after / p.total_before:.2%} fewer)",
            f"{seconds:.1f} s{paced}, peak {self.memory_kind} {peak / 2**20:,.0f} MiB on {self.device}{together}",
        ]
        if self.target:
            rows.append(target_text(self.target))
        if self.kept_experts:
            rows.append(f"kept {len(self.kept_experts[0])} experts in each of {len(self.kept_experts)} blocks")
        rows += self.uncut
        for warning in self.warnings:
            rows.append(f"warning: {warning}")
        return "\n".join(rows)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Plot the kept fraction of each part's width, block by block.

        The figure is also saved to `path`, if given. The file extension selects the format.

        Raises:
            ImportError: matplotlib is not installed. The message names the extra to install.
        """
        kept: dict[str, list[float]] = {part: [] for part in parts_among(block.parts for block in self.blocks)}
        for block in self.blocks:
            for part, values in kept.items():
                found = block.parts.get(part)
                values.append(math.nan if found is None else found.rank / found.dense_rank)
        return plot_kept(kept, f"{self.base_model or 'model'}: {self.achieved_sparsity:.1%} removed", path)


def plot_ranks(report: Report, path: str | Path | None = None) -> Figure:
    """Plot the kept widths of a report. The same as `report.plot(path)`."""
    return report.plot(path)


def _cell(part: PartReport | None) -> str:
    if part is None:
        return "–"
    error = "" if part.relative_error is None else f" err {part.relative_error:.3f}"
    return f"{part.rank}/{part.dense_rank}{error}"
