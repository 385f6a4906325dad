"""Fine-tune a compressed model: train LoRA on its projections with transformers' Trainer, and merge it at the end."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from optimum_modegpt.calibration.data import TokenWindows, describe_degenerate
from optimum_modegpt.errors import CalibrationDataError, InvalidConfig, UnsupportedModel
from optimum_modegpt.evaluation.perplexity import check_windows, perplexity
from optimum_modegpt.layouts.records import is_result
from optimum_modegpt.recovery.config import RecoveryConfig
from optimum_modegpt.walk.request import Base

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recovery:
    """Result of a recovery. Perplexities are of the held-out windows."""

    perplexity_before: float
    perplexity_after: float
    """Perplexity of the merged model, in the dtype of its weights."""
    best_step: int
    """Step whose weights were kept. 0 if no step improved the model, which is then unchanged."""
    steps: int
    tokens: int
    """Tokens read in training, including repetitions."""
    trained_parameters: int
    """Number of parameters of the adapter before merging."""
    held_out_windows: int
    seconds: float

    @property
    def improved(self) -> bool:
        """Return whether the perplexity of the held-out windows decreased."""
        return self.perplexity_after < self.perplexity_before

    def summary(self) -> str:
        """Return two lines with the change of perplexity and the cost of the training."""
        kept = f"step {self.best_step} of {self.steps} kept" if self.best_step else f"none of {self.steps} steps kept"
        return (
            f"perplexity of {self.held_out_windows} held-out windows "
            f"{self.perplexity_before:.3f} -> {self.perplexity_after:.3f}, {kept}\n"
            f"{self.trained_parameters:,} weights trained on {self.tokens:,} tokens in {self.seconds:.0f} s"
        )


def recover(
    model: PreTrainedModel,
    windows: TokenWindows,
    *,
    teacher: PreTrainedModel | None = None,
    held_out: TokenWindows | None = None,
    config: RecoveryConfig | None = None,
    teacher_name: str | None = None,
    progress: bool = False,
) -> Recovery:
    """Fine-tune a compressed model in place on its device, and write a record `recovered` into its configuration.

    The model ends with the weights of the step with the lowest perplexity on held-out windows. If no step improves the
    model, or on an error, the model is unchanged.

    Args:
        model: a compressed causal language model, entirely on one device: the first one if there are several.
        windows: token ids (windows, length) with their record. Evaluate the model on other text.
        teacher: the dense model, on any device. With a teacher, the loss is KL(teacher ‖ model) of the next-token
            distributions instead of the cross-entropy with the text.
        held_out: the held-out windows, best of another kind of text. None holds out the last 5 % of `windows`.
        config: settings of the training. None means the defaults.
        teacher_name: name of the teacher for the record. None means the name in the teacher's configuration.
        progress: whether to show a progress bar.

    Raises:
        UnsupportedModel: the model is dense or quantised, has an adapter, or is on several devices.
        InvalidConfig: the teacher has a different vocabulary.
        CalibrationDataError: the windows are too few.
        EvaluationError: the windows do not fit the model, or training diverged.
        ImportError: peft is not installed. The message names the extra to install.
    """
    config = config or RecoveryConfig()
    _check_model(model)
    training, selecting = _split(windows) if held_out is None else (windows.tokens, held_out.tokens)
    if degenerate := describe_degenerate(windows):
        logger.warning(degenerate)
    check_windows(model, windows.tokens)
    check_windows(model, selecting)
    if teacher is not None:
        _check_teacher(model, teacher, windows)
        teacher_name = teacher_name or Base().completed(teacher).model
    train = _import_training()
    start = time.perf_counter()
    before = perplexity(model, selecting).perplexity
    best = train(model, teacher, training, selecting, before, config, progress)
    recovery = Recovery(
        perplexity_before=before,
        perplexity_after=perplexity(model, selecting).perplexity,
        best_step=best.step,
        steps=config.steps,
        tokens=best.tokens,
        trained_parameters=sum(map(Tensor.numel, best.adapter)),
        held_out_windows=len(selecting),
        seconds=time.perf_counter() - start,
    )
    if recovery.best_step:
        recovered = _record(model, windows, config, recovery) | {"held_out": (held_out or windows).record["name"]}
        recovered |= {"distilled": teacher is not None, "teacher": teacher_name}
        model.config.modegpt = {**model.config.modegpt, "recovered": recovered}
    return recovery


def _import_training() -> Any:
    """Import the training late: peft is optional, and the Trainer takes seconds to import."""
    try:
        from optimum_modegpt.recovery.training import train
    except ImportError as error:
        raise ImportError("recovery requires peft and accelerate: pip install 'optimum-modegpt[recover]'") from error
    return train


def _record(
    model: PreTrainedModel, windows: TokenWindows, config: RecoveryConfig, recovery: Recovery
) -> dict[str, Any]:
    """Describe text, settings and result for the model's configuration, safe for JSON."""
    record: dict[str, Any] = {"dataset": windows.record["name"]}
    for key in ("split", "revision", "sha256", "windows", "sequence_length"):
        record[key] = windows.record[key]
    return {
        **record,
        **asdict(config),
        "learning_rate": config.peak_learning_rate(model.config),
        "best_step": recovery.best_step,
        "tokens": recovery.tokens,
        "held_out_perplexity": [recovery.perplexity_before, recovery.perplexity_after],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "optimum-modegpt")},
    }


def check_compressed(model_config: Any) -> None:
    """Raise `UnsupportedModel` unless the configuration is of a model that was compressed by this package."""
    if not is_result(model_config) or not isinstance(getattr(model_config, "modegpt", None), dict):
        raise UnsupportedModel(
            f"expected a compressed model, found a dense one ({model_config.model_type}). Compress it first; you can "
            "pass this model as --teacher."
        )


def _check_model(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise UnsupportedModel(
            f"expected a compressed causal language model, found {type(model).__name__}. Merge or unload an adapter "
            "first; fine-tune a model with another head on its own task."
        )
    check_compressed(model.config)
    if getattr(model.config, "quantization_config", None) is not None:
        raise UnsupportedModel(
            "the model is quantised, and merging an adapter into quantised weights would lose accuracy. Recover the "
            "compressed model first, then quantise the result."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModel("the model has an adapter; merge or unload it first.")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or any(device.type == "meta" or device.index for device in devices):
        raise UnsupportedModel(
            f"the weights are on {', '.join(sorted(map(str, devices)))}; training needs all of them on one device, or "
            "on the first of several accelerators (CUDA_VISIBLE_DEVICES selects it). Load the model without device_map."
        )


def _check_teacher(model: PreTrainedModel, teacher: PreTrainedModel, windows: TokenWindows) -> None:
    ours, theirs = model.config.get_text_config().vocab_size, teacher.config.get_text_config().vocab_size
    if ours != theirs:
        raise InvalidConfig(
            f"the teacher predicts {theirs} tokens, the model {ours}; the vocabularies must be equal. "
            f"Use the model that it was compressed from: {model.config.modegpt.get('base_model')}."
        )
    check_windows(teacher, windows.tokens)


def _split(windows: TokenWindows) -> tuple[Tensor, Tensor]:
    """Return the windows to train on, and the held-out windows that select the best step: 5 %, at least two."""
    found = len(windows.tokens)
    held_out = max(2, math.ceil(0.05 * found))
    if found <= held_out:
        raise CalibrationDataError(
            f"{windows.record['name']}: {found} windows are too few: {held_out} are held out, and training needs at "
            "least one more. Provide more text, or lower sequence_length."
        )
    return windows.tokens[:-held_out], windows.tokens[-held_out:]
