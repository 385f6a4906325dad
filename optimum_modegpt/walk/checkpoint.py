"""Store the checkpoint of a compression, so that an interrupted run can resume: blocks, residual streams and plan.

A block is written as soon as it is finished and read back as a memory map, so finished blocks use no memory. The
manifest is replaced atomically and last: a process that is killed at any moment leaves the previous or the new one.

The processes of a distributed run share the folder. Rank 0 writes the manifest and the blocks. Each rank writes its own
streams.
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from optimum_modegpt import distributed
from optimum_modegpt.calibration.streams import SUFFIX
from optimum_modegpt.errors import CheckpointError, OutputError

MANIFEST = "manifest.json"
RESULT, REPLACED = "result", "replaced"
"""Subfolders: the result while it is written, and the previous result, which it replaces."""
OWN = (
    "manifest.json*",
    "block-*.safetensors*",
    "streams-*.safetensors*",
    "process-*.lock",
    f"*{SUFFIX}",
    RESULT,
    REPLACED,
)
"""Name patterns of the files and subfolders of a checkpoint."""
ANEW = "To start over, pass --fresh on the command line or remove the folder."
MEMBER_SECONDS = 60
"""Seconds to wait for a process of a killed run to release its lock. Such a process exits by itself."""
STREAM_SECONDS = 30
"""Minimum seconds between two writes of the residual streams. If a block takes less time, a resumed run recomputes the
blocks since the last write."""
ROW = 512
"""Bytes of a tensor that the fingerprint adds up to one sum."""


@dataclass
class Manifest:
    """The progress of a compression. All fields are safe for JSON."""

    identity: dict[str, Any]
    """Settings that must be the same to resume the work."""
    plan: list[dict[str, int]] | None = None
    measured: dict[str, Any] = field(default_factory=dict)
    """Measurements from which the plan was made."""
    errors: list[dict[str, float]] = field(default_factory=list)
    """Relative errors by part of each finished block whose streams were written."""
    warnings: list[str] = field(default_factory=list)
    compute_dtype: str | None = None
    """The dtype of all computations."""
    batch_size: int | None = None
    """Windows per forward pass, after any reduction due to out-of-memory errors."""
    asked_batch_size: int | None = None
    """Requested number of windows per forward pass."""
    seconds: float = 0.0
    """Total wall-clock seconds of all runs so far."""
    saved: dict[str, Any] | None = None
    """Data that identifies the result, once it is completely written and only has to be moved to the output folder."""


class Checkpoint:
    """The working folder of one compression. Only one run at a time may use it.

    The same compression resumes from the checkpoint. The weights of the compressed model are memory maps of its files,
    so remove the checkpoint only after the result is saved.

    Args:
        folder: the folder, created if it does not exist. The processes of a distributed run must pass the same folder,
            on a disk that all of them can access.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self.manifest = Manifest({})
        self._lock = FileLock(self.folder.with_name(f"{self.folder.name}.lock"))
        self._streams_written = self._began = time.monotonic()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold an exclusive, re-entrant lock. The folder is removed on exit if it is empty.

        Rank 0 holds the lock for all ranks.

        Raises:
            CheckpointError: another run uses the folder, or the folder is not a checkpoint of this package.
            OutputError: the folder cannot be written.
        """
        if not distributed.is_first():
            yield
            return
        self._check_ours()
        with parents_made(self.folder):
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                message = f"another run is using {self.folder}; wait until it ends, or stop it first."
                raise CheckpointError(message) from None
            except OSError as error:
                raise OutputError(f"{self.folder} cannot be written: {error}") from error
            except KeyboardInterrupt:  # the file may exist already, and a release would leave it
                with suppress(Timeout, OSError), self._lock.acquire(timeout=0):
                    Path(self._lock.lock_file).unlink(missing_ok=True)
                raise
            try:
                yield
            finally:
                if self._lock.lock_counter == 1:
                    if not (self.folder / MANIFEST).exists():  # nothing was finished
                        self.remove()
                    Path(self._lock.lock_file).unlink(missing_ok=True)  # under the lock: no other process has it open
                self._lock.release()

    @contextmanager
    def opened(self, identity: Mapping[str, Any]) -> Iterator[Checkpoint]:
        """Open the checkpoint for a compression with this identity, and resume any progress in it.

        Raises:
            CheckpointError: another run uses the folder, or it is the checkpoint of another compression.
        """
        with self.alone():
            if distributed.is_first():
                self._take_over(dict(identity))
            self.manifest = distributed.broadcast_object(self.manifest)
            with self._as_a_member():
                self._streams_written = self._began = time.monotonic()
                yield self
            distributed.barrier()  # rank 0 may delete files that another rank has yet to open or to close

    def _take_over(self, identity: dict[str, Any]) -> None:
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
        self.manifest = self._read(identity)
        self._tidy()

    @contextmanager
    def _as_a_member(self) -> Iterator[None]:
        """Hold a separate lock on every rank but 0, because a process of a killed run may outlive rank 0."""
        if distributed.is_first():
            yield
            return
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder} was created by the first process, but process {distributed.rank() + 1} cannot find it. "
                "Processes on several machines need a folder on a shared disk."
            )
        lock = FileLock(self.folder / f"process-{distributed.rank()}.lock")
        try:
            lock.acquire(timeout=MEMBER_SECONDS)
        except Timeout:
            message = f"{self.folder}: a process of the previous run is still running; stop it, and rerun the command."
            raise CheckpointError(message) from None
        try:
            yield
        finally:
            lock.release()

    def remove(self) -> None:
        """Delete the checkpoint with all finished work, if it exists.

        Raises:
            CheckpointError: the folder is not a checkpoint of this package.
        """
        self._check_ours()
        if not self.folder.exists():
            return
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != MANIFEST:
                path.unlink(missing_ok=True)
        shutil.rmtree(self.folder)  # the manifest last: after a kill during removal, the folder is still recognised

    def _check_ours(self) -> None:
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is a file; expected a folder for the checkpoint.")
        foreign = sorted(os.listdir(self.folder))
        for pattern in OWN:
            foreign = [name for name in foreign if not fnmatch(name, pattern)]
        if foreign:
            raise CheckpointError(
                f"{self.folder} contains files that are not part of a checkpoint: {', '.join(foreign[:5])}"
                f"{', …' if len(foreign) > 5 else ''}. Choose a folder that does not exist."
            )

    @property
    def size(self) -> int:
        """Return the size of the checkpoint on disk in bytes."""
        return sum(file.stat().st_size for file in self.folder.rglob("*"))

    def read(self) -> Manifest | None:
        """Read the progress of an earlier run. Return None if nothing was finished.

        Raises:
            CheckpointError: the manifest cannot be read.
        """
        path = self.folder / MANIFEST
        if not path.is_file():
            return None
        try:
            return Manifest(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}\n{ANEW}") from error

    def keep_saved(self, saved: dict[str, Any]) -> None:
        """Record that the result is completely written, with the data that identifies it."""
        self.manifest.saved = saved
        self._write_manifest()

    def keep_batch_size(self, windows: int) -> None:
        """Record the number of windows per forward pass from now on."""
        self.manifest.batch_size = windows
        self._write_manifest()

    # ----------------------------------------------------------------------------------------------------- the plan

    def keep_plan(self, plan: list[dict[str, int]] | None, measured: Mapping[str, Any], warnings: list[str]) -> None:
        """Write the measurements so far, and the plan made from them, if there already is one."""
        self.manifest.plan, self.manifest.measured, self.manifest.warnings = plan, dict(measured), list(warnings)
        self._write_manifest()

    # --------------------------------------------------------------------------------------------------- the blocks

    @property
    def finished(self) -> int:
        """Return the number of blocks that need not be recomputed."""
        return len(self.manifest.errors)

    def keep_block(self, index: int, module: nn.Module, home: torch.device) -> nn.Module:
        """Write a finished block and return it with the file's tensors on `home`, as memory maps if that is the CPU."""
        if distributed.is_first():
            self._write_tensors(self._block(index), module.state_dict())
        distributed.barrier()
        return self.restore_block(index, module, home)

    def restore_block(self, index: int, module: nn.Module, home: torch.device) -> nn.Module:
        """Load the tensors of a finished block into `module`, which must have the right shapes."""
        trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        tensors = {name: tensor.to(home) for name, tensor in load_file(self._block(index)).items()}
        module.load_state_dict(tensors, strict=True, assign=True)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(trained[name])
        return module

    def keep_streams(
        self, errors: list[dict[str, float]], warnings: list[str], dense: list[Tensor], compressed: list[Tensor]
    ) -> None:
        """Write the streams after the blocks of `errors`, unless the last write was less than `STREAM_SECONDS` ago.

        No rank deletes its previous streams before the new streams of all ranks are recorded in the manifest.
        """
        if not distributed.broadcast_object(time.monotonic() - self._streams_written >= STREAM_SECONDS):
            return
        streams = {f"dense.{index:06}": batch for index, batch in enumerate(dense)}
        if compressed is not dense:
            streams |= {f"compressed.{index:06}": batch for index, batch in enumerate(compressed)}
        before = self._streams(self.finished)
        self._write_tensors(self._streams(len(errors)), streams)
        distributed.barrier()
        self.manifest.errors, self.manifest.warnings = list(errors), list(warnings)
        self._write_manifest()
        distributed.barrier()
        before.unlink(missing_ok=True)
        self._streams_written = time.monotonic()

    def streams(self, keep: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the dense and compressed streams of this rank after the finished blocks.

        Both are the same object if the streams are equal. `keep` moves each batch, a memory map of the checkpoint's
        file, to its storage.
        """
        streams: dict[str, list[Tensor]] = {"dense": [], "compressed": []}
        for name, batch in sorted(load_file(self._streams(self.finished)).items()):
            streams[name.partition(".")[0]].append(keep(batch))
        return streams["dense"], streams["compressed"] or streams["dense"]

    # -------------------------------------------------------------------------------------------------------- files

    def _block(self, index: int) -> Path:
        return self.folder / f"block-{index:05}.safetensors"

    def _streams(self, blocks: int) -> Path:
        return self.folder / f"streams-{blocks:05}.process-{distributed.rank()}.safetensors"

    def _read(self, identity: dict[str, Any]) -> Manifest:
        manifest = self.read()
        if manifest is None:
            return Manifest(identity)
        differences = []
        for name, value in identity.items():
            if (before := manifest.identity.get(name)) != value:
                differences.append(f"{name} was {before!r}, now it is {value!r}")
        if differences:
            raise CheckpointError(
                f"{self.folder} is the checkpoint of another compression:\n  "
                + "\n  ".join(differences)
                + f"\nTo resume, run it with the same settings. {ANEW}"
            )
        return manifest

    def _tidy(self) -> None:
        """Delete the leftover files of a killed process."""
        for pattern in ("*.partial", "streams-*.safetensors"):
            for file in self.folder.glob(pattern):
                if not file.match(f"streams-{self.finished:05}.*.safetensors"):
                    file.unlink(missing_ok=True)  # a process of the previous run may delete it too

    def _write_manifest(self) -> None:
        if not distributed.is_first():
            return
        now = time.monotonic()
        self.manifest.seconds, self._began = self.manifest.seconds + now - self._began, now
        text = json.dumps(dataclasses.asdict(self.manifest), indent=1)
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
    """Create the parent folders of `path`. On exit, remove those that were created here and are empty.

    Raises:
        OutputError: the folders cannot be created.
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
    """Turn an I/O error, such as a full disk, into an error that says that finished blocks are kept.

    Raises:
        CheckpointError: a write failed. The message contains the system's error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors raises its own error for I/O errors
        raise CheckpointError(
            f"{folder} cannot be written: {error}\n"
            "Finished blocks are kept there. Free some disk space and rerun the same command to resume."
        ) from error


def fingerprint(model: nn.Module) -> str:
    """Compute a sha256 over names, shapes, dtypes and sums of all tensors of a model.

    Every weight changes the result, and so does the row that the weight is in.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for sums in _sums(tensor.detach().flatten()):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()


def _sums(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of the bits of each `ROW` bytes as integers, at the speed of memory, and the remaining bytes."""
    bits = flat.contiguous().view(torch.uint8)
    if bits.storage_offset() % 8:
        bits = bits.clone()
    whole = len(bits) // ROW * ROW
    return bits[:whole].view(torch.int64).view(-1, ROW // 8).sum(1), bits[whole:]
