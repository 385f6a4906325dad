"""Test compression on a simulated and a real accelerator, with residual streams on the device and on the host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import dense, tokens

from optimum_modegpt import ModeGPTConfig
from optimum_modegpt.budget import placement
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.compress import compress

PATHS = os.pathsep.join(path for path in sys.path if path)
"""Import path for a subprocess, in which the simulated device is registered."""
PROGRAM = Path(__file__).parents[1] / "fake_device.py"

pytest.importorskip("torch.utils.backend_registration", reason="this torch has no devices written in Python")


CASES: dict[str, tuple[dict[str, Any], int | None, bool]] = {
    "streams on the device": ({}, 2**40, True),
    "streams on the host, no float64": ({}, None, False),
    "paper, no float64": ({"method": "paper"}, 2**40, False),
}
"""Recipe, free memory of the device, and whether it supports float64."""


@pytest.fixture(scope="module")
def simulated() -> dict[str, Any]:
    """Run all cases in one process, and return its findings by case."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), json.dumps(list(CASES.values()))],
        env={**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_no_operator_mixes_devices(case: str, simulated: dict[str, Any]) -> None:
    found, streams = simulated[case], "device" if CASES[case][1] else "host"
    assert found["streams"] == streams
    assert found["kept"] == (["elsewhere"] if streams == "device" else ["cpu"])
    assert found["left"] == []
    assert found["distance"] < 1e-3


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="this machine has no accelerator")
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("llama-gqa-tied", {}),
        ("llama-gqa-tied", {"method": "paper"}),
        ("opt-post-ln", {"allocation": "influence"}),
    ],
)
def test_result_is_bit_identical_with_streams_on_device_and_host(
    name: str, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, found = torch.accelerator.current_accelerator(), {}
    for free, streams in ((2**40, "device"), (None, "host")):
        monkeypatch.setattr(placement, "device_memory", lambda device, free=free: free)
        model, config = dense(name), ModeGPTConfig(sparsity=0.3, batch_size=5, **recipe)
        report = compress(model, config, TokenWindows(tokens(64, 24), {}), device=device, progress=False)
        assert report.streams == streams
        found[streams] = model.state_dict()
    for key, tensor in found["device"].items():
        assert torch.equal(found["host"][key], tensor), key
