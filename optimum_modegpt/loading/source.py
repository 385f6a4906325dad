"""The source of a model: its name or folder and Hub arguments, with which its tokenizer and data are read too."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from huggingface_hub import constants, hf_hub_download, hf_hub_url, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME
from transformers.utils.hub import LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, cached_file, extract_commit_hash
from yaml import YAMLError

from optimum_modegpt import demo
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.errors import CalibrationDataError, InvalidConfig

logger = logging.getLogger(__name__)

DEMO = "demo"
"""The name of the embedded model, and of the dataset of its text."""
CARD = "README.md"
CARD_FIELDS = ("license", "license_name", "license_link", "language")
"""The fields of a card that apply to the compressed model too."""
PROCESSOR_FILES = (
    *(PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME),
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
)
"""The files from which transformers creates a processor of images, in addition to those of the tokenizer."""
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
    def is_folder(self) -> bool:
        """Return whether the path is a folder; a missing path counts as one if no repository can have its name."""
        return Path(self.path).is_dir() or not is_repo_id(self.path)

    def check_path(self) -> None:
        """Raise an error if the path cannot be that of a model.

        Raises:
            OSError: the path is a file, or does not exist and cannot be a name on the Hub.
        """
        path = Path(self.path)
        if path.is_file():
            raise OSError(f"{self.name!r} is a file; expected a model folder, perhaps {str(path.parent)!r}.")
        if self.is_folder and not path.is_dir():
            raise OSError(
                f"{self.name!r} does not exist, and no model on the Hub can have this name. Expected a folder with "
                "config.json and weights, or a name such as user/model."
            )

    @property
    def base_model(self) -> str | None:
        """Return the name to store in the record of a compressed model; for a local folder only its last part."""
        if self.is_demo:
            return DEMO
        if self.name is None or not self.is_folder:
            return self.name
        last = Path(self.name).resolve().name
        return f"./{last}" if last == DEMO else last

    @property
    def revision(self) -> str | None:
        """Return the commit that was read if it is known, else the requested branch or tag."""
        revision = self.hub.get("revision")
        if self.name is None or self.is_folder:
            return revision
        config = Path(self.hub.get("subfolder", ""), CONFIG_NAME).as_posix()
        cached = try_to_load_from_cache(self.path, config, cache_dir=self.hub.get("cache_dir"), revision=revision)
        if isinstance(cached, str):
            return extract_commit_hash(cached, None) or revision
        return revision

    def cache_report(self) -> str:
        """Return which revisions of a model on the Hub are cached, and how to read others; "" for a folder."""
        if self.is_folder:
            return ""
        cache = Path(self.hub.get("cache_dir") or constants.HF_HUB_CACHE)
        repository = cache / repo_folder_name(repo_id=self.path, repo_type="model")
        branches = [path.name for path in repository.glob("refs/*")]
        commits = [path.name for path in repository.glob("snapshots/*")]
        cached = ", ".join(sorted(branches) + sorted(commits))
        advice = "To read only from the cache, set HF_HUB_OFFLINE=1; HF_HOME sets the folder of the cache."
        if constants.is_offline_mode():
            advice = "HF_HUB_OFFLINE is set, so nothing is downloaded. Unset it, or set HF_HOME to another cache."
        return (
            f"\nRequested revision: {self.hub.get('revision') or constants.DEFAULT_REVISION}. In the cache {cache}: "
            f"{cached or 'no revision of this model'}.\n{advice}"
        )

    def card(self) -> dict[str, Any]:
        """Return the licence and language that the model's card states.

        A missing or unreadable card is no error: the licence and language are then unknown.
        """
        if self.name is None:
            return {}
        try:
            stored = metadata_load(self._card_file()) or {}
        except (FileNotFoundError, EntryNotFoundError):
            return {}
        except (OSError, ValueError, YAMLError) as error:
            logger.warning("the model card of %r cannot be read, so its licence is unknown: %s", self.base_model, error)
            return {}
        card = {}
        for key in CARD_FIELDS:
            value = stored.get(key)
            if isinstance(value, str | list) and value:  # YAML reads `no` as False
                card[key] = value
        link = card.get("license_link")
        if isinstance(link, str) and urlparse(link).scheme not in ("http", "https"):
            del card["license_link"]  # relative to the base model
            if not self.is_folder:
                card["license_link"] = hf_hub_url(self.path, link, revision=self.hub.get("revision"))
        return card

    def _card_file(self) -> Path:
        """Return the card's file, downloaded if necessary; it is at the top level even for a model in a subfolder."""
        if self.is_folder:
            return Path(self.path) / CARD
        hub = {key: value for key, value in self.hub.items() if key != "subfolder"}
        return Path(hf_hub_download(self.path, CARD, **hub))

    def arguments(self) -> dict[str, Any]:
        """Return keyword arguments for a `from_pretrained` that reads from the same source."""
        if self.trust_remote_code is None:
            return dict(self.hub)
        return {**self.hub, "trust_remote_code": self.trust_remote_code}

    def dataset_arguments(self) -> dict[str, Any]:
        """Return the Hub arguments that apply to a dataset too; revision, folder and cache apply only to the model."""
        return {key: self.hub[key] for key in ("token", "local_files_only") if key in self.hub}

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

    def processor_files(self) -> list[Path]:
        """Return the files of the model's processor of images, downloaded if necessary; there may be none."""
        if self.name is None:
            return []
        lenient = {
            "_raise_exceptions_for_missing_entries": False,
            "_raise_exceptions_for_connection_errors": False,
            "_raise_exceptions_for_gated_repo": False,
        }
        found = (cached_file(self.path, name, **self.hub, **lenient) for name in PROCESSOR_FILES)
        return [Path(file) for file in found if file is not None]


def is_repo_id(name: str) -> bool:
    """Return whether a repository on the Hub can have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def default_dataset(config: ModeGPTConfig, source: Source) -> ModeGPTConfig:
    """Return the configuration, with the embedded text for the embedded model unless a dataset was chosen."""
    is_default = isinstance(config.dataset, dict) and config.dataset == ModeGPTConfig().dataset
    return replace(config, dataset=DEMO) if source.is_demo and is_default else config
