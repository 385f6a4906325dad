"""Settings of the whole suite."""

from __future__ import annotations

import os
import signal

# Before torch and transformers are imported, and for the processes that tests start too. No test touches the network.
# Bit-equality across processes needs one order of summation, and tiny models are fastest on one thread.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import torch

torch.set_num_threads(1)

# A shell that runs the suite in the background has it ignore Ctrl-C, and the processes that tests interrupt with it.
signal.signal(signal.SIGINT, signal.default_int_handler)
