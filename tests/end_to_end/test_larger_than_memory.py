"""Test that a compression does not hold all weights in memory: they stay in memory-mapped files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import RECIPE, save_dense, save_text
from tiny_models import tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

PATHS = os.pathsep.join(path for path in sys.path if path)
"""Import path for a subprocess."""

SHAPE = LlamaConfig(
    hidden_size=768,
    intermediate_size=768,
    num_attention_heads=12,
    num_key_value_heads=12,
    num_hidden_layers=10,
    vocab_size=260,
    max_position_embeddings=64,
)
"""160 MB of weights in blocks of 16 MB."""

SCRIPT = """
import json, sys, threading
from optimum_modegpt import Checkpoint, ModeGPTModelForCausalLM
from optimum_modegpt.cli import main as cli

way, recipe, *runs = json.loads(sys.argv[1])

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def command(model, text, output):
    flags = []
    for name, value in recipe.items():
        flags += ["--" + name.replace("_", "-"), str(value)]
    assert cli.main(["compress", model, "--dataset", text, *flags, "--device", "cpu", "--output", output]) == 0

def python(model, text, output):
    checkpoint = Checkpoint(output + ".checkpoint")
    ModeGPTModelForCausalLM.from_pretrained(
        model, compression_config={**recipe, "dataset": text}, checkpoint=checkpoint
    ).save_pretrained(output)
    checkpoint.remove()

compress = {"command": command, "python": python}[way]
compress(*runs[0])  # libraries allocate their own memory here, before the measurement
start, samples, done = anonymous(), [], threading.Event()

def sample():
    while not done.wait(0.005):
        samples.append(anonymous() - start)

thread = threading.Thread(target=sample)
thread.start()
compress(*runs[1])
done.set()
thread.join()
print(max(samples))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc/self/status")
@pytest.mark.parametrize("way", ["command", pytest.param("python", marks=pytest.mark.slow)])
def test_peak_memory_is_below_the_size_of_the_weights(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(SHAPE, dtype=torch.float32).save_pretrained(tmp_path / "large")
    tokenizer().save_pretrained(tmp_path / "large")
    small, text = save_dense(tmp_path / "small"), save_text(tmp_path / "text.txt")
    runs = [(str(model), str(text), f"{model}-compressed") for model in (small, tmp_path / "large")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([way, RECIPE, *runs])],
        env={**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    peak = int(done.stdout.splitlines()[-1])
    weights = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert weights > 150 * 2**20
    assert (tmp_path / "large-compressed" / "model.safetensors").stat().st_size > weights / 2
    assert peak < 0.75 * weights, f"{peak / 2**20:.0f} MiB of memory for {weights / 2**20:.0f} MiB of weights"
