"""Load models in a fresh process, with the package, with the remote code in their folders, or with neither."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from forks import run_forked
from tiny_models import tokens

import optimum_modegpt

# Reads jobs [{folder, auto, dtype, out, save}] and writes the output of each model.
WORKER = """
import json, sys
jobs, kind = json.loads(sys.argv[1]), sys.argv[2]
trust = kind == "remote"
module = {"remote": "transformers_modules.", "local": "optimum_modegpt.", "stock": "transformers."}[kind]
if kind != "local":
    sys.modules["optimum_modegpt"] = None  # an import fails, installed or not
else:
    sys.path.insert(0, sys.argv[3])
    import importlib
    for family in ("llama", "mistral", "opt", "qwen2"):
        importlib.import_module("optimum_modegpt.modeling.modegpt_" + family)
import torch, transformers
from safetensors.torch import save_file
torch.set_num_threads(1)
ids = torch.tensor(json.loads(sys.argv[4]))
for job in jobs:
    model = getattr(transformers, job["auto"]).from_pretrained(
        job["folder"], dtype=getattr(torch, job["dtype"]), trust_remote_code=trust
    )
    assert type(model).__module__.startswith(module), type(model)
    with torch.no_grad():
        save_file({"out": model(ids)[0].contiguous()}, job["out"])
    if "save" in job:
        model.save_pretrained(job["save"])
if trust:
    assert not any(name.startswith("optimum_modegpt.") for name in sys.modules)
    # The code of one repository must not be registered for the next one.
    assert "modegpt_llama" not in transformers.CONFIG_MAPPING
    from transformers import pipeline
    made = pipeline("text-generation", jobs[0]["folder"], trust_remote_code=True)("a", max_new_tokens=2)
    assert made[0]["generated_text"].startswith("a")
"""


def run_worker(jobs: list[dict[str, Any]], kind: str, cache: Path) -> None:
    """Run the jobs in one fresh isolated process.

    `kind` is "local" for the package, "remote" for the code in the folders, and "stock" for neither.
    """
    package_root = str(Path(next(iter(optimum_modegpt.__path__))).parent)
    environment = os.environ | {"HF_HOME": str(cache), "HF_MODULES_CACHE": str(cache / "modules")}
    arguments = [json.dumps(jobs), kind, package_root, json.dumps(tokens().tolist())]
    done = run_forked(WORKER, arguments, env=environment, cwd=cache, isolated=True)
    assert done.returncode == 0, done.stderr[-3000:]
