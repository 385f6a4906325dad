"""Finished work of a compression that may be interrupted: blocks, streams and plan, in a folder of their own.

A block is written as soon as it is finished and read back as a memory map, so finished blocks take no memory. The
manifest is replaced at once and last: a process that is killed at any moment leaves the previous one or the new one.

Processes that work together share the folder. The first writes the record and the blocks, each its own streams.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from optimum_modegpt import processes
from optimum_modegpt.calibration.streams import SUFFIX
from optimum_modegpt.errors import CheckpointError, OutputError

MANIFEST = "manifest.json"
RESULT, REPLACED = "result", "replaced"
"""Folders in it: the result while it is written, and what it takes the place of."""
OWN = (
    "manifest.json*",
    "block-*.safetensors*",
    "streams-*.safetensors*",
    "process-*.lock",
    f"*{SUFFIX}",
    RESULT,
    REPLACED,
)
"""What is in such a folder."""
ANEW = "To start anew, take --fresh on the command line, or remove the folder."
MEMBER_SECONDS = 60
"""How long a process waits for one of a run that was killed, which ends by itself."""
STREAM_SECONDS = 30
"""The residual streams are written at most this often: with blocks that take less, a few are computed again."""
ROW = 512
"""Bytes of a tensor that its fingerprint sums up."""


@dataclass
class Progress:
    """How far a compression has come; everything is safe for JSON."""

    identity: dict[str, Any]
    """What has to be the same for the work to go on."""
    plan: list[dict[str, int]] | None = None
    measured: dict[str, Any] = field(default_factory=dict)
    """What the plan was made from."""
    errors: list[dict[str, float]] = field(default_factory=list)
    """Relative errors of the finished blocks, by part; as many as there are finished blocks with streams."""
    warnings: list[str] = field(default_factory=list)
    batch_size: int | None = None
    """Windows per forward pass: as many as at first, or as were left where memory did not suffice."""
    asked_batch_size: int | None = None
    """As many as were asked for."""
    seconds: float = 0.0
    """Of all runs until now."""
    saved: dict[str, Any] | None = None
    """What the result is known by, once it is written whole and only has to be moved to its place."""


class Checkpoint:
    """The folder of one compression; only one run at a time may use it.

    The same compression goes on from what stands there. Weights of a compressed model stay in its files: remove it when
    the result is saved.

    Args:
        folder: made where it does not exist; processes that work together name the same one, on a disk that all of them
            reach.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self.progress = Progress({})
        self._lock = FileLock(self.folder.with_name(f"{self.folder.name}.lock"))
        self._streams_written = self._began = time.monotonic()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other run uses it; one that does so already may enter again. Left empty it is gone.

        The first process speaks for those that work with it.

        Raises:
            CheckpointError: another run is at work there, or the folder is none of ours.
            OutputError: it cannot be written.
        """
        if not processes.is_first():
            yield
            return
        self._check_ours()
        with parents_made(self.folder):
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                message = f"another run is at work on {self.folder}; wait for it, or stop it first."
                raise CheckpointError(message) from None
            except OSError as error:
                raise OutputError(f"{self.folder} cannot be written: {error}") from error
            try:
                yield
            finally:
                if self._lock.lock_counter == 1:
                    if not (self.folder / MANIFEST).exists():  # nothing was finished
                        self.remove()
                    Path(self._lock.lock_file).unlink(missing_ok=True)  # while it is held: nobody else has it open
                self._lock.release()

    @contextmanager
    def opened(self, identity: Mapping[str, Any]) -> Iterator[Checkpoint]:
        """The checkpoint of a compression with this identity; what stands there is taken over.

        Raises:
            CheckpointError: another run is at work there, or it is the checkpoint of another compression.
        """
        with self.alone():
            self.progress = processes.told(self._taken_over(dict(identity)) if processes.is_first() else None)
            with self._as_a_member():
                self._streams_written = self._began = time.monotonic()
                yield self
            processes.wait_for_all()  # the first may delete what another has yet to open or to close

    def _taken_over(self, identity: dict[str, Any]) -> Progress:
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
        self.progress = self._read(identity)
        self._tidy()
        return self.progress

    @contextmanager
    def _as_a_member(self) -> Iterator[None]:
        """A process beside the first has a lock of its own: one of a run that was killed may outlive the first."""
        if processes.is_first():
            yield
            return
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder} was made by the first process, and process {processes.index() + 1} does not find it: "
                "processes on several machines keep their work on a disk that all of them reach."
            )
        lock = FileLock(self.folder / f"process-{processes.index()}.lock")
        try:
            lock.acquire(timeout=MEMBER_SECONDS)
        except Timeout:
            message = f"{self.folder}: a process of the run before is still at work; stop it, and run the same again."
            raise CheckpointError(message) from None
        try:
            yield
        finally:
            lock.release()

    def remove(self) -> None:
        """Deletes it, with all that was finished, where it exists.

        Raises:
            CheckpointError: the folder is none of ours.
        """
        self._check_ours()
        if not self.folder.exists():
            return
        for path in self.folder.iterdir():
            if path.name != MANIFEST:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.rmtree(self.folder)  # the record last: what is killed here is known again

    def _check_ours(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is a file; unfinished work needs a folder.")
        found = [] if not self.folder.exists() else sorted(path.name for path in self.folder.iterdir())
        if foreign := [name for name in found if not any(fnmatch(name, pattern) for pattern in OWN)]:
            raise CheckpointError(
                f"{self.folder} holds what no unfinished compression has: {', '.join(foreign[:5])}"
                f"{', …' if len(foreign) > 5 else ''}. Choose a folder that does not exist."
            )

    @property
    def size(self) -> int:
        """Bytes of unfinished work on the disk."""
        return sum(file.stat().st_size for file in self.folder.rglob("*"))

    def read(self) -> Progress | None:
        """How far an earlier run has come; None where nothing was finished.

        Raises:
            CheckpointError: its record cannot be read.
        """
        path = self.folder / MANIFEST
        if not path.is_file():
            return None
        try:
            return Progress(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}\n{ANEW}") from error

    def keep_saved(self, saved: dict[str, Any]) -> None:
        """Writes that the result is there, whole, and what it is known by."""
        self.progress.saved = saved
        self._write_manifest()

    def keep_batch_size(self, windows: int) -> None:
        """Writes how many windows go at once from now on."""
        self.progress.batch_size = windows
        self._write_manifest()

    # ----------------------------------------------------------------------------------------------------- the plan

    def keep_plan(self, plan: list[dict[str, int]] | None, measured: Mapping[str, Any], warnings: list[str]) -> None:
        """Writes what was measured until now, and the plan that was made from it, once there is one."""
        self.progress.plan, self.progress.measured, self.progress.warnings = plan, dict(measured), list(warnings)
        self._write_manifest()

    # --------------------------------------------------------------------------------------------------- the blocks

    @property
    def finished(self) -> int:
        """Blocks that need not be computed again."""
        return len(self.progress.errors)

    def keep_block(self, index: int, module: nn.Module, home: torch.device) -> nn.Module:
        """Writes a finished block and gives it back with memory maps of the file, where `home` is the host."""
        if processes.is_first():
            self._write_tensors(self._block(index), module.state_dict())
        processes.wait_for_all()
        return self.restore_block(index, module, home)

    def restore_block(self, index: int, module: nn.Module, home: torch.device) -> nn.Module:
        """Gives `module`, of the right shapes, the tensors of a finished block."""
        trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        tensors = {name: tensor.to(home) for name, tensor in mapped(self._block(index)).items()}
        module.load_state_dict(tensors, strict=True, assign=True)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(trained[name])
        return module

    def keep_streams(
        self, errors: list[dict[str, float]], warnings: list[str], dense: list[Tensor], compressed: list[Tensor]
    ) -> None:
        """Writes the streams after the blocks of `errors`, where the last time was long ago.

        Of several processes, none deletes the former ones before the streams of all count.
        """
        if not processes.told(time.monotonic() - self._streams_written >= STREAM_SECONDS):
            return
        streams = {f"dense.{index:06}": batch for index, batch in enumerate(dense)}
        if compressed is not dense:
            streams |= {f"compressed.{index:06}": batch for index, batch in enumerate(compressed)}
        before = self._streams(self.finished)
        self._write_tensors(self._streams(len(errors)), streams)
        processes.wait_for_all()
        self.progress.errors, self.progress.warnings = list(errors), list(warnings)
        self._write_manifest()
        processes.wait_for_all()
        before.unlink(missing_ok=True)
        self._streams_written = time.monotonic()

    def streams(self, keep: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """This process's dense and compressed stream after the finished blocks; one object where they are the same.

        `keep` takes each batch, a map of the checkpoint's file, to its place.
        """
        found = mapped(self._streams(self.finished))
        dense, compressed = (
            [keep(batch) for name, batch in sorted(found.items()) if name.startswith(kind)]
            for kind in ("dense", "compressed")
        )
        return dense, compressed or dense

    # -------------------------------------------------------------------------------------------------------- files

    def _block(self, index: int) -> Path:
        return self.folder / f"block-{index:05}.safetensors"

    def _streams(self, blocks: int) -> Path:
        return self.folder / f"streams-{blocks:05}.process-{processes.index()}.safetensors"

    def _read(self, identity: dict[str, Any]) -> Progress:
        progress = self.read()
        if progress is None:
            return Progress(identity)
        if differences := [
            f"{name} was {progress.identity.get(name)!r}, now it is {value!r}"
            for name, value in identity.items()
            if progress.identity.get(name) != value
        ]:
            raise CheckpointError(
                f"{self.folder} holds the unfinished work of another compression:\n  "
                + "\n  ".join(differences)
                + f"\nRun it as it was to go on. {ANEW}"
            )
        return progress

    def _tidy(self) -> None:
        """Deletes what a process that was killed could not."""
        for pattern in ("*.partial", "streams-*.safetensors"):
            for file in self.folder.glob(pattern):
                if not file.match(f"streams-{self.finished:05}.*.safetensors"):
                    file.unlink(missing_ok=True)  # a process of the run before may tidy too

    def _write_manifest(self) -> None:
        if not processes.is_first():
            return
        now = time.monotonic()
        self.progress.seconds, self._began = self.progress.seconds + now - self._began, now
        text = json.dumps(dataclasses.asdict(self.progress), indent=1)
        self._replace(self.folder / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))

    def _write_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._replace(path, lambda partial: save_file(on_host, partial))

    def _replace(self, path: Path, write: Callable[[Path], object]) -> None:
        partial = path.with_name(f"{path.name}.partial")
        with writing(self.folder):
            try:
                write(partial)
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise


@contextmanager
def parents_made(path: Path) -> Iterator[None]:
    """The folders above `path` exist inside; of those made for it none is left at the end that is empty.

    Raises:
        OutputError: they cannot be made.
    """
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}") from error
    try:
        yield
    finally:
        for parent in made:
            with suppress(OSError):  # not empty: something was saved there
                parent.rmdir()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A disk that is full, or refuses, is an error that says that nothing is lost.

    Raises:
        CheckpointError: with what the system said.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for what the system refuses
        raise CheckpointError(
            f"{folder} cannot be written: {error}\nFinished blocks are kept there: make room and run the same again."
        ) from error


def mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, as memory maps of it."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes and sums of all tensors of a model; every weight counts, and in which row it stands."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for sums in _sums(tensor.detach().flatten()):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()


def _sums(flat: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of a tensor's bits, row by row as integers, as fast as memory is read; and what is left over."""
    bits = flat.contiguous().view(torch.uint8)
    if bits.storage_offset() % 8:
        bits = bits.clone()
    whole = len(bits) // ROW * ROW
    return bits[:whole].view(torch.int64).view(-1, ROW // 8).sum(1), bits[whole:]
