"""The hook in `from_pretrained`: registered as a quantizer, it compresses once and leaves no trace of itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import InvalidConfig

# This module is imported while transformers is, so what needs models is imported when it is called.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimum_modegpt.calibration.data import TokenWindows
    from optimum_modegpt.checkpoint import Checkpoint
    from optimum_modegpt.integration.source import Source

_CHECKPOINT: ContextVar[Checkpoint | None] = ContextVar("modegpt_checkpoint", default=None)


@contextmanager
def kept_in(checkpoint: Checkpoint | None) -> Iterator[None]:
    """What is compressed while it is loaded inside keeps its finished blocks there."""
    token = _CHECKPOINT.set(checkpoint)
    try:
        yield
    finally:
        _CHECKPOINT.reset(token)


class ModeGPTHfQuantizer(HfQuantizer):
    """Compresses a dense model right after its weights are loaded.

    What is saved later is an ordinary model: nothing is left that says it was ever quantised.
    """

    requires_calibration = False

    def __init__(self, quantization_config: ModeGPTConfig, **kwargs: Any) -> None:
        from optimum_modegpt.integration.quantizer import ModeGPTQuantizer

        super().__init__(quantization_config, **kwargs)
        self.quantizer = ModeGPTQuantizer(quantization_config)
        self.windows: TokenWindows | None = None

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The result is an ordinary model."""
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The result is an ordinary model."""
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses what would compress tensors that are not there.

        Raises:
            InvalidConfig: for weights on disk or on the meta device, for more than one device, and where the model's
                own files ask to be compressed.
        """
        if self.pre_quantized:
            raise InvalidConfig(
                "config.json of this model has a quantization_config that asks to be compressed, with a text and a "
                "recipe of its choice. Only the caller can ask: take it out, and pass compression_config."
            )
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else {str(device_map)}
        if places & {"disk", "meta"}:
            raise InvalidConfig(
                f"device_map puts weights on {', '.join(sorted(places & {'disk', 'meta'}))}, where they cannot be "
                "compressed. Leave device_map out: only one block at a time needs the accelerator. A model larger than "
                "memory: `optimum-cli modegpt compress MODEL --output DIR`, or ModeGPTModelForCausalLM with a "
                "checkpoint, leave weights in their files."
            )
        if len(places) > 1 or places & {"balanced", "balanced_low_0", "sequential"}:
            raise InvalidConfig(
                "device_map spreads the model over several devices, and the hooks that move its activations would be "
                "lost. Load it on one device or leave device_map out, save the result, and spread that."
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Refuse a model that cannot be compressed: transformers calls this before it downloads any weights.

        Raises:
            UnsupportedModel, AlreadyCompressed: by the `model_type` of the configuration.
        """
        from optimum_modegpt.architectures import check_model_type

        check_model_type(config.model_type)
        return config

    update_tp_plan = update_attn_implementation
    """transformers 5.16 calls this one at the same place."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        # transformers builds the model on the meta device, and that would hold for token ids too.
        with torch.device("cpu"):
            self.windows = self.quantizer.prepare(model.config, None, self._source(model))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from optimum_modegpt.integration.reading import check_loaded

        if self.windows is None:
            raise RuntimeError("the weights were loaded without the step that reads the calibration text.")
        self._check_placement(model)
        source = self._source(model)
        check_loaded(source, model)
        self._remove_traces(model)
        self.quantizer.compress_with(
            model,
            self.windows,
            source=source,
            checkpoint=_CHECKPOINT.get(),
            progress=logging.is_progress_bar_enabled(),
        )
        return model

    def _source(self, model: PreTrainedModel) -> Source:
        from optimum_modegpt.integration.source import Source, being_loaded

        return being_loaded() or Source.of_model(model)

    def _check_placement(self, model: PreTrainedModel) -> None:
        """device_map="auto" is resolved only while the weights are loaded, so it is checked once more."""
        placement = getattr(model, "hf_device_map", None)
        if placement:
            self.validate_environment(device_map=placement)

    def _remove_traces(self, model: PreTrainedModel) -> None:
        from transformers import PreTrainedModel

        self.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
