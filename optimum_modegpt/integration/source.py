"""Where a model comes from, so that its tokenizer and its calibration text come from the same place."""

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
"""The name of the embedded model, and of its text as a dataset."""
SMALLEST_SHARE = 0.5
"""A tokenizer with fewer tokens than this share of the model's vocabulary is probably another model's."""
CARD = "README.md"
CARD_FIELDS = ("license", "license_name", "license_link", "language")
"""What a card says that holds for a compressed model too."""
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


@dataclass(frozen=True)
class Source:
    """A model's name or folder, and the arguments with which its caller reads the Hub."""

    name: str | None
    hub: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool | None = None

    @classmethod
    def of_arguments(cls, name: Any, arguments: Mapping[str, Any]) -> Source:
        """The source named by the arguments of a `from_pretrained`."""
        hub = {key: arguments[key] for key in HUB_ARGUMENTS if arguments.get(key) is not None}
        return cls(None if name is None else str(name), hub, arguments.get("trust_remote_code"))

    @classmethod
    def of_model(cls, model: Any, hub: Mapping[str, Any] | None = None) -> Source:
        """The source of a model that is loaded already: the name it remembers, read with `hub`.

        Raises:
            InvalidConfig: for an argument that says nothing about the Hub.
        """
        hub = hub or {}
        known = {*HUB_ARGUMENTS, "trust_remote_code"}
        if strange := sorted(hub.keys() - known):
            raise InvalidConfig(f"unknown argument {strange[0]!r}; expected one of {', '.join(sorted(known))}.")
        return cls.of_arguments(model.config._name_or_path or None, hub)

    @property
    def is_demo(self) -> bool:
        """Whether this is the embedded model."""
        return self.name in (DEMO, str(demo.MODEL_DIR))

    @property
    def path(self) -> str:
        """What to give to a `from_pretrained`.

        Raises:
            CalibrationDataError: when the model does not know its name.
        """
        if self.name is None:
            raise CalibrationDataError(
                "the model does not say where it was loaded from, so its tokenizer cannot be found; pass a tokenizer."
            )
        return str(demo.MODEL_DIR) if self.is_demo else self.name

    @property
    def _is_folder(self) -> bool:
        """Whether the path is that of a folder; also of one that is gone, where no repository can have such a name."""
        if Path(self.path).is_dir():
            return True
        try:
            validate_repo_id(self.path)
        except HFValidationError:
            return True
        return False

    def check_path(self) -> None:
        """Refuses a path that is none of a model.

        Raises:
            OSError: it is that of a file, or leads nowhere and is no name of the Hub.
        """
        place = Path(self.path)
        if place.is_file():
            raise OSError(f"{self.name!r} is a file; a model is a folder. Name {str(place.parent)!r}, if it holds one.")
        if self._is_folder and not place.is_dir():
            raise OSError(
                f"{self.name!r} does not exist, and no model of the Hub can have such a name. Expected a folder with "
                "config.json and weights, or a name such as user/model."
            )

    @property
    def base_model(self) -> str | None:
        """The name that the record of a compressed model keeps; of a local folder only its last part."""
        if self.is_demo:
            return DEMO
        if self.name is None or not self._is_folder:
            return self.name
        last = Path(self.name).resolve().name
        return last if last != DEMO else f"./{last}"

    @property
    def revision(self) -> str | None:
        """The commit that was read, as far as it is known; else the branch or tag that was asked for."""
        revision = self.hub.get("revision")
        if self.name is None or self._is_folder:
            return revision
        config = "/".join(filter(None, (self.hub.get("subfolder"), CONFIG_NAME)))
        cached = try_to_load_from_cache(self.path, config, cache_dir=self.hub.get("cache_dir"), revision=revision)
        known = extract_commit_hash(cached if isinstance(cached, str) else None, None)
        return known or revision

    def cache_report(self) -> str:
        """Say which revisions of a model of the Hub are cached, and how to read from another place; "" for a folder."""
        if self._is_folder:
            return ""
        cache = Path(self.hub.get("cache_dir") or constants.HF_HUB_CACHE)
        if constants.is_offline_mode():
            advice = "HF_HUB_OFFLINE is set, so nothing is downloaded: unset it, or set HF_HOME to another cache."
        elif not _can_be_written(cache):
            advice = "The cache cannot be written to: set HF_HOME to a folder that can."
        else:
            advice = "To read from the cache without the Hub, set HF_HUB_OFFLINE=1; HF_HOME is the folder of the cache."
        cached = _cached_revisions(cache / repo_folder_name(repo_id=self.path, repo_type="model"))
        return (
            f"\nRevision asked for: {self.hub.get('revision') or constants.DEFAULT_REVISION}. In the cache {cache}: "
            f"{', '.join(cached) or 'no revision of this model'}.\n{advice}"
        )

    def card(self) -> dict[str, Any]:
        """Licence and language, as far as the card of the model states them.

        No card, or one that cannot be read, is no reason to stop: then they are unknown.
        """
        if self.name is None:
            return {}
        try:
            found = metadata_load(self._card_file()) or {}
        except (FileNotFoundError, EntryNotFoundError):
            logger.info("%r has no card here, so its licence is not known.", self.base_model)
            return {}
        except (OSError, ValueError, YAMLError) as error:
            logger.warning("the card of %r cannot be read, so its licence is not known: %s", self.base_model, error)
            return {}
        card = {key: found[key] for key in CARD_FIELDS if _is_text(found.get(key))}
        if (link := card.pop("license_link", None)) and (link := self._absolute(link)):
            card["license_link"] = link
        return card

    def _card_file(self) -> Path:
        """The card's file, from the Hub where need be; it stands at the top also where the model is in a subfolder."""
        if self._is_folder:
            return Path(self.path) / CARD
        hub = {key: value for key, value in self.hub.items() if key != "subfolder"}
        return Path(hf_hub_download(self.path, CARD, **hub))

    def _absolute(self, link: str) -> str | None:
        """A link of the card that holds elsewhere too; None where it leads into a local folder."""
        if urlparse(link).scheme in ("http", "https"):
            return link
        return None if self._is_folder else hf_hub_url(self.path, link, revision=self.hub.get("revision"))

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for a `from_pretrained` that reads the same place."""
        trust = {} if self.trust_remote_code is None else {"trust_remote_code": self.trust_remote_code}
        return {**self.hub, **trust}

    def tokenizer(self) -> Any:
        """The tokenizer that lies beside the model.

        Raises:
            CalibrationDataError: when there is none.
        """
        try:
            self.check_path()
            return AutoTokenizer.from_pretrained(self.path, **self.arguments())
        except (OSError, ValueError) as error:
            raise CalibrationDataError(
                f"no tokenizer could be loaded from {self.name!r}: {error} "
                "Name one: tokenizer, on the command line --tokenizer."
            ) from error


def _cached_revisions(folder: Path) -> list[str]:
    """List the revisions in the cache folder of a repository: branches and tags with their commits, other commits."""
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
    """Whether a folder can be written to, or made if it does not exist."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return existing.is_dir() and os.access(existing, os.W_OK)


def _is_text(value: Any) -> bool:
    """Whether a field of a card is a string or several; YAML has other ideas of `no`, for one."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(each, str) and each for each in values)


_LOADING: ContextVar[Source | None] = ContextVar("modegpt_source", default=None)


@contextmanager
def loading(source: Source) -> Iterator[None]:
    """While a `from_pretrained` runs: tells the quantizer hook what the caller asked for."""
    token = _LOADING.set(source)
    try:
        yield
    finally:
        _LOADING.reset(token)


def being_loaded() -> Source | None:
    """The source of the `from_pretrained` that is running; None outside of one, or without our wrapper."""
    return _LOADING.get()


def find_tokenizer(config: ModeGPTConfig, given: Any, source: Source) -> tuple[Any, dict[str, Any]]:
    """Find the tokenizer to calibrate with: `given`, else the configuration's, else the model's own.

    Returns the tokenizer and its entries in the calibration record; None and no entries if the dataset is token ids and
    no tokenizer was chosen.

    Raises:
        CalibrationDataError: there is none, or the chosen one is not the model's own and the configuration does not
            allow that.
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
        CalibrationDataError: they differ, and that is not allowed.
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
            f"the chosen tokenizer is not that of {source.name!r}. It differs in: {'; '.join(differences)}. Leave out "
            "tokenizer (--tokenizer) to use the model's own, or set allow_foreign_tokenizer=True "
            "(--allow-foreign-tokenizer) to use another on purpose."
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
    """The digest of a text, or of any other value as JSON."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_named(name: str, source: Source) -> Any:
    """The tokenizer of this name or folder, read with the rights of a model's source.

    Raises:
        CalibrationDataError: when there is none.
    """
    token = {key: source.hub[key] for key in ("token", "local_files_only", "cache_dir") if key in source.hub}
    return replace(source, name=name, hub=token).tokenizer()


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Warns of a tokenizer with more tokens than the model knows, or with far fewer.

    More can be harmless, a padding token added later; an id that the model does not know is refused with the text.
    """
    known = len(tokenizer) if hasattr(tokenizer, "__len__") else vocab_size
    if not SMALLEST_SHARE * vocab_size <= known <= vocab_size:
        logger.warning(
            "the tokenizer has %d tokens, the model knows %d: is it the one the model was made with?", known, vocab_size
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
    """The calibration windows of a model, read before anything is done to it; `fewer` as in `calibration_windows`.

    Raises:
        CalibrationDataError, InvalidConfig: with what is wrong with the data or the length.
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
    """The Hub arguments that hold for a dataset too; revision, folder and cache are the model's."""
    return {key: source.hub[key] for key in ("token", "local_files_only") if key in source.hub}


def context_of(model_config: Any) -> int | None:
    """The longest text a model reads, in tokens; None where it has no limit."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


def default_dataset(config: ModeGPTConfig, source: Source) -> ModeGPTConfig:
    """The configuration with the embedded text where the embedded model is compressed and no text was chosen."""
    chosen = not isinstance(config.dataset, str) or config.dataset != ModeGPTConfig.dataset
    return config if chosen or not source.is_demo else replace(config, dataset=DEMO)
