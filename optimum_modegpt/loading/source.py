"""The source of a model: its name or folder and Hub arguments, with which its tokenizer and data are read too."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from huggingface_hub import constants, hf_hub_download, hf_hub_url, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import extract_commit_hash
from yaml import YAMLError

from optimum_modegpt import demo
from optimum_modegpt.calibration.data import TokenWindows, calibration_windows, resolve_sequence_length
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import CalibrationDataError, InvalidConfig
from optimum_modegpt.evaluation.fidelity import tokenizer_differences

logger = logging.getLogger(__name__)

DEMO = "demo"
"""The name of the embedded model, and of the dataset of its text."""
SMALLEST_SHARE = 0.5
"""A tokenizer with fewer tokens than this fraction of the vocabulary probably belongs to another model."""
CARD = "README.md"
CARD_FIELDS = ("license", "license_name", "license_link", "language")
"""The fields of a card that apply to the compressed model too."""
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


@dataclass(frozen=True)
class Source:
    """A model's name or folder, and the arguments with which its caller reads the Hub."""

    name: str | None
    hub: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool | None = None

    @classmethod
    def of_arguments(cls, name: Any, arguments: Mapping[str, Any]) -> Source:
        """Create the source that the arguments of a `from_pretrained` name."""
        hub = {key: arguments[key] for key in HUB_ARGUMENTS if arguments.get(key) is not None}
        return cls(None if name is None else str(name), hub, arguments.get("trust_remote_code"))

    @classmethod
    def of_model(cls, model: Any, hub: Mapping[str, Any] | None = None) -> Source:
        """Create the source of a loaded model from the name in its configuration, to be read with `hub`.

        Raises:
            InvalidConfig: `hub` has an unknown argument.
        """
        hub = hub or {}
        known = {*HUB_ARGUMENTS, "trust_remote_code"}
        if strange := sorted(hub.keys() - known):
            raise InvalidConfig(f"unknown argument {strange[0]!r}; expected one of {', '.join(sorted(known))}.")
        return cls.of_arguments(model.config._name_or_path or None, hub)

    @property
    def is_demo(self) -> bool:
        """Return whether this is the embedded model."""
        return self.name in (DEMO, str(demo.MODEL_DIR))

    @property
    def path(self) -> str:
        """Return the name or folder to pass to a `from_pretrained`.

        Raises:
            CalibrationDataError: the model's configuration has no name.
        """
        if self.name is None:
            raise CalibrationDataError(
                "the model's configuration names no source, so its tokenizer cannot be found; pass a tokenizer."
            )
        return str(demo.MODEL_DIR) if self.is_demo else self.name

    @property
    def _is_folder(self) -> bool:
        """Return whether the path is a folder; a missing path counts as one if no repository can have its name."""
        return Path(self.path).is_dir() or not is_repo_id(self.path)

    def check_path(self) -> None:
        """Raise an error if the path cannot be that of a model.

        Raises:
            OSError: the path is a file, or does not exist and cannot be a name on the Hub.
        """
        place = Path(self.path)
        if place.is_file():
            raise OSError(f"{self.name!r} is a file; expected a model folder, perhaps {str(place.parent)!r}.")
        if self._is_folder and not place.is_dir():
            raise OSError(
                f"{self.name!r} does not exist, and no model on the Hub can have this name. Expected a folder with "
                "config.json and weights, or a name such as user/model."
            )

    @property
    def base_model(self) -> str | None:
        """Return the name to store in the record of a compressed model; for a local folder only its last part."""
        if self.is_demo:
            return DEMO
        if self.name is None or not self._is_folder:
            return self.name
        last = Path(self.name).resolve().name
        return last if last != DEMO else f"./{last}"

    @property
    def revision(self) -> str | None:
        """Return the commit that was read if it is known, else the requested branch or tag."""
        revision = self.hub.get("revision")
        if self.name is None or self._is_folder:
            return revision
        config = "/".join(filter(None, (self.hub.get("subfolder"), CONFIG_NAME)))
        cached = try_to_load_from_cache(self.path, config, cache_dir=self.hub.get("cache_dir"), revision=revision)
        known = extract_commit_hash(cached if isinstance(cached, str) else None, None)
        return known or revision

    def cache_report(self) -> str:
        """Return which revisions of a model on the Hub are cached, and how to read others; "" for a folder."""
        if self._is_folder:
            return ""
        cache = Path(self.hub.get("cache_dir") or constants.HF_HUB_CACHE)
        if constants.is_offline_mode():
            advice = "HF_HUB_OFFLINE is set, so nothing is downloaded. Unset it, or set HF_HOME to another cache."
        elif not _can_be_written(cache):
            advice = "The cache is not writable. Set HF_HOME to a writable folder."
        else:
            advice = "To read only from the cache, set HF_HUB_OFFLINE=1; HF_HOME sets the folder of the cache."
        cached = _cached_revisions(cache / repo_folder_name(repo_id=self.path, repo_type="model"))
        return (
            f"\nRequested revision: {self.hub.get('revision') or constants.DEFAULT_REVISION}. In the cache {cache}: "
            f"{', '.join(cached) or 'no revision of this model'}.\n{advice}"
        )

    def card(self) -> dict[str, Any]:
        """Return the licence and language that the model's card states.

        A missing or unreadable card is no error: the licence and language are then unknown.
        """
        if self.name is None:
            return {}
        try:
            found = metadata_load(self._card_file()) or {}
        except (FileNotFoundError, EntryNotFoundError):
            logger.info("%r has no model card, so its licence is unknown.", self.base_model)
            return {}
        except (OSError, ValueError, YAMLError) as error:
            logger.warning("the model card of %r cannot be read, so its licence is unknown: %s", self.base_model, error)
            return {}
        card = {key: found[key] for key in CARD_FIELDS if _is_text(found.get(key))}
        if (link := card.pop("license_link", None)) and (link := self._absolute(link)):
            card["license_link"] = link
        return card

    def _card_file(self) -> Path:
        """Return the card's file, downloaded if necessary; it is at the top level even for a model in a subfolder."""
        if self._is_folder:
            return Path(self.path) / CARD
        hub = {key: value for key, value in self.hub.items() if key != "subfolder"}
        return Path(hf_hub_download(self.path, CARD, **hub))

    def _absolute(self, link: str) -> str | None:
        """Return a link of the card as an absolute one; None if it points into a local folder."""
        if urlparse(link).scheme in ("http", "https"):
            return link
        return None if self._is_folder else hf_hub_url(self.path, link, revision=self.hub.get("revision"))

    def arguments(self) -> dict[str, Any]:
        """Return keyword arguments for a `from_pretrained` that reads from the same source."""
        trust = {} if self.trust_remote_code is None else {"trust_remote_code": self.trust_remote_code}
        return {**self.hub, **trust}

    def tokenizer(self) -> Any:
        """Load the tokenizer of the model.

        Raises:
            CalibrationDataError: the model has no tokenizer, or it cannot be loaded.
        """
        try:
            self.check_path()
            return AutoTokenizer.from_pretrained(self.path, **self.arguments())
        except (OSError, ValueError) as error:
            raise CalibrationDataError(
                f"no tokenizer could be loaded from {self.name!r}: {error} "
                "Pass a tokenizer, on the command line with --tokenizer."
            ) from error


def is_repo_id(name: str) -> bool:
    """Return whether a repository on the Hub can have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _cached_revisions(folder: Path) -> list[str]:
    """List the revisions in a repository's cache folder: branches and tags with commits, then other commits."""
    refs = folder / "refs"
    named = {
        path.relative_to(refs).as_posix(): path.read_text(encoding="utf-8")
        for path in refs.rglob("*")
        if path.is_file()
    }
    snapshots = {path.name for path in folder.glob("snapshots/*")}
    names = [f"{name} ({commit[:7]})" for name, commit in sorted(named.items()) if commit in snapshots]
    return [*names, *sorted(snapshots - set(named.values()))]


def _can_be_written(folder: Path) -> bool:
    """Return whether a folder is writable, or can be created if it does not exist."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return existing.is_dir() and os.access(existing, os.W_OK)


def _is_text(value: Any) -> bool:
    """Return whether a field of a card is a string or a list of strings; YAML reads `no` as False, for example."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(each, str) and each for each in values)


_LOADING: ContextVar[Source | None] = ContextVar("modegpt_source", default=None)


@contextmanager
def loading(source: Source) -> Iterator[None]:
    """Pass the source to the quantizer hook while a `from_pretrained` runs inside the context."""
    token = _LOADING.set(source)
    try:
        yield
    finally:
        _LOADING.reset(token)


def being_loaded() -> Source | None:
    """Return the source of the running `from_pretrained`; None outside of one, or without our wrapper."""
    return _LOADING.get()


def find_tokenizer(config: ModeGPTConfig, given: Any, source: Source) -> tuple[Any, dict[str, Any]]:
    """Find the tokenizer to calibrate with: `given`, else the configuration's, else the model's own.

    Returns the tokenizer and its entries in the calibration record; None and no entries if the dataset is token ids and
    no tokenizer was chosen.

    Raises:
        CalibrationDataError: none can be loaded, or the chosen one differs from the model's own and the configuration
            does not allow that.
    """
    chosen = given if given is not None else config.tokenizer
    if chosen is None:
        tokenizer = source.tokenizer() if _needs_tokenizer(config.dataset) else None
        return tokenizer, {} if tokenizer is None else tokenizer_record(tokenizer, source.base_model)
    tokenizer = tokenizer_named(chosen, source) if isinstance(chosen, str) else chosen
    differences = check_tokenizer(tokenizer, source, allow_foreign=config.allow_foreign_tokenizer)
    if differences == []:
        return tokenizer, tokenizer_record(tokenizer, source.base_model)
    name = Source(tokenizer.name_or_path or None).base_model
    foreign = {} if differences is None else {"foreign_tokenizer": "; ".join(differences)}
    return tokenizer, tokenizer_record(tokenizer, name) | foreign


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


def tokenizer_record(tokenizer: Any, name: str | None) -> dict[str, Any]:
    """Describe a tokenizer for the calibration record: its name, and digests of its vocabulary and chat template."""
    template = getattr(tokenizer, "chat_template", None)
    return {
        "tokenizer": name,
        "vocabulary_sha256": _sha256(sorted(tokenizer.get_vocab().items())),
        "chat_template_sha256": None if template is None else _sha256(template),
    }


def _sha256(value: Any) -> str:
    """Return the digest of a text, or of the JSON of any other value."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_named(name: str, source: Source) -> Any:
    """Load the tokenizer of this name or folder with the access token and cache of a model's source.

    Raises:
        CalibrationDataError: it cannot be loaded.
    """
    token = {key: source.hub[key] for key in ("token", "local_files_only", "cache_dir") if key in source.hub}
    return replace(source, name=name, hub=token).tokenizer()


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Warn about a tokenizer with more tokens than the model's vocabulary, or with far fewer.

    More can be harmless, such as a padding token added later. Token ids outside the vocabulary are refused when the
    text is tokenized.
    """
    known = len(tokenizer) if hasattr(tokenizer, "__len__") else vocab_size
    if not SMALLEST_SHARE * vocab_size <= known <= vocab_size:
        logger.warning(
            "the tokenizer has %d tokens and the model's vocabulary %d; check that it is the model's tokenizer.",
            known,
            vocab_size,
        )


def _needs_tokenizer(dataset: Any) -> bool:
    while isinstance(dataset, list | tuple) and dataset:
        dataset = dataset[0]
    if isinstance(dataset, Mapping):
        return "input_ids" not in dataset
    return not (isinstance(dataset, int) or hasattr(dataset, "dtype"))


def calibrate(
    config: ModeGPTConfig, tokenizer: Any, model_config: Any, source: Source, *, fewer: bool = False
) -> TokenWindows:
    """Read the calibration windows of a model before it is changed; `fewer` is that of `calibration_windows`.

    Raises:
        CalibrationDataError, InvalidConfig: the data or the sequence length is invalid.
    """
    text = model_config.get_text_config()
    context = context_of(model_config)
    check_vocabulary(tokenizer, text.vocab_size)
    is_demo = isinstance(config.dataset, str) and config.dataset == DEMO
    read = replace(config, dataset=str(demo.CALIBRATION_TEXT)) if is_demo else config
    windows = calibration_windows(
        read,
        tokenizer,
        sequence_length=resolve_sequence_length(config.sequence_length, context),
        vocab_size=text.vocab_size,
        context=context,
        hub=dataset_hub(source),
        fewer=fewer,
    )
    return replace(windows, record={**windows.record, "name": DEMO}) if is_demo else windows


def dataset_hub(source: Source) -> dict[str, Any]:
    """Return the Hub arguments that apply to a dataset too; revision, folder and cache apply only to the model."""
    return {key: source.hub[key] for key in ("token", "local_files_only") if key in source.hub}


def context_of(model_config: Any) -> int | None:
    """Return the context length of a model in tokens; None if it has no limit."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


def default_dataset(config: ModeGPTConfig, source: Source) -> ModeGPTConfig:
    """Return the configuration, with the embedded text for the embedded model unless a dataset was chosen."""
    chosen = not isinstance(config.dataset, str) or config.dataset != ModeGPTConfig.dataset
    return config if chosen or not source.is_demo else replace(config, dataset=DEMO)
