"""Run the training with peft's adapter, transformers' Trainer and one of two losses."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from optimum_modegpt.architectures import family_of
from optimum_modegpt.errors import EvaluationError
from optimum_modegpt.evaluation.fidelity import divergence
from optimum_modegpt.evaluation.perplexity import LOGITS_BYTES, chunks_of, logits_of, nats_of, perplexity, targets
from optimum_modegpt.evaluation.randomness import kept_random_state
from optimum_modegpt.progress import bar
from optimum_modegpt.recovery.config import RecoveryConfig
from optimum_modegpt.report import count_parameters

LORA_ALPHA = 32
"""The adapter's output is scaled by alpha / rank, so one learning rate suits all ranks."""
SCORINGS = 10
"""Number of times that the held-out windows are scored."""
CHECKPOINTED_PARAMETERS = 500_000_000
"""Number of parameters from which activations are recomputed instead of kept, which takes a third more time."""


def train(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    training: Tensor,
    held_out: Tensor,
    before: float,
    config: RecoveryConfig,
    progress: bool,
) -> BestStep:
    """Train `model` in place on windows (windows, length), and return the best step.

    On an error, or if no step gives a perplexity of `held_out` below `before`, the model is unchanged.
    """
    with kept_random_state(), _restored(model, teacher):
        set_seed(config.seed)
        adapted = _adapt(model, config)
        best = BestStep(model, held_out, before)
        try:
            with (
                bar(total=config.steps, desc="recover", unit="step", shown=progress) as best.bar,
                _activations_recomputed(model),
            ):
                _fit(adapted, teacher, training, config, best)
            best.restore()
            if best.step:
                adapted.merge_and_unload()
        finally:
            adapted.unload()
    return best


def _adapt(model: PreTrainedModel, config: RecoveryConfig) -> PeftModel:
    """Add an adapter in float32 to each projection of the model's blocks. Initially, it does not change the output."""
    classes = family_of(model.config.model_type)  # of a stock class
    if classes is None:
        family: Any = model.config.family  # pyright: ignore[reportAttributeAccessIssue]
        projections = [projection.path for projection in family.projections]
    else:
        projections = sorted({projection.dense_path for projection in classes.family.projections})
    adapted = get_peft_model(model, LoraConfig(r=config.lora_rank, lora_alpha=LORA_ALPHA, target_modules=projections))
    assert isinstance(adapted, PeftModel)
    return adapted


def _fit(
    adapted: PeftModel, teacher: PreTrainedModel | None, training: Tensor, config: RecoveryConfig, best: BestStep
) -> None:
    """Run the Trainer."""
    model = best.model
    together, row = config.batch_size, training.shape[1] * model.config.get_text_config().vocab_size * 4
    while together > 1 and (config.batch_size % together or together * row > LOGITS_BYTES):
        together -= 1  # to a divisor of the batch size for which the logits in float32 fit
    accelerator = torch.accelerator.current_accelerator()
    with tempfile.TemporaryDirectory() as folder:  # the Trainer requires a folder, although it saves nothing
        arguments = _OneDevice(
            output_dir=folder,
            max_steps=config.steps,
            per_device_train_batch_size=together,
            gradient_accumulation_steps=config.batch_size // together,
            learning_rate=config.peak_learning_rate(model.config),
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            seed=config.seed,
            use_cpu=accelerator is None or model.device.type != accelerator.type,
            use_cache=model.config.use_cache,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        data: Any = [{"input_ids": window} for window in training]
        trainer = _RecoveryTrainer(teacher, model=adapted, args=arguments, train_dataset=data, callbacks=[best])
        trainer.remove_callback(PrinterCallback)  # prints the Trainer's own statistics to stdout
        trainer.train()
    best.tokens = trainer.tokens


class _OneDevice(TrainingArguments):
    """Training arguments for one device. By default, the Trainer copies a model to all accelerators."""

    n_gpu = 1  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]


class _RecoveryTrainer(Trainer):
    """Trainer with next-token cross-entropy or the divergence from a teacher as loss. It counts the tokens read."""

    def __init__(self, teacher: PreTrainedModel | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.teacher = teacher
        self.tokens = 0
        # The loss is a mean, so the Trainer must divide it by the number of accumulated batches.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the mean loss of a batch of windows, in nats per predicted token."""
        batch = inputs["input_ids"]
        self.tokens += batch.numel()
        logits = logits_of(model, batch)  # pyright: ignore[reportArgumentType] - the model with its adapter
        if self.teacher is None:
            return mean_by_chunks(nats_of, targets(batch), logits)
        with torch.no_grad():
            expected = logits_of(self.teacher, batch.to(self.teacher.device)).to(logits.device)
        return mean_by_chunks(divergence, expected, logits)


def mean_by_chunks(reduce: Callable[..., Tensor], *columns: Tensor) -> Tensor:
    """Compute the mean of `reduce` over all positions, with gradients.

    Chunks of the positions are computed one by one, and again in the backward pass, so that only one chunk of the
    float32 logits exists at a time.
    """

    def summed(*chunk: Tensor) -> Tensor:
        return reduce(*chunk).sum()

    parts = []
    for chunk in chunks_of(*columns):
        parts.append(checkpoint(summed, *chunk, use_reentrant=False, preserve_rng_state=False))
    return torch.stack(parts).sum() / len(columns[-1])  # pyright: ignore[reportArgumentType]


class BestStep(TrainerCallback):
    """Scores the held-out windows ten times during training, and keeps the best adapter."""

    bar: Any
    """Progress bar of the steps."""
    tokens: int
    """Tokens read in training."""

    def __init__(self, model: PreTrainedModel, held_out: Tensor, before: float) -> None:
        self.model, self.held_out = model, held_out
        self.adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.perplexity, self.step = before, 0
        self.weights = self._copy()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Score the adapter after every tenth of the steps and after the last step."""
        self.bar.update()
        step = state.global_step
        if step % max(1, state.max_steps // SCORINGS) and step != state.max_steps:
            return
        try:
            found = perplexity(self.model, self.held_out).perplexity
        except EvaluationError as error:
            raise EvaluationError(f"training diverged by step {step}: lower the learning rate. {error}") from error
        if found < self.perplexity:
            self.perplexity, self.step, self.weights = found, step, self._copy()
        self.bar.set_postfix(perplexity=f"{found:.3f}", best=f"{self.perplexity:.3f}", refresh=False)

    def _copy(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.adapter]

    def restore(self) -> None:
        """Restore the best weights of the adapter."""
        for parameter, value in zip(self.adapter, self.weights, strict=True):
            parameter.data.copy_(value)


@contextmanager
def _restored(model: PreTrainedModel, teacher: PreTrainedModel | None) -> Iterator[None]:
    """Restore on exit everything but the weights that peft and the Trainer change, and the teacher's mode.

    Within the context, the teacher is in evaluation mode. Parameters in float16 are in float32, because their gradients
    would underflow. Buffers stay, because the rotary table is always in float32.
    """
    modes, trainable, halves = {model: model.training}, {}, []
    if teacher is not None:
        modes[teacher] = teacher.training
        teacher.eval()
    for parameter in model.parameters():
        trainable[parameter] = parameter.requires_grad
        if parameter.dtype == torch.float16:
            halves.append(parameter)
    try:
        for parameter in halves:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter in halves:
            parameter.data = parameter.data.half()
        for parameter, learns in trainable.items():
            parameter.requires_grad_(learns)
        for each, training in modes.items():
            each.train(training)


@contextmanager
def _activations_recomputed(model: PreTrainedModel) -> Iterator[None]:
    """Recompute the activations of large models within the context, unless the caller has enabled that."""
    if model.is_gradient_checkpointing or count_parameters(model) < CHECKPOINTED_PARAMETERS:
        yield
        return
    name = "gradient_checkpointing"
    if hasattr(model, "activation_checkpointing_enable"):
        name = "activation_checkpointing"  # since transformers 5.21
    getattr(model, f"{name}_enable")()
    model.disable_input_require_grads()  # only reentrant checkpointing needs it
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()
