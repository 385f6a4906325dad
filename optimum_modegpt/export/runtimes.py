"""Export a model to ONNX Runtime, OpenVINO or ExecuTorch by the exporters of transformers.

One program computes the prompt and every further token: its inputs are tokens, mask, positions and the key-value cache,
which is empty at first, and its outputs are the logits and the longer cache. So the weights are stored once. Keys and
values of every block have their own widths.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.versions import require_version

from optimum_modegpt.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers.exporters import HfExporter

SINCE = "5.23"
"""The first release of transformers that saves exported models."""


def export_onnx(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Save a model in `folder` as model.onnx, with its weights in model.onnx.data."""
    _check_release()
    from transformers.exporters import OnnxConfig, OnnxExporter

    _export(model, tokenizer, folder, OnnxExporter(), OnnxConfig(dynamic=True))


def export_openvino(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Save a model in `folder` as openvino_model.xml, with its weights in openvino_model.bin."""
    _check_release()
    from transformers.exporters import OpenVINOConfig, OpenVINOExporter

    _export(model, tokenizer, folder, OpenVINOExporter(), OpenVINOConfig(dynamic=True))


def export_executorch(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Save a model in `folder` as model.pte for CPUs, with the weights in it."""
    _check_release()
    from transformers.exporters import ExecutorchConfig, ExecutorchExporter

    _export(model, tokenizer, folder, ExecutorchExporter(), ExecutorchConfig(dynamic=True))


def _check_release() -> None:
    """Check that transformers can save exported models.

    Raises:
        ImportError: it is too old.
    """
    hint = "Older releases cannot save exported models. Export to dense or gguf, or run: pip install"
    require_version(f"transformers>={SINCE}", f"{hint} 'transformers>={SINCE}'")


def _export(model: PreTrainedModel, tokenizer: Any, folder: Path, exporter: HfExporter, config: Any) -> None:
    """Export a model, save it in `folder`, and check that the saved program computes the same.

    Raises:
        UnsupportedModel: the exporter refuses the model, or the program differs from it.
    """
    name, empty = exporter.export_format, {}
    try:
        step, inputs = _captured_step(model)
        empty = _without_tokens(inputs)
        exported = exporter.export(step, inputs, config)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be exported to {name}: transformers' exporter failed ({reason}). Export it "
            "to dense, or report this with the versions of torch and transformers."
        ) from error
    exported.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    _check_program(folder, model, empty, name)


def _captured_step(model: PreTrainedModel) -> tuple[Any, dict[str, Any]]:
    """Return the model and its arguments in a step of two tokens after a prompt, for two sequences of unequal length.

    All of these sizes may differ later.
    """
    from transformers.exporters.utils import decompose_for_generation

    ids = torch.arange(2 * PROMPT).view(2, PROMPT) % model.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # otherwise the program would have no mask
    settings = GenerationConfig(do_sample=False, pad_token_id=0)
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    return decompose_for_generation(model, inputs, generation_config=settings, multi_token_decode=True)["decode"]
