"""The calibration windows that a dense model writes itself: sampled on the fastest device that fits, and cached."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_modegpt import distributed
from optimum_modegpt.budget.compute_dtype import compute_dtype
from optimum_modegpt.budget.placement import MARGIN, Free
from optimum_modegpt.calibration.data import TokenWindows, digest_of, with_record
from optimum_modegpt.calibration.self_text import TOP_K, TOP_P, USER_TOKENS, Script, write
from optimum_modegpt.mixture import SELF
from optimum_modegpt.progress import bar
from optimum_modegpt.stages import compute_device
from optimum_modegpt.walk.checkpoint import fingerprint
from optimum_modegpt.walk.guards import evaluation_mode

logger = logging.getLogger(__name__)

FOLDER = "modegpt_self"
"""The folder of the cache, in that of the library datasets."""
MOST_WINDOWS = 64
"""Maximum number of windows that are written at once."""
MEMORY_SHARE = 0.5
"""Fraction of the free memory for the key-value cache and logits."""


def self_windows(
    model: PreTrainedModel,
    tokenizer: Any,
    script: Script,
    *,
    windows: int,
    length: int,
    seed: int,
    device: torch.device | None = None,
    progress: bool = False,
) -> TokenWindows:
    """Return windows that the model wrote in this or an earlier run with the same weights, tokenizer and arguments.

    Args:
        model: the dense model. It is unchanged, and so is the global random state.
        tokenizer: the tokenizer of the model.
        script: the script of the tokenizer.
        windows: number of windows.
        length: tokens per window.
        seed: seed of the random numbers.
        device: device on which the model writes if it has enough memory. None uses an accelerator if available.
        progress: whether to show a progress bar.
    """
    from optimum_modegpt.calibration.sources import Source  # slow, because it imports datasets

    settings = {
        "model": fingerprint(model),
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "template": getattr(tokenizer, "chat_template", None),
        "sampling": [TOP_K, TOP_P, USER_TOKENS],
        "opening": [script.beginning[0], script.hidden],
        "ends": [sorted(turn.ends) for turn in script.turns],  # not the openings, which may contain the date
        "seed": seed,
        "shape": [windows, length],
    }
    file = cache_folder() / f"{hashlib.sha256(json.dumps(settings).encode()).hexdigest()}.safetensors"
    vocabulary = model.config.get_text_config().vocab_size
    tokens = distributed.broadcast_object(kept_tokens(file, (windows, length), vocabulary))
    if tokens is None:
        noise = torch.rand(windows, length, generator=torch.Generator().manual_seed(seed))
        own = write_in_batches(model, script, distributed.shard(noise), device, progress)
        tokens = torch.cat(distributed.all_gather_object(own))
        if distributed.is_first():
            keep(file, tokens)
    first_token = None if script.hidden else tokenizer.convert_ids_to_tokens(script.beginning[0])
    return with_record(tokens, Source(SELF), windows, first_token)


def write_in_batches(
    model: PreTrainedModel, script: Script, noise: Tensor, wanted: torch.device | None, progress: bool
) -> Tensor:
    """Write a window for each row of `noise`, as many at once as memory allows.

    On a device that is slow in the model's 16 bits, the model writes in float32 if its weights fit.
    """
    device = compute_device(wanted, model.device)
    dtype = compute_dtype(model, device, device, distributed.world_size())
    row = bytes_of_window(model, noise.shape[1], dtype)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    free = Free.now(device)
    available = free.host if free.device is None else free.device
    if device != model.device and (free.device is None or MARGIN * (weights + row) > free.device):
        device, available = model.device, free.host
    elif device != model.device:
        available -= weights
    rows = int(max(1, min(MOST_WINDOWS, MEMORY_SHARE * available // row)))
    total = len(noise) * (noise.shape[1] - len(script.beginning) * (not script.hidden))
    shown = bar(desc="write calibration text", unit="token", total=total, shown=progress)
    with evaluation_mode(model), lent(model, device, dtype), shown:
        written = [write(model, script, part, wrote=shown.update) for part in noise.split(rows) if len(part)]
    return torch.cat(written) if written else torch.empty(0, noise.shape[1], dtype=torch.int64)


def bytes_of_window(model: PreTrainedModel, length: int, dtype: torch.dtype) -> int:
    """Return an upper bound of the bytes for writing one window: keys and values of all heads, and float32 logits."""
    config = model.config.get_text_config()
    cache = 2 * config.num_hidden_layers * config.hidden_size * length * dtype.itemsize
    return cache + 4 * 4 * config.vocab_size


@contextmanager
def lent(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Copy the tensors of a model to `device` within the context, with its parameters in `dtype`.

    Its own tensors may be mapped files, and are kept.
    """
    stored, own = model.dtype, list[tuple[dict[str, Any], str, Tensor]]()
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            own += [(tensors, name, tensor) for name, tensor in tensors.items() if tensor is not None]
    copies: dict[int, Tensor] = {}
    try:
        for tensors, name, tensor in own:
            if id(tensor) not in copies:  # tied tensors share their copy
                if isinstance(tensor, nn.Parameter):
                    own_dtype = dtype if tensor.dtype == stored else tensor.dtype
                    copies[id(tensor)] = nn.Parameter(tensor.detach().to(device, own_dtype), False)
                else:
                    copies[id(tensor)] = tensor.detach().to(device)
            tensors[name] = copies[id(tensor)]
        yield
    finally:
        for tensors, name, tensor in own:
            tensors[name] = tensor


# ----------------------------------------------------------------------------------------------------------- cache


def cache_folder() -> Path:
    """Return the folder of the cached windows, in the cache of the library datasets."""
    from datasets import config  # slow

    return Path(os.path.expanduser(config.HF_DATASETS_CACHE)) / FOLDER


def kept_tokens(file: Path, shape: tuple[int, int], vocabulary: int) -> Tensor | None:
    """Read cached windows. Return None if there are none, or if the file is damaged or has other content."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            tokens, digest = stored.get_tensor("tokens"), (stored.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        logger.warning("%s cannot be read, so the text is written again: %s", file, error)
        return None
    is_valid = tokens.dtype == torch.int64 and tokens.shape == shape and digest == digest_of(tokens)
    if not is_valid or int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        logger.warning("%s does not contain the expected windows, so the text is written again.", file)
        return None
    return tokens


def keep(file: Path, tokens: Tensor) -> None:
    """Write windows to the cache. If that fails, only a later run takes longer, so it is a warning."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(suffix=".part", dir=file.parent)
        os.close(descriptor)
        save_file({"tokens": tokens.contiguous()}, name, metadata={"sha256": digest_of(tokens)})
        os.replace(name, file)
    except (OSError, SafetensorError) as error:
        logger.warning("the text that the model wrote cannot be cached in %s: %s", file.parent, error)
