"""Run Python code in processes that start fast: forks of a process that has imported torch, but not transformers.

Importing torch and the libraries that transformers imports takes four of the six seconds in which a process loads a
model. A fork has not imported transformers, this package, or anything that reads the environment of the Hub.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

SERVER = """
import contextlib, importlib, json, os, signal, sys
for name in (
    "torch", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint", "scipy.optimize",
    "torchao.prototype.safetensors.safetensors_support", "matplotlib.pyplot",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
assert not {"transformers", "huggingface_hub", "datasets", "accelerate", "optimum_modegpt"} & sys.modules.keys()

given = ("", *os.environ.get("PYTHONPATH", "").split(os.pathsep))

def become(job):
    for stream, path in enumerate(job["streams"]):
        os.dup2(os.open(path, os.O_CREAT | os.O_RDWR), stream)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    if job["isolated"]:
        sys.path[:] = [path for path in sys.path if path not in given]
    sys.argv[1:] = job["arguments"]
    signal.alarm(job["timeout"])
    exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
    sys.exit()

for line in sys.stdin:
    child = os.fork()
    if not child:
        become(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def _server() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    atexit.register(process.communicate)  # ends it, because it then has nothing to read
    return process


def run_forked(
    code: str,
    arguments: Sequence[str] = (),
    *,
    env: Mapping[str, str] = os.environ,
    cwd: Path | None = None,
    isolated: bool = False,
    timeout: int = 300,
) -> subprocess.CompletedProcess[str]:
    """Run code as `python -c` would, or as `python -I -c` with `isolated`. Return its exit code and output.

    Differences: variables of the environment that configure Python or torch's threads have no effect.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        streams = [os.devnull, *(str(Path(folder, name)) for name in ("out", "err"))]
        job = {"code": code, "arguments": [*arguments], "env": dict(env), "cwd": str(cwd or Path.cwd())}
        server.stdin.write(json.dumps(job | {"streams": streams, "isolated": isolated, "timeout": timeout}) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the process that forks has ended"
        output, errors = (Path(path).read_text(encoding="utf-8") for path in streams[1:])
    return subprocess.CompletedProcess(code, int(answer), output, errors)
