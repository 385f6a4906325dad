"""Export a model to ONNX Runtime or OpenVINO by the exporters of transformers.

One program computes the prompt and every further token: its inputs are tokens, mask, positions and the key-value cache,
which is empty at first, and its outputs are the logits and the longer cache. So the weights are stored once. Keys and
values of every block have their own widths.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils.versions import require_version

from optimum_modegpt.errors import ModeGPTError, UnsupportedModel
from optimum_modegpt.kv_cache import cache_argument
from optimum_modegpt.walk.self_check import in_steps, relative_difference, tolerance_of

if TYPE_CHECKING:
    from transformers.exporters import HfExporter  # pyright: ignore[reportPrivateImportUsage]

SINCE = "5.23"
"""The first release of transformers that saves exported models."""
EXAMPLE = (2, 4)
"""The sequences, and the tokens of each, with which a model is traced. Programs take others."""
CHECKED = 12
"""Tokens that a saved program must answer as the model does."""


def export_onnx(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Save a model in `folder` as model.onnx, with its weights in model.onnx.data."""
    _check_release()
    from transformers.exporters import OnnxConfig, OnnxExporter  # pyright: ignore[reportPrivateImportUsage]

    _export(model, tokenizer, folder, OnnxExporter(), OnnxConfig(dynamic=True))


def export_openvino(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Save a model in `folder` as openvino_model.xml, with its weights in openvino_model.bin."""
    _check_release()
    from transformers.exporters import OpenVINOConfig, OpenVINOExporter  # pyright: ignore[reportPrivateImportUsage]

    _export(model, tokenizer, folder, OpenVINOExporter(), OpenVINOConfig(dynamic=True, stateful=False))


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
    with _refusing(model, f"the {config.export_format} exporter of transformers failed"):
        step, inputs = _captured_step(model)
        empty = _without_tokens(inputs[cache_argument(model)], model)
        exporter.export(step, inputs, config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    with _refusing(model, f"{config.export_format} cannot run the program"):
        found = _answers(folder, model, empty)
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


def _captured_step(model: PreTrainedModel) -> tuple[Any, dict[str, Any]]:
    """Return the model and its arguments in a step of two tokens after a prompt of `EXAMPLE`.

    A size of 1 becomes fixed; all others may differ later.
    """
    from transformers.exporters.utils import decompose_for_generation

    ids = torch.arange(math.prod(EXAMPLE)).view(EXAMPLE) % model.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # otherwise the program would have no mask
    settings = GenerationConfig(do_sample=False, pad_token_id=0)
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    return decompose_for_generation(model, inputs, generation_config=settings, multi_token_decode=True)["decode"]


def _without_tokens(cache: Any, model: PreTrainedModel) -> Any:
    """Return a copy of a cache for one sequence and without tokens, whose keys and values have their widths.

    Raises:
        UnsupportedModel: layers without softmax attention have a state, which is not empty before the first token.
    """
    empty = copy.deepcopy(cache)
    for index, layer in enumerate(empty.layers):
        if not isinstance(layer, DynamicLayer):
            raise UnsupportedModel(
                f"block {index} of {type(model).__name__} has a {type(layer).__name__} as its cache; expected keys and "
                "values of all tokens. Export the model to dense."
            )
        keys, values = layer.keys, layer.values
        assert keys is not None
        assert values is not None
        layer.keys, layer.values = keys[:1, :, :0].cpu(), values[:1, :, :0].cpu()
    return empty


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
