"""`ModeGPTQuantizer`: compression of a model that is loaded already, with the face of Optimum's quantizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from transformers import PreTrainedModel

from optimum_modegpt.architectures import check_model_type
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.checkpoint import Checkpoint
from optimum_modegpt.compress import compress
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import InvalidConfig
from optimum_modegpt.integration.hub import KEPT_REPORT, Upload
from optimum_modegpt.integration.source import Source, calibrate, find_tokenizer
from optimum_modegpt.report import Report
from optimum_modegpt.walk.state import Base


class ModeGPTQuantizer:
    """Compresses loaded models; `report` says what the last compression did.

    Args:
        config: a `ModeGPTConfig` or a dict of its fields; without one, the fields can be given by name.
        fields: fields of `ModeGPTConfig`; they replace those of `config`.
    """

    def __init__(self, config: ModeGPTConfig | Mapping[str, Any] | None = None, **fields: Any) -> None:
        self.config = as_config({} if config is None else config, **fields)
        self.report: Report | None = None
        self.tokenizer: Any = None

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
        """Compresses `model` in place and returns it; on any error it is left as it was.

        Args:
            model: a dense causal language model, in memory.
            tokenizer: object or name; None takes the configuration's, else that of the model's name. One that differs
                from the model's own is refused, unless the configuration has `allow_foreign_tokenizer`.
            device: where to compute, one block at a time; None takes the accelerator where there is one.
            checkpoint: where finished blocks are written, and taken over from a run that was interrupted. The result
                keeps its weights there: `checkpoint.remove()` when it is saved.
            progress: whether to show progress bars.
            hub: arguments of the `from_pretrained` that loaded the model (revision, token, cache_dir, subfolder, …);
                its tokenizer is read with the same.

        Raises:
            ModeGPTError: what cannot be done, before the model is touched.
        """
        if not isinstance(model, PreTrainedModel):
            raise InvalidConfig(
                f"expected a PreTrainedModel, loaded, found {type(model).__name__} {str(model)[:40]!r}."
            )
        source = Source.of_model(model, hub)
        windows = self.prepare(model.config, tokenizer, source)
        self.compress_with(model, windows, device=device, source=source, checkpoint=checkpoint, progress=progress)
        return model

    compress_model = quantize_model

    def prepare(self, model_config: Any, tokenizer: Any, source: Source) -> TokenWindows:
        """Everything that can fail before the weights are there: is the model known, is there enough text?"""
        check_model_type(model_config.model_type)
        self.tokenizer, record = find_tokenizer(self.config, tokenizer, source)
        windows = calibrate(self.config, self.tokenizer, model_config, source)
        return replace(windows, record={**windows.record, **record})

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
        """Compresses `model` in place with calibration windows that `prepare` has read; see `compress`."""
        card = source.card()
        self.report = compress(
            model,
            self.config,
            windows,
            device=device,
            base=Base(source.base_model, source.revision),
            checkpoint=checkpoint,
            progress=progress,
        )
        model.config.modegpt["base_card"] = card
        vars(model)[KEPT_REPORT] = self.report
        return self.report

    def save(self, model: PreTrainedModel, save_dir: str | Path, tokenizer: Any = None) -> None:
        """Writes weights, configuration, code files, tokenizer, `report.json` and the model card.

        Without `tokenizer` the one that the calibration used is saved, where it used one.
        """
        folder = Path(save_dir)
        tokenizer = tokenizer if tokenizer is not None else self.tokenizer
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)

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
        """Saves as `save` does, in a temporary folder, and uploads it in one commit, which it returns.

        Args:
            model: what was compressed.
            repo_id: "user/name"; created where it does not exist.
            tokenizer: as in `save`.
            private: whether a repository that is created is private; None takes the account's default.
            revision: branch to commit to, created where it does not exist, or a pull request such as "refs/pr/1".
            create_pr: whether to open a pull request instead.
            token: access token; None takes the one that is logged in.
            commit_message: one line; chosen where it is None.

        Raises:
            OutputError: the upload cannot work, and nothing was done.
            UploadError: it failed; the message says where the finished folder is and how to go on.
        """
        upload = Upload(repo_id, private, revision, create_pr, token, commit_message)
        return upload.push_saved(lambda folder: self.save(model, folder, tokenizer))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dict, safe for JSON."""
        return self.config.to_dict()

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> ModeGPTQuantizer:
        """The inverse of `to_dict`."""
        return cls(config_dict)


def as_config(config: Any, **fields: Any) -> ModeGPTConfig:
    """A `ModeGPTConfig` from one, or from a dict with or without `quant_method`; `fields` replace its own.

    Raises:
        InvalidConfig: for anything else, and for unknown fields.
    """
    if isinstance(config, ModeGPTConfig):
        own = {name: getattr(config, name) for name in ModeGPTConfig.__dataclass_fields__}
        return ModeGPTConfig.from_dict({**own, **fields}) if fields else config
    if isinstance(config, Mapping):
        return ModeGPTConfig.from_dict({**config, **fields})
    raise InvalidConfig(f"expected a ModeGPTConfig or a dict of its fields, found {type(config).__name__}.")
