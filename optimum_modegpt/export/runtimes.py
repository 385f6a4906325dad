"""Export a model to ONNX Runtime, OpenVINO or ExecuTorch by the exporters of transformers.

One program computes the prompt and every further token, so the weights are stored once. Its inputs are tokens,
positions and the key-value cache, and its outputs are the logits and the next cache. Keys and values of every block
have their own widths. For ONNX Runtime and OpenVINO the cache grows with the text, and the mask is an input as well.
For ExecuTorch, which plans its memory before it runs, the cache has a fixed length.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.versions import require_version

from optimum_modegpt.errors import InvalidConfig, ModeGPTError, UnsupportedModel
from optimum_modegpt.evaluation.perplexity import context_of
from optimum_modegpt.export.steps import Step, fixed_step, growing_step
from optimum_modegpt.kv_cache import cache_argument
from optimum_modegpt.walk.self_check import in_steps, relative_difference, tolerance_of

if TYPE_CHECKING:
    from transformers.exporters import HfExporter  # pyright: ignore[reportPrivateImportUsage]

SINCE = "5.23"
"""The first release of transformers that saves exported models."""
CHECKED = 12
"""Tokens that a saved program must answer as the model does."""
CACHE_LENGTH = 2048
"""The default length of the cache of a program for ExecuTorch, in tokens."""
TOKENS_AT_ONCE = 128
"""The most tokens that a program for ExecuTorch takes at once. Its memory has room for the logits of all of them."""


def export_onnx(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Save a model in `folder` as model.onnx, with its weights in model.onnx.data."""
    _check_release()
    from transformers.exporters import OnnxConfig, OnnxExporter  # pyright: ignore[reportPrivateImportUsage]

    _export(model, tokenizer, folder, growing_step, OnnxExporter(), OnnxConfig())


def export_openvino(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Save a model in `folder` as openvino_model.xml, with its weights in openvino_model.bin."""
    _check_release()
    from transformers.exporters import OpenVINOConfig, OpenVINOExporter  # pyright: ignore[reportPrivateImportUsage]

    _export(model, tokenizer, folder, growing_step, OpenVINOExporter(), OpenVINOConfig(stateful=False))


def export_executorch(model: PreTrainedModel, tokenizer: Any, folder: Path, cache_length: int | None = None) -> None:
    """Save a model in `folder` as model.pte, for CPUs.

    Args:
        model: the model.
        tokenizer: its tokenizer, or None.
        folder: an empty folder.
        cache_length: the longest text of the program, in tokens; None takes `CACHE_LENGTH`, or the context of the model
            if that is shorter.

    Raises:
        InvalidConfig: `cache_length` is longer than the context of the model, or too short to check the program.
    """
    _check_release()
    context = context_of(model.config)
    length = cache_length or min(context or CACHE_LENGTH, CACHE_LENGTH)
    if length < CHECKED or (context is not None and length > context):
        most = "any length" if context is None else context
        raise InvalidConfig(f"found cache_length={length}; {type(model).__name__} allows {CHECKED} to {most}.")
    from transformers.exporters import ExecutorchConfig, ExecutorchExporter  # pyright: ignore[reportPrivateImportUsage]

    model = copy.deepcopy(model).cpu()  # the exporter changes the model
    config = ExecutorchConfig(prefer_deferred_runtime_asserts_over_guards=True)
    capture = partial(fixed_step, length=length, at_once=min(length, TOKENS_AT_ONCE))
    _export(model, tokenizer, folder, capture, ExecutorchExporter(), config)


def _check_release() -> None:
    """Check that transformers can save exported models.

    Raises:
        ImportError: it is too old.
    """
    hint = "Older releases cannot save exported models. Export to dense or gguf, or run: pip install"
    require_version(f"transformers>={SINCE}", f"{hint} 'transformers>={SINCE}'")


def _export(
    model: PreTrainedModel,
    tokenizer: Any,
    folder: Path,
    capture: Callable[[PreTrainedModel], Step],
    exporter: HfExporter,
    config: Any,
) -> None:
    """Export a model, save it in `folder`, and check that the saved program computes the same.

    Raises:
        UnsupportedModel: the exporter refuses the model, or the program differs from it.
    """
    with _refusing(model, f"the {config.export_format} exporter of transformers failed"):
        step = capture(model)
        config.dynamic, config.dynamic_shapes = step.shapes is None, step.shapes
        exporter.export(step.module, step.inputs, config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    with _refusing(model, f"{config.export_format} cannot run the program"):
        found = _answers(folder, model, step.empty)
    difference, tolerance = relative_difference(found, _expected(model)), tolerance_of(model.dtype)
    if not difference <= tolerance:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be exported to {config.export_format}: the logits of the program differ by "
            f"{difference:.1e} (relative), allowed are {tolerance:.1e}. Export it to dense, or in float32."
        )


@contextmanager
def _refusing(model: PreTrainedModel, reason: str) -> Iterator[None]:
    """Report an error of an exporter or a runtime, which are of many kinds, as a refusal of the model."""
    try:
        yield
    except (ModeGPTError, OSError, ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        message = str(error.__cause__ or error).strip() or type(error).__name__
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be exported: {reason} ({message.splitlines()[0]}). Export it to dense, or "
            "in float32. --debug shows the whole error."
        ) from error


def _tokens(model: PreTrainedModel) -> Tensor:
    """Return the token ids (1, length) on which a program is checked."""
    last = model.config.get_text_config().vocab_size - 1
    return torch.linspace(0, last, CHECKED).long()[None]


@torch.no_grad()
def _expected(model: PreTrainedModel) -> Tensor:
    return model(input_ids=_tokens(model).to(model.device), use_cache=False).logits.cpu()


def _answers(folder: Path, model: PreTrainedModel, empty: Any) -> Tensor:
    """Return the logits of a saved program for a prompt and further tokens, one by one."""
    from transformers.exporters import ExportedModel  # pyright: ignore[reportPrivateImportUsage]

    program, name, seen = ExportedModel.from_pretrained(folder, device="cpu"), cache_argument(model), 0
    (component,) = program.components.values()

    def run(part: Tensor, **arguments: Any) -> Any:
        nonlocal seen
        start, seen = seen, seen + part.shape[1]
        given = {
            "input_ids": part,
            "attention_mask": torch.ones(1, seen, dtype=torch.long),
            "position_ids": torch.arange(start, seen)[None],
            name: arguments.get(name, empty),
        }
        return program(**{key: value for key, value in given.items() if key in component.metadata.kwargs})

    return torch.cat([output.logits for output in in_steps(run, _tokens(model), name)], dim=1)
