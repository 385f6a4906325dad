"""The training itself: peft's adapter, transformers' Trainer, and the two losses."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from optimum_modegpt.errors import EvaluationError
from optimum_modegpt.evaluation.fidelity import divergence
from optimum_modegpt.evaluation.perplexity import (
    CHUNK_BYTES,
    LOGITS_BYTES,
    logits_of,
    nats_of,
    perplexity,
    targets,
)
from optimum_modegpt.evaluation.randomness import kept_random_state
from optimum_modegpt.progress import bar
from optimum_modegpt.recovery.config import RecoveryConfig
from optimum_modegpt.report import count_parameters

LORA_ALPHA = 32
"""With the adapter's output scaled by alpha / rank, one learning rate fits all ranks."""
WARM_UP = 0.05
SCORINGS = 10
"""How often the held-out windows are scored."""
CHECKPOINTED_PARAMETERS = 500_000_000
"""Models with more do not keep their activations but compute them again, for a third more time."""


@dataclass(frozen=True)
class Trained:
    """What a training did."""

    best_step: int
    tokens: int
    parameters: int


def train(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    training: Tensor,
    held_out: Tensor,
    before: float,
    config: RecoveryConfig,
    progress: bool,
) -> Trained:
    """Trains `model` in place; on an error, and where no step gave a perplexity below `before`, it is as it was.

    Args:
        model: a compressed model.
        teacher: see `recover`.
        training: windows to learn from (windows, length).
        held_out: windows that choose the best step.
        before: perplexity of `model` on `held_out`.
        config: how.
        progress: whether to show a progress bar.
    """
    with kept_random_state(), _left_as_found(model, teacher), _no_half_precision_gradients(model):
        set_seed(config.seed)
        if teacher is not None:
            teacher.eval()
        adapted = _adapt(model, config)
        keeper = _BestStep(model, held_out, before, config.steps, progress)
        try:
            with _activations_computed_again(model):
                tokens = _fit(adapted, teacher, training, config, keeper)
            keeper.restore()
        except BaseException:
            adapted.unload()
            raise
        finally:
            keeper.bar.close()
        (adapted.merge_and_unload if keeper.step else adapted.unload)()
    return Trained(keeper.step, tokens, keeper.parameters)


def _adapt(model: PreTrainedModel, config: RecoveryConfig) -> PeftModel:
    """The model with an adapter that changes nothing yet, in float32, beside each projection of its blocks."""
    family: Any = model.config.family  # pyright: ignore[reportAttributeAccessIssue]
    projections = [projection.path for projection in family.projections]
    adapter = LoraConfig(r=config.lora_rank, lora_alpha=LORA_ALPHA, target_modules=projections)
    with warnings.catch_warnings():
        # peft asks under the name that transformers is about to drop.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted = get_peft_model(model, adapter)
    assert isinstance(adapted, PeftModel)
    return adapted


def _fit(
    adapted: PeftModel,
    teacher: PreTrainedModel | None,
    training: Tensor,
    config: RecoveryConfig,
    keeper: _BestStep,
) -> int:
    """Runs the Trainer; returns the number of tokens read."""
    together = _windows_together(keeper.model, training, config.batch_size)
    accelerator = torch.accelerator.current_accelerator()
    with tempfile.TemporaryDirectory() as folder:  # the Trainer wants one, though it saves nothing
        arguments = _OneDevice(
            output_dir=folder,
            max_steps=config.steps,
            per_device_train_batch_size=together,
            gradient_accumulation_steps=config.batch_size // together,
            learning_rate=config.peak_learning_rate(keeper.model.config),
            lr_scheduler_type="cosine",
            warmup_steps=WARM_UP,
            seed=config.seed,
            use_cpu=accelerator is None or keeper.model.device.type != accelerator.type,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            remove_unused_columns=False,
        )
        data: Any = [{"input_ids": window} for window in training]
        trainer = _RecoveryTrainer(teacher, model=adapted, args=arguments, train_dataset=data, callbacks=[keeper])
        # Both print the Trainer's own statistics to stdout.
        for chatty in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(chatty)
        trainer.train()
    return trainer.tokens


def _windows_together(model: PreTrainedModel, training: Tensor, batch_size: int) -> int:
    """The largest divisor of the batch size for which the logits in float32 stay below `LOGITS_BYTES`."""
    row = training.shape[1] * model.config.get_text_config().vocab_size * 4
    fitting = (size for size in range(batch_size, 0, -1) if batch_size % size == 0 and size * row <= LOGITS_BYTES)
    return next(fitting, 1)


class _OneDevice(TrainingArguments):
    """The Trainer would copy a model to all accelerators that it finds."""

    n_gpu = 1  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]


class _RecoveryTrainer(Trainer):
    """Next-token cross-entropy, or the divergence from a teacher; counts the tokens it reads."""

    def __init__(self, teacher: PreTrainedModel | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.teacher = teacher
        self.tokens = 0
        # The loss is a mean, which the Trainer is to divide by the number of batches that it accumulates.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of a batch of windows, in nats per predicted token."""
        batch = inputs["input_ids"]
        self.tokens += batch.numel()
        logits = logits_of(model, batch)  # pyright: ignore[reportArgumentType] - the model with its adapter
        if self.teacher is None:
            return mean_by_chunks(nats_of, targets(batch), logits)
        with torch.no_grad():
            expected = logits_of(self.teacher, batch.to(self.teacher.device)).to(logits.device)
        return mean_by_chunks(divergence, expected, logits)


def mean_by_chunks(reduce: Callable[..., Tensor], *columns: Tensor) -> Tensor:
    """The mean over all positions of what `reduce` gives for chunks of them, with gradients.

    Of the float32 logits and what becomes of them only one chunk exists at a time: it is computed again on the way
    back.
    """

    def summed(*chunk: Tensor) -> Tensor:
        return reduce(*chunk).sum()

    size = max(1, CHUNK_BYTES // (4 * columns[-1].shape[-1]))
    chunks = zip(*(column.split(size) for column in columns), strict=True)
    parts = [checkpoint(summed, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(parts).sum() / len(columns[-1])  # pyright: ignore[reportArgumentType]


class _BestStep(TrainerCallback):
    """Scores the held-out windows ten times in a training, and keeps the adapter that scored best."""

    def __init__(self, model: PreTrainedModel, held_out: Tensor, before: float, steps: int, progress: bool) -> None:
        self.model, self.held_out = model, held_out
        self.every = max(1, steps // SCORINGS)
        self.adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.parameters = sum(parameter.numel() for parameter in self.adapter)
        self.perplexity, self.step = before, 0
        self.best = self._weights()
        self.bar = bar(total=steps, desc="recover", unit="step", shown=progress)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Scores at every tenth of the steps, and at the last."""
        self.bar.update()
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        found = self._score(state.global_step)
        if found < self.perplexity:
            self.perplexity, self.step = found, state.global_step
            self.best = self._weights()
        self.bar.set_postfix(perplexity=f"{found:.3f}", best=f"{self.perplexity:.3f}")

    def _weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.adapter]

    def _score(self, step: int) -> float:
        try:
            return perplexity(self.model, self.held_out).perplexity
        except EvaluationError as error:
            raise EvaluationError(f"training diverged by step {step}: lower the learning rate. {error}") from error

    def restore(self) -> None:
        """Puts the best weights back into the adapter."""
        for parameter, value in zip(self.adapter, self.best, strict=True):
            parameter.data.copy_(value)


# ----------------------------------------------------------------------------------------------- what is put back


@contextmanager
def _left_as_found(*models: PreTrainedModel | None) -> Iterator[None]:
    """What peft and the Trainer change beside the weights (modes, frozen parameters, the cache) is put back."""
    present = [model for model in models if model is not None]
    modes = {module: module.training for model in present for module in model.modules()}
    trainable = {parameter: parameter.requires_grad for model in present for parameter in model.parameters()}
    caches = {model: model.config.use_cache for model in present}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, learns in trainable.items():
            parameter.requires_grad_(learns)
        for model in present:
            model.config.use_cache = caches[model]


@contextmanager
def _no_half_precision_gradients(model: PreTrainedModel) -> Iterator[None]:
    """A model in float16 is in float32 inside: its gradients would vanish below the smallest half-precision number.

    Only parameters are converted, for the rotary table stays in float32 always.
    """
    halves = [parameter for parameter in model.parameters() if parameter.dtype == torch.float16]
    for parameter in halves:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter in halves:
            parameter.data = parameter.data.half()


@contextmanager
def _activations_computed_again(model: PreTrainedModel) -> Iterator[None]:
    """Gradient checkpointing for large models; one that the caller has switched on stays."""
    is_on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if is_on or count_parameters(model) < CHECKPOINTED_PARAMETERS:
        yield
        return
    new_name = hasattr(model, "activation_checkpointing_enable")  # since transformers 5.21
    name = "activation_checkpointing" if new_name else "gradient_checkpointing"
    getattr(model, f"{name}_enable")()
    model.disable_input_require_grads()  # only the reentrant kind needs it
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()
