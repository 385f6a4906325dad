"""The residual stream at a block's input, over all calibration tokens, and what else the model hands its blocks.

Streams are kept in one place: on the accelerator, in host memory, or in files that the system may take out of memory.
It is chosen for the first of them; whatever is made from a stream goes where that stream is.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optimum_modegpt.architectures import Architecture
from optimum_modegpt.calibration.transfers import arriving, leaving, to_host
from optimum_modegpt.errors import CheckpointError, NumericalError
from optimum_modegpt.processes import share

Stream = list[Tensor]
"""The residual stream, (batch, length, d_model) a batch."""

HOST = torch.device("cpu")

DENSE_ADVICE = "Load the model in bfloat16 or float32, or check its weights."
"""For a dense model whose output is not finite."""

SUFFIX = ".stream"
"""Of the files that streams are kept in; by it they are told from other maps of files."""


@dataclass(frozen=True)
class Place:
    """Where streams are kept: in the memory of `device`, or in files in `folder`, then `device` is the host."""

    device: torch.device
    folder: Path | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        """Where `tensor` is."""
        name = tensor.untyped_storage().filename
        return cls(tensor.device, Path(name).parent if name is not None and name.endswith(SUFFIX) else None)

    def keep(self, tensor: Tensor) -> Tensor:
        """`tensor`, there, when this returns; itself where it is there already.

        Raises:
            CheckpointError: the disk is full, or refuses.
        """
        if self.folder is None or Place.of(tensor) == self:
            return to_host(tensor) if self.device.type == "cpu" else tensor.to(self.device)
        try:
            return _in_file(tensor.detach().to(self.device).contiguous(), self.folder)
        except (OSError, RuntimeError) as error:  # torch has no error of its own for what the system refuses
            raise CheckpointError(
                f"{self.folder} cannot hold the residual streams: {error}\n"
                "Make room there and run the same again, or calibrate on fewer tokens."
            ) from error


def kept(tensors: Iterable[Tensor], beside: Stream) -> Iterator[Tensor]:
    """The tensors where the stream `beside` is kept, in their order, each once it is there.

    To the host's memory they are copied beside the computing of those that follow. Writing into a file holds that up.
    """
    place = next(map(Place.of, beside), Place(HOST))
    return leaving(tensors) if place == Place(HOST) else map(place.keep, tensors)


def passed(
    function: Callable[..., Tensor], device: torch.device, stream: Stream, *others: Iterable[Tensor]
) -> Iterator[Tensor]:
    """`function` of every batch of the streams, computed on `device`, kept where the first stream is."""
    arrived = (arriving(each, device) for each in (stream, *others))
    return kept(itertools.starmap(function, zip(*arrived, strict=True)), stream)


def _in_file(tensor: Tensor, folder: Path) -> Tensor:
    """A shared map of a new file without a name: it takes no memory that the system could not have back, and is gone
    with the last tensor that uses it, or with the process."""
    descriptor, name = tempfile.mkstemp(suffix=SUFFIX, dir=folder)
    with open(descriptor, "wb") as file:
        try:
            file.truncate(tensor.nbytes)
            mapped = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            os.unlink(name)
        # Written, not copied into the map: there, a full disk would end the process.
        file.write(tensor.flatten().view(torch.uint8).numpy().data)
    return mapped.view(tensor.shape)


def in_batches(stream: Stream, size: int) -> Stream:
    """The stream in batches of at most `size` windows; parts of larger ones are views."""
    return [part for batch in stream for part in batch.split(size)]


def not_finite(stream: Stream, windows: Tensor) -> str | None:
    """Names the first window of the stream with a value that is not finite; `windows` are the numbers of all."""
    start = 0
    for batch in stream:
        bad = batch.isfinite().flatten(1).all(1).logical_not().nonzero()
        if len(bad):
            return f"calibration window {int(windows[start + int(bad[0])])} (the first is window 0)"
        start += len(batch)
    return None


def check_dense(stream: Stream, windows: Tensor) -> None:
    """Refuses a stream of the dense model that is not finite.

    Raises:
        NumericalError: with the number of the window.
    """
    if (window := not_finite(stream, windows)) is not None:
        raise NumericalError(f"the dense model's output is not finite on {window}. {DENSE_ADVICE}")


@dataclass(frozen=True)
class Front:
    """What enters the first block, and the keyword arguments of every block for one window (they broadcast)."""

    stream: Stream
    arguments: list[dict[str, Any]]
    windows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """Number of each window of the stream among the calibration windows, from 0."""

    def on(self, index: int, device: torch.device) -> dict[str, Any]:
        """The arguments of block `index`, on `device`."""
        return {name: _move(value, device) for name, value in self.arguments[index].items()}


class _Recorder(nn.Module):
    """Stands in for a block: notes its arguments and passes the stream through."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = [block]  # in a list, so that it is no submodule
        self.stream: Tensor | None = None
        self.arguments: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("block")[0], name)  # models read flags such as attention_type

    def forward(self, stream: Tensor, **arguments: Any) -> Tensor:
        self.stream, self.arguments = stream, arguments
        return stream


def enter(architecture: Architecture, tokens: Tensor, batch_size: int, place: Place, *, first: int = 0) -> Front:
    """Runs the model up to its first block, on its share of `tokens` (windows, length), `batch_size` at a time.

    `first` is the number of the first window of `tokens` among the calibration windows.

    The model's own forward pass does the work, with every block replaced by one that only takes notes; so embeddings,
    masks and rotary tables are the model's, whatever the family.
    """
    with _recorders(architecture) as recorders:
        device: Any = architecture.model.get_input_embeddings().weight.device

        def run(batch: Tensor) -> Tensor:
            architecture.model.base_model(input_ids=batch.to(device), use_cache=False)
            stream = recorders[0].stream
            assert stream is not None
            return stream

        stream = [place.keep(run(batch)) for batch in share(tokens).split(batch_size) if len(batch)]
        run(tokens[:1])
        arguments = [recorder.arguments for recorder in recorders]
    return Front(stream, arguments, share(torch.arange(first, first + len(tokens))))


def skipping_blocks(architecture: Architecture, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Run the model's own forward pass on `tokens` (windows, length) with every block left out.

    Returns the embedded tokens, which would enter the first block, and the logits that the model makes of them.
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
    recorders = [_Recorder(block) for block in originals]
    try:
        for index, recorder in enumerate(recorders):
            blocks[index] = recorder
        yield recorders
    finally:
        for index, original in enumerate(originals):
            blocks[index] = original


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """The first argument of every call of `module` while the context is open."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
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
