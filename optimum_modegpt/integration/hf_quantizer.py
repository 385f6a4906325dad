"""The hook in `from_pretrained`: a quantizer that compresses a model once and then removes its own configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import InvalidConfig
from optimum_modegpt.integration.job import Job, running_job

# transformers imports this module during its own import, so modules that need models are imported in functions.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimum_modegpt.loading.calibration import Calibration


class ModeGPTHfQuantizer(HfQuantizer):
    """A quantizer that compresses a dense model right after its weights are loaded.

    The result is saved as an ordinary model: it has no quantization configuration.
    """

    requires_calibration = False

    def __init__(self, quantization_config: ModeGPTConfig, **kwargs: Any) -> None:
        from optimum_modegpt.integration.quantizer import ModeGPTQuantizer

        super().__init__(quantization_config, **kwargs)
        self.quantizer = ModeGPTQuantizer(quantization_config)
        self.job: Job | None = None
        self.calibration: Calibration | None = None

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return True: the result is an ordinary model."""
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return True: the result is an ordinary model."""
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise an error if the weights will not be in the memory of one device, or if the caller did not ask for this.

        Raises:
            InvalidConfig: weights go to disk or to the meta device, or to more than one device, or the compression is
                requested by the model's own config.json.
        """
        if self.pre_quantized:
            raise InvalidConfig(
                "config.json of this model has a quantization_config that requests a compression, with its own dataset "
                "and settings. Only the caller can request one: remove it, and pass compression_config."
            )
        devices = {str(device_map)}
        if isinstance(device_map, dict):
            devices = set(map(str, device_map.values()))
        if absent := sorted(devices & {"disk", "meta"}):
            raise InvalidConfig(
                f"device_map puts weights on {', '.join(absent)}, and they cannot be compressed there. Omit "
                "device_map: only one block at a time needs the accelerator. For a model larger than memory, use "
                "`optimum-cli modegpt compress MODEL --output DIR`, or ModeGPTModelForCausalLM with a checkpoint: they "
                "leave weights in their files."
            )
        if len(devices) > 1 or devices & {"balanced", "balanced_low_0", "sequential"}:
            raise InvalidConfig(
                "device_map dispatches the model across several devices, and a compression would lose the hooks that "
                "move its activations. Load it on one device or omit device_map, save the result, and dispatch that."
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Raise an error for a model that cannot be compressed; transformers calls this before it downloads weights.

        Raises:
            UnsupportedModel, AlreadyCompressed: the `model_type` of the configuration is unknown or compressed.
        """
        from optimum_modegpt.architectures import check_dense

        check_dense(config)
        return config

    update_tp_plan = update_attn_implementation
    """The method that transformers 5.16 calls at this point instead."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from optimum_modegpt.budget.size_target import check_sizes
        from optimum_modegpt.loading.source import Source

        check_sizes(model, self.quantizer.config)
        # Without the patched keyword, only the name in the configuration is known.
        self.job = running_job() or Job(self.quantizer.config, Source.of_model(model))
        # transformers builds the model on the meta device; without this, token ids would be made there too.
        with torch.device("cpu"):
            self.calibration = self.quantizer.prepare(model.config, None, self.job.source)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from optimum_modegpt.loading.models import check_loaded

        assert self.job is not None
        assert self.calibration is not None
        if placement := getattr(model, "hf_device_map", None):
            self.validate_environment(device_map=placement)  # "auto" is resolved only while the weights are loaded
        check_loaded(self.job.source, model)
        self._remove_traces(model)
        progress = logging.is_progress_bar_enabled()
        windows = self.calibration.windows(model, progress=progress)
        self.quantizer.compress_with(
            model, windows, source=self.job.source, checkpoint=self.job.checkpoint, progress=progress
        )
        return model

    def _remove_traces(self, model: PreTrainedModel) -> None:
        from transformers import PreTrainedModel

        self.remove_quantization_config(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
