"""Settings of the whole suite."""

from __future__ import annotations

import os

# No test touches the network; before transformers is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

# Bit-equality across processes needs one order of summation, and tiny models are fastest on one thread.
torch.set_num_threads(1)
