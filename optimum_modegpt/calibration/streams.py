"""Store the residual stream at a block's input over all calibration tokens, and record the blocks' other arguments.

All streams use the same storage: the accelerator, host memory, or memory-mapped files that the system may evict from
memory. The storage is chosen for the first stream, and results computed from a stream use the storage of that stream.
"""

from __future__ import annotations

import inspect
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optimum_modegpt import distributed
from optimum_modegpt.architectures import Architecture
from optimum_modegpt.calibration.transfers import offload, prefetch, to_host
from optimum_modegpt.distributed import shard
from optimum_modegpt.errors import CheckpointError, NumericalError

Stream = list[Tensor]
"""The residual stream as batches, (batch, length, d_model) each."""

HOST = torch.device("cpu")

DENSE_ADVICE = "Load the model in bfloat16 or float32, or check its weights."
"""Advice for a dense model whose output is not finite."""

SUFFIX = ".stream"
"""Suffix of the files of streams, which distinguishes them from other memory-mapped files."""


@dataclass(frozen=True)
class StreamStorage:
    """Storage of streams: the memory of `device`, or files in `folder`, in which case `device` is the host."""

    device: torch.device
    folder: Path | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> StreamStorage:
        """Return the storage of `tensor`."""
        name = tensor.untyped_storage().filename
        return cls(tensor.device, Path(name).parent if name is not None and name.endswith(SUFFIX) else None)

    def keep(self, tensor: Tensor) -> Tensor:
        """Move `tensor` to this storage, and block until done. Return the same tensor if it is already there.

        Raise `CheckpointError` if the disk is full or not writable.
        """
        if self.folder is None or StreamStorage.of(tensor) == self:
            return to_host(tensor) if self.device.type == "cpu" else tensor.to(self.device)
        try:
            return _in_file(tensor.detach().to(self.device).contiguous(), self.folder)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError for I/O errors
            raise CheckpointError(
                f"{self.folder} cannot hold the residual streams: {error}\n"
                "Free some space there and rerun the same command, or calibrate on fewer tokens."
            ) from error


def store_like(tensors: Iterable[Tensor], stream: Stream) -> Iterator[Tensor]:
    """Move the tensors to the storage of `stream`, in order. Yield each one after its copy has completed.

    Copies to host memory overlap with the computation of the next tensors. Writes to a file block it.
    """
    place = next(map(StreamStorage.of, stream), StreamStorage(HOST))
    return offload(tensors) if place == StreamStorage(HOST) else map(place.keep, tensors)


def map_stream(
    function: Callable[..., Tensor], device: torch.device, stream: Stream, *others: Iterable[Tensor]
) -> Iterator[Tensor]:
    """Apply `function` to every batch of the streams on `device`, and store the results like the first stream."""
    arrived = (prefetch(each, device) for each in (stream, *others))
    return store_like(itertools.starmap(function, zip(*arrived, strict=True)), stream)


def _in_file(tensor: Tensor, folder: Path) -> Tensor:
    """Store `tensor` in a new unlinked file, and return a shared memory map of it.

    The system can reclaim the memory of the map. The file disappears with the last tensor that uses it, or with the
    process.
    """
    descriptor, name = tempfile.mkstemp(suffix=SUFFIX, dir=folder)
    with open(descriptor, "wb") as file:
        try:
            file.truncate(tensor.nbytes)
            mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            os.unlink(name)
        # Write to the file instead of copying into the map, because a full disk would then kill the process.
        file.write(tensor.flatten().view(torch.uint8).numpy().data)
    return mapped.view(tensor.shape)


def first_windows(stream: Stream, windows: int) -> Iterator[Tensor]:
    """Yield the first `windows` of this rank's stream, in its batches. The last batch may be a view."""
    for batch in stream:
        if windows <= 0:
            return
        yield batch[:windows]
        windows -= len(batch)


def token_count(stream: Stream) -> int:
    """Return the number of tokens of this rank's stream."""
    return sum(batch.shape[:2].numel() for batch in stream)


def in_batches(stream: Stream, size: int) -> Stream:
    """Split the stream into batches of at most `size` windows. Parts of larger batches are views."""
    return [part for batch in stream for part in batch.split(size)]


def not_finite(stream: Stream, windows: Tensor) -> str | None:
    """Return the name of the first window with a non-finite value, or None. `windows` are all indices."""
    start = 0
    for batch in stream:
        bad = batch.isfinite().flatten(1).all(1).logical_not().nonzero()
        if len(bad):
            return f"calibration window {int(windows[start + int(bad[0])])} (the first is window 0)"
        start += len(batch)
    return None


def check_dense(stream: Stream, windows: Tensor) -> None:
    """Raise a `NumericalError` that names the window if a stream of the dense model is not finite."""
    if (window := not_finite(stream, windows)) is not None:
        raise NumericalError(f"the dense model's output is not finite on {window}. {DENSE_ADVICE}")


@dataclass(frozen=True)
class BlockInputs:
    """Input of the first block, and the keyword arguments of every block for one window, which broadcast."""

    stream: Stream
    arguments: list[dict[str, Any]]
    windows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """Index of each window of the stream among the calibration windows, from 0."""

    def on(self, index: int, device: torch.device) -> dict[str, Any]:
        """Return the arguments of block `index` on `device`."""
        return {name: _move(value, device) for name, value in self.arguments[index].items()}

    def first(self, windows: int) -> BlockInputs:
        """Return the inputs of the first `windows` of all ranks."""
        own = max(0, windows - distributed.exclusive_sum(len(self.windows)))
        return replace(self, stream=list(first_windows(self.stream, own)), windows=self.windows[:own])


class _Recorder(nn.Module):
    """Replaces a block. It records its arguments and returns the stream unchanged."""

    def __init__(self, block: nn.Module, *, returns_tuple: bool) -> None:
        super().__init__()
        self.block = [block]  # in a list, so that it is not a submodule
        self.returns_tuple = returns_tuple
        self.stream: Tensor | None = None
        self.arguments: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("block")[0], name)  # models read flags such as attention_type

    def forward(self, stream: Tensor, *positional: Any, **arguments: Any) -> Tensor | tuple[Tensor, None]:
        names = list(inspect.signature(self.block[0].forward).parameters)[1:]
        self.stream, self.arguments = stream, dict(zip(names, positional, strict=False)) | arguments
        return (stream, None) if self.returns_tuple else stream


def enter(
    architecture: Architecture, tokens: Tensor, batch_size: int, place: StreamStorage, *, first: int = 0
) -> BlockInputs:
    """Run the model up to its first block on this rank's shard of `tokens` (windows, length), `batch_size` at a time.

    `first` is the index of the first window of `tokens` among the calibration windows.

    This runs the model's own forward pass, with a recorder in place of every block. Embeddings, masks and rotary tables
    are therefore computed by the model itself, for any family.
    """
    with _recorders(architecture) as recorders:
        device: Any = architecture.model.get_input_embeddings().weight.device

        def run(batch: Tensor) -> Tensor:
            architecture.model.base_model(input_ids=batch.to(device), use_cache=False)
            stream = recorders[0].stream
            assert stream is not None
            return stream

        stream = [place.keep(run(batch)) for batch in shard(tokens).split(batch_size) if len(batch)]
        run(tokens[:1])
        arguments = [recorder.arguments for recorder in recorders]
    return BlockInputs(stream, arguments, shard(torch.arange(first, first + len(tokens))))


def skipping_blocks(architecture: Architecture, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Run the model's own forward pass on `tokens` (windows, length) without its blocks.

    Return the embedded tokens, which are the input of the first block, and the logits that the model computes from
    them.
    """
    with _recorders(architecture) as recorders:
        device: Any = architecture.model.get_input_embeddings().weight.device
        logits = architecture.model(input_ids=tokens.to(device), use_cache=False).logits
        stream = recorders[0].stream
        assert stream is not None
        return stream, logits


@contextmanager
def _recorders(architecture: Architecture) -> Iterator[Sequence[_Recorder]]:
    blocks = architecture.block_list
    originals = list(blocks)
    returns_tuple = architecture.family.returns_tuple
    recorders = [_Recorder(block, returns_tuple=returns_tuple) for block in originals]
    try:
        for index, recorder in enumerate(recorders):
            blocks[index] = recorder
        yield recorders
    finally:
        for index, original in enumerate(originals):
            blocks[index] = original


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Record the first argument of every call of `module` within the context."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Record the first argument and the output, or the first output, of every call of `module` within the context."""
    seen: list[tuple[Tensor, Tensor]] = []

    def record(_: nn.Module, arguments: Any, output: Any) -> None:
        seen.append((arguments[0], output[0] if isinstance(output, tuple) else output))

    handle = module.register_forward_hook(record)
    try:
        yield seen
    finally:
        handle.remove()


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_move(item, device) for item in value)
    return value
