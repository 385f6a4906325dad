"""`ModeGPTQuantizer`: compression of a loaded model, with the interface of Optimum's quantizers."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from transformers import PreTrainedModel

from optimum_modegpt.architectures import check_dense
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.compress import compress
from optimum_modegpt.config import ModeGPTConfig, as_config
from optimum_modegpt.errors import InvalidConfig
from optimum_modegpt.hub.commands import compress_commands
from optimum_modegpt.hub.upload import KEPT_REPORT, Upload, save_result
from optimum_modegpt.loading.calibration import Calibration, calibrate, find_tokenizer
from optimum_modegpt.loading.source import Source
from optimum_modegpt.report import Report
from optimum_modegpt.walk.checkpoint import Checkpoint
from optimum_modegpt.walk.request import Base

logger = logging.getLogger(__name__)


class ModeGPTQuantizer:
    """A quantizer that compresses loaded models; `report` is the report of the last compression.

    Args:
        config: a `ModeGPTConfig` or a dict of its fields; None uses the defaults.
        fields: fields of `ModeGPTConfig`; they override those of `config`.
    """

    def __init__(self, config: ModeGPTConfig | Mapping[str, Any] | None = None, **fields: Any) -> None:
        self.config = as_config({} if config is None else config, **fields)
        self.report: Report | None = None
        self.tokenizer: Any = None
        self.processor_files: list[Path] = []

    def quantize_model(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        device: torch.device | None = None,
        checkpoint: Checkpoint | None = None,
        progress: bool = True,
        **hub: Any,
    ) -> PreTrainedModel:
        """Compress `model` in place and return it; on any error it is unchanged.

        Args:
            model: a dense causal language model, in memory.
            tokenizer: object or name; None uses the configuration's, else that of the model's name. One that differs
                from the model's own is refused, unless the configuration has `allow_foreign_tokenizer`.
            device: device on which blocks are computed, one at a time; None uses an accelerator if one is available.
            checkpoint: folder for finished blocks, from which an interrupted run is resumed. The result keeps its
                weights there: call `checkpoint.remove()` after the result is saved.
            progress: whether to show progress bars.
            hub: arguments of the `from_pretrained` that loaded the model (revision, token, cache_dir, subfolder, …),
                to load its tokenizer.

        Raises:
            ModeGPTError: the model cannot be compressed; the model is unchanged.
        """
        if not isinstance(model, PreTrainedModel):
            raise InvalidConfig(f"expected a loaded PreTrainedModel, found {type(model).__name__} {str(model)[:40]!r}.")
        source = Source.of_model(model, hub)
        windows = self.prepare(model.config, tokenizer, source).windows(model, device=device, progress=progress)
        self.compress_with(model, windows, device=device, source=source, checkpoint=checkpoint, progress=progress)
        return model

    compress_model = quantize_model

    def prepare(self, model_config: Any, tokenizer: Any, source: Source) -> Calibration:
        """Check the model type and read the calibration text, before the weights are loaded."""
        check_dense(model_config)
        has_tower = model_config.get_text_config() is not model_config
        self.processor_files = source.processor_files() if has_tower else []
        if has_tower and not self.processor_files:
            logger.warning(
                "no processor of images was found for %r, so none will be saved with the result. To use it with "
                "images, load the processor of the dense model.",
                source.base_model,
            )
        self.tokenizer, record = find_tokenizer(self.config, tokenizer, source)
        return replace(calibrate(self.config, self.tokenizer, model_config, source), record=record)

    def compress_with(
        self,
        model: PreTrainedModel,
        windows: TokenWindows,
        *,
        source: Source,
        device: torch.device | None = None,
        checkpoint: Checkpoint | None = None,
        progress: bool = True,
    ) -> Report:
        """Compress `model` in place with the windows of the calibration that `prepare` has read; see `compress`."""
        card = source.card()
        report = compress(
            model,
            self.config,
            windows,
            device=device,
            base=Base(source.base_model, source.revision),
            checkpoint=checkpoint,
            progress=progress,
        )
        commands = compress_commands(report, model.config.modegpt["dtype"])
        self.report = replace(report, commands=commands)
        model.config.modegpt["base_card"] = card
        vars(model)[KEPT_REPORT] = self.report
        return self.report

    def save(self, model: PreTrainedModel, save_dir: str | Path, tokenizer: Any = None) -> None:
        """Write weights, configuration, code files, tokenizer, `report.json` and the model card.

        For a model with a vision tower, also copy the files of its processor of images.

        Without `tokenizer`, the tokenizer of the calibration is saved, if any.
        """
        folder = Path(save_dir)
        tokenizer = tokenizer if tokenizer is not None else self.tokenizer
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        save_result(model, folder)
        for file in self.processor_files:
            shutil.copyfile(file, folder / file.name)

    def push_to_hub(
        self,
        model: PreTrainedModel,
        repo_id: str,
        tokenizer: Any = None,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
        commit_message: str | None = None,
    ) -> CommitInfo:
        """Save as `save` does into a temporary folder, upload that in one commit, and return the commit.

        The other arguments are those of `Upload`.

        Raises:
            OutputError: the upload cannot succeed; nothing was uploaded.
            UploadError: the upload failed; the message names the finished folder and how to resume.
        """
        upload = Upload(repo_id, private, revision, create_pr, token, commit_message)
        return upload.push_saved(lambda folder: self.save(model, folder, tokenizer))

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a dict, safe for JSON."""
        return self.config.to_dict()

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> ModeGPTQuantizer:
        """Create a quantizer from a dict; the inverse of `to_dict`."""
        return cls(config_dict)
