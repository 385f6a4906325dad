"""Describe the machine and the code that the results of benchmarks depend on."""

from __future__ import annotations

import hashlib
import platform
import re
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
    """Return the machine and the versions for JSON, with memory in bytes and the load over the last minute."""
    chosen = compute_device(None if device == "auto" else device, torch.device("cpu"))
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else str(chosen),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "load": psutil.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def processor() -> str:
    """Return the name of the CPU, which Linux has only in a file."""
    info = Path("/proc/cpuinfo")
    if info.exists() and (name := re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE)):
        return name[1]
    return platform.processor() or platform.machine()


@cache
def code(*parts: str) -> str:
    """Return the version of the package and a digest of its Python files, all or only those of some subpackages."""
    (root,) = map(Path, optimum_modegpt.__path__)
    contents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not parts or name.parts[0] in parts:
            contents.append(name.as_posix().encode() + path.read_bytes())
    return f"{version('optimum-modegpt')} {digest(*contents)}"


def digest(*contents: bytes) -> str:
    """Return a short digest of the contents in their order."""
    found = hashlib.sha256()
    for content in contents:
        found.update(content)
    return found.hexdigest()[:12]
