"""The tokenizer and the token windows with which a model is calibrated."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from optimum_modegpt import demo
from optimum_modegpt.calibration.data import Part, TokenWindows, mix, read_parts, resolve_sequence_length
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import CalibrationDataError
from optimum_modegpt.evaluation.fidelity import tokenizer_differences
from optimum_modegpt.evaluation.perplexity import context_of
from optimum_modegpt.loading.source import DEMO, Source
from optimum_modegpt.mixture import mixture_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from optimum_modegpt.calibration.self_text import Script

logger = logging.getLogger(__name__)

SMALLEST_SHARE = 0.5
"""A tokenizer with fewer tokens than this fraction of the vocabulary probably belongs to another model."""


def find_tokenizer(config: ModeGPTConfig, given: Any, source: Source) -> tuple[Any, dict[str, Any]]:
    """Find the tokenizer to calibrate with: `given`, else the configuration's, else the model's own.

    Returns the tokenizer and its entries in the calibration record; None and no entries if the dataset is token ids and
    no tokenizer was chosen.

    Raises:
        CalibrationDataError: none can be loaded, or the chosen one differs from the model's own and the configuration
            does not allow that.
    """
    chosen = config.tokenizer if given is None else given
    if chosen is None:
        if all(_is_token_ids(part.source) for part in mixture_of(config.dataset)):
            return None, {}
        tokenizer = source.tokenizer()
        return tokenizer, _record(tokenizer, source.base_model)
    tokenizer = tokenizer_named(chosen, source) if isinstance(chosen, str) else chosen
    differences = check_tokenizer(tokenizer, source, allow_foreign=config.allow_foreign_tokenizer)
    if differences == []:
        return tokenizer, _record(tokenizer, source.base_model)
    record = _record(tokenizer, Source(tokenizer.name_or_path or None).base_model)
    if differences is not None:
        record["foreign_tokenizer"] = "; ".join(differences)
    return tokenizer, record


def check_tokenizer(tokenizer: Any, source: Source, *, allow_foreign: bool) -> list[str] | None:
    """Compare a tokenizer with the model's own; with `allow_foreign` a difference is a warning.

    Returns how they differ; None if the model has no readable tokenizer of its own.

    Raises:
        CalibrationDataError: the tokenizers differ, and `allow_foreign` is False.
    """
    try:
        own = source.tokenizer()
    except CalibrationDataError:
        if source.name is not None:
            logger.warning(
                "%r has no readable tokenizer of its own, so the chosen one was not compared with it.", source.name
            )
        return None
    differences = tokenizer_differences(own, tokenizer)
    if differences and not allow_foreign:
        raise CalibrationDataError(
            f"the chosen tokenizer is not that of {source.name!r}. It differs in: {'; '.join(differences)}. Omit "
            "tokenizer (--tokenizer) to use the model's own, or set allow_foreign_tokenizer=True "
            "(--allow-foreign-tokenizer) to use another one."
        )
    if differences:
        logger.warning("the tokenizer is not that of %r. It differs in: %s.", source.name, "; ".join(differences))
    return differences


def tokenizer_named(name: str, source: Source) -> Any:
    """Load the tokenizer of this name or folder with the access token and cache of a model's source.

    Raises:
        CalibrationDataError: it cannot be loaded.
    """
    hub = {key: source.hub[key] for key in ("token", "local_files_only", "cache_dir") if key in source.hub}
    return replace(source, name=name, hub=hub).tokenizer()


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Warn about a tokenizer with more tokens than the model's vocabulary, or with far fewer.

    More can be harmless, such as a padding token added later. Token ids outside the vocabulary are refused when the
    text is tokenized.
    """
    if tokenizer is not None and not SMALLEST_SHARE * vocab_size <= len(tokenizer) <= vocab_size:
        logger.warning(
            "the tokenizer has %d tokens and the model's vocabulary %d; check that it is the model's tokenizer.",
            len(tokenizer),
            vocab_size,
        )


@dataclass(frozen=True)
class Calibration:
    """The calibration text of a model, without the windows that the model itself has to write after it is loaded.

    Attributes:
        config: the configuration.
        tokenizer: the tokenizer of the text. It may be None for token ids.
        parts: the sources of the text.
        sequence_length: tokens per window.
        script: how the model writes its windows. None if it has none to write.
        record: entries of the tokenizer in the record.
    """

    config: ModeGPTConfig
    tokenizer: Any
    parts: list[Part]
    sequence_length: int
    script: Script | None
    record: dict[str, Any] = field(default_factory=dict)

    def windows(
        self, model: PreTrainedModel | None, *, device: torch.device | None = None, progress: bool = False
    ) -> TokenWindows:
        """Return the windows of all sources. `model` writes those of "self", on `device` if it fits there.

        Raises:
            CalibrationDataError: `model` is None and has windows to write, or the sources do not fit each other.
        """
        from optimum_modegpt.loading.self_text import self_windows  # slow, because it imports models

        parts = []
        for part in self.parts:
            if part.read is None and self.script is not None and model is not None:
                written = self_windows(
                    model,
                    self.tokenizer,
                    self.script,
                    windows=part.windows,
                    length=self.sequence_length,
                    seed=self.config.seed,
                    device=device,
                    progress=progress,
                )
                part = replace(part, read=written)
            parts.append(part)
        windows = mix(parts)
        return replace(windows, record={**windows.record, **self.record})


def calibrate(
    config: ModeGPTConfig, tokenizer: Any, model_config: Any, source: Source, *, fewer: bool = False
) -> Calibration:
    """Read the calibration text of a model before it is loaded; `fewer` is that of `read_parts`.

    Raises:
        CalibrationDataError, InvalidConfig: the data or the sequence length is invalid.
    """
    vocab_size, context = model_config.get_text_config().vocab_size, context_of(model_config)
    check_vocabulary(tokenizer, vocab_size)
    length = resolve_sequence_length(config.sequence_length, context)
    parts = read_parts(
        config,
        tokenizer,
        sequence_length=length,
        vocab_size=vocab_size,
        context=context,
        hub=source.dataset_arguments(),
        fewer=fewer,
        embedded={DEMO: str(demo.CALIBRATION_TEXT)},
    )
    script = None
    if any(part.read is None for part in parts):
        from optimum_modegpt.calibration.self_text import script_of  # slow, because it imports models

        script = script_of(tokenizer, length)
    return Calibration(config, tokenizer, parts, length, script)


def _is_token_ids(dataset: Any) -> bool:
    while isinstance(dataset, list | tuple) and dataset:
        dataset = dataset[0]
    if isinstance(dataset, Mapping):
        return "input_ids" in dataset
    return isinstance(dataset, int) or hasattr(dataset, "dtype")


def _record(tokenizer: Any, name: str | None) -> dict[str, Any]:
    """Describe a tokenizer for the calibration record: its name, and digests of its vocabulary and chat template."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), sort_keys=True)
    template = getattr(tokenizer, "chat_template", None)
    if template is not None and not isinstance(template, str):  # several templates by name
        template = json.dumps(template, sort_keys=True)
    return {
        "tokenizer": name,
        "vocabulary_sha256": _sha256(vocabulary),
        "chat_template_sha256": None if template is None else _sha256(template),
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
