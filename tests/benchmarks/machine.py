"""What the figures of the benchmarks depend on."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import optimum_modegpt
from optimum_modegpt.stages import compute_device


def machine(device: str = "auto") -> dict[str, Any]:
    """The machine and the versions, safe for JSON; memory in bytes, load over the last minute."""
    chosen = compute_device(None if device == "auto" else device, torch.device("cpu"))
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else str(chosen),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "load": psutil.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@cache
def code() -> str:
    """The version of the package and a digest of its Python files: it is the same where nothing has changed."""
    (root,) = map(Path, optimum_modegpt.__path__)
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return f"{version('optimum-modegpt')} {digest.hexdigest()[:12]}"
