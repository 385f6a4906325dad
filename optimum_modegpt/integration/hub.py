"""Results on the Hub: a folder goes up whole, in one commit, with its card; what fails leaves the folder as it was."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, logging
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from optimum_modegpt.errors import OutputError, UploadError
from optimum_modegpt.integration.card import (
    CARD,
    EVALUATION,
    PICTURE,
    REPORT,
    is_ours,
    save_report,
    take_along,
    write_card,
)
from optimum_modegpt.integration.readme import is_template, merge_header
from optimum_modegpt.modeling.modegpt_files import index_name, weight_files, whole_name

logger = logging.get_logger(__name__)

KEPT_REPORT = "_modegpt_report"
"""Attribute of a model that was compressed in this process: the `Report` that is saved with it."""


@dataclass(frozen=True)
class Upload:
    """Where a result goes on the Hub, and how.

    Args:
        repo_id: "user/name", or "name" for the user's own; created where it does not exist.
        private: whether a repository that is created is private; None takes the account's default.
        revision: branch to commit to, created where it does not exist, or a pull request such as "refs/pr/1".
        create_pr: whether to open a pull request instead.
        token: access token; None takes the one that is logged in.
        commit_message: one line; chosen where it is None.
        commit_description: text of the commit, or of the pull request.
        tags: tags for the card, beside its own.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    token: str | bool | None = None
    commit_message: str | None = None
    commit_description: str | None = None
    tags: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuses what cannot work, before hours of work; nothing is created.

        Raises:
            OutputError: the name is none, nobody is logged in, the Hub cannot be reached, the token only reads, or the
                namespace is another's and no pull request was asked for.
        """
        try:
            validate_repo_id(self.repo_id)
            user = HfApi(token=self.token).whoami()
        except Exception as error:  # the Hub's library has many, and lets those of its HTTP client through
            raise OutputError(f"nothing can be pushed to {self.repo_id!r}: {_reason(error)}") from error
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise OutputError(
                f"nothing can be pushed to {self.repo_id!r}: the token only reads. Log in with one that may write."
            )
        namespace, slash, _ = self.repo_id.partition("/")
        known = [user["name"], *(organisation["name"] for organisation in user.get("orgs", ()))]
        if slash and not self.create_pr and namespace.lower() not in (name.lower() for name in known):
            raise OutputError(
                f"nothing can be pushed to {self.repo_id!r}: this token is that of {', '.join(known)}. Choose another "
                "name, or open a pull request: create_pr=True, on the command line --create-pr."
            )

    def push(self, folder: Path, variant: str | None = None) -> CommitInfo:
        """Uploads a compressed model that was saved in `folder`, with its card, in one commit.

        Only files that belong to a model go up. Weights in the repository that would be read beside these, or in their
        place, are deleted with the same commit. A README on the Hub that a person wrote stays.

        Raises:
            OutputError: the folder is no complete compressed model; nothing was sent.
            UploadError: the Hub refused it, or could not be reached; the folder is as it was.
            KeyboardInterrupt: interrupted; the message says the same.
        """
        check_complete(folder, variant)
        return self._send(folder, variant)

    def push_saved(self, save: Callable[[Path], Any]) -> CommitInfo:
        """Lets `save` write a model into a temporary folder and uploads it; the folder stays where the upload fails.

        Raises:
            OutputError, UploadError, KeyboardInterrupt: as `check` and `push`.
        """
        self.check()
        folder = Path(tempfile.mkdtemp(prefix="modegpt-"))
        try:
            save(folder)
            check_complete(folder)
        except BaseException:
            shutil.rmtree(folder)
            raise
        commit = self._send(folder)
        shutil.rmtree(folder)
        return commit

    def _send(self, folder: Path, variant: str | None = None) -> CommitInfo:
        """The upload of a complete folder; whatever fails, the message names the folder and how to go on."""
        api = HfApi(token=self.token)
        try:
            repo_id = api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
            if self.revision is not None and not self.create_pr and not self.revision.startswith("refs/pr/"):
                api.create_branch(repo_id, branch=self.revision, exist_ok=True)
            names = api.list_repo_files(repo_id, revision=self.revision)
            has_card = self._write_card(folder, api, repo_id, there=CARD in names)
            files = [path for path in published(folder, variant) if has_card or path.name != CARD]
            added = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
            stale = set(filter(weights_of(variant).fullmatch, names)) - {one.path_in_repo for one in added}
            # `upload_folder` may make several commits of it, and people would load half a model between them.
            return api.create_commit(
                repo_id,
                [*added, *map(CommitOperationDelete, sorted(stale))],
                commit_message=self.commit_message or "Upload compressed model",
                commit_description=self.commit_description,
                revision=self.revision,
                create_pr=self.create_pr,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{self.repo_id} was not updated.\n{self._resume(folder)}") from None
        except Exception as error:  # the Hub's library has many, and lets those of its HTTP client through
            raise UploadError(f"{self.repo_id} was not updated: {_reason(error)}\n{self._resume(folder)}") from error

    def _write_card(self, folder: Path, api: HfApi, repo_id: str, *, there: bool) -> bool:
        """Writes the card with the tags asked for; whether it is to be uploaded, and takes no words of a person's."""
        path = write_card(folder, repo_id)
        if not is_ours(path.read_text(encoding="utf-8")):
            return True
        card, text = ModelCard.load(path), None
        data: Any = card.data
        data.tags = list(dict.fromkeys([*(data.tags or ()), *self.tags]))
        if there:
            text = Path(api.hf_hub_download(repo_id, CARD, revision=self.revision)).read_text(encoding="utf-8")
        if text is not None and not is_ours(text) and is_template(text):
            merge_header(card, text)
        card.save(path)
        if text is None or is_ours(text) or is_template(text):
            return True
        logger.warning("%s has a README.md of its own, which stays; the card written here is not uploaded.", repo_id)
        return False

    def _resume(self, folder: Path) -> str:
        words = ["hf", "upload", self.repo_id, str(folder)]
        words += ["--private"] * bool(self.private) + ["--create-pr"] * self.create_pr
        words += [] if self.revision is None else ["--revision", self.revision]
        return f"The finished model is in {folder}, complete. To go on: {shlex.join(words)}"


# -------------------------------------------------------------------------------------------------- what is published

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "merges.txt",
    "vocab.*",
    "*.model",
    "*.tiktoken",
    "chat_template.jinja",
    f"{CHAT_TEMPLATE_DIR}/*.jinja",
)
OTHER_FILES = (CONFIG_NAME, GENERATION_CONFIG_NAME, CARD, REPORT, EVALUATION, PICTURE)


def published(folder: Path, variant: str | None = None) -> list[Path]:
    """The files of a folder that are of a compressed model, by their known names: nothing else is ever uploaded.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: it holds no compressed model.
    """
    known = (path for pattern in (*TOKENIZER_FILES, *OTHER_FILES) for path in folder.glob(pattern))
    found = {*known, *_named_files(folder, variant), *_code(folder, folder / TOKENIZER_CONFIG_FILE)}
    # A link may lead anywhere.
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


def check_complete(folder: Path, variant: str | None = None) -> None:
    """Refuses a folder that would not load by name.

    Raises:
        OutputError: it is no compressed model, or lacks weights or code that it names.
    """
    try:
        missing = sorted(path.name for path in _named_files(folder, variant) - set(published(folder, variant)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{folder} is no compressed model that could be uploaded: {type(error).__name__} {error}"
        ) from error
    if missing:
        raise OutputError(
            f"{folder} lacks {', '.join(missing)}, or has links in their place; nothing was uploaded. Save the model "
            "again."
        )


def weights_of(variant: str | None) -> re.Pattern[str]:
    """The names that a save gives to weights and their index."""
    part = re.escape(f".{variant}") if variant else ""
    return re.compile(rf"model{part}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{part}\.json")


def _named_files(folder: Path, variant: str | None) -> set[Path]:
    """Configuration, weights and code that a saved model names."""
    config = folder / CONFIG_NAME
    if not json.loads(config.read_text(encoding="utf-8"))["auto_map"]:
        raise ValueError(f"{CONFIG_NAME} names no code")
    weights = set(weight_files(folder, variant) or [folder / whole_name(variant)])
    index = folder / index_name(variant)
    return {config, *_code(folder, config), *weights, *({index} if folder / whole_name(variant) not in weights else ())}


def _code(folder: Path, file: Path) -> set[Path]:
    """The code that the `auto_map` of a file names, and what that imports from beside it."""
    if not file.is_file():
        return set()
    auto_map: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")).get("auto_map", {})
    names = [name for value in auto_map.values() for name in (value if isinstance(value, list) else [value]) if name]
    # "owner/name--module.Class" lies in another repository.
    code = {folder / f"{name.partition('.')[0]}.py" for name in names if "--" not in name}
    return code | {Path(other) for one in code if one.is_file() for other in get_relative_import_files(one)}


def _reason(error: Exception) -> str:
    """What the Hub said, or what happened on the way to it, in one line."""
    chain = [error] if isinstance(error, HfHubHTTPError) or error.__cause__ is None else [error, error.__cause__]
    return " ".join(" ".join(str(one) or type(one).__name__ for one in chain).split())


# ------------------------------------------------------------------------------------ save_pretrained and push_to_hub


class Companion:
    """What this package adds to `save_pretrained` and `push_to_hub` of compressed models: report and card."""

    @staticmethod
    def save(
        model: PreTrainedModel,
        save_plainly: Callable[..., Any],
        save_directory: Any,
        is_main_process: bool,
        push_to_hub: bool,
        *,
        variant: str | None,
        **kwargs: Any,
    ) -> None:
        """Weights, configuration and code as always; then report and card.

        The report is that of a compression in this process, or the one beside a model that was loaded from a folder and
        not changed, which takes its evaluation along too.
        """
        folder = Path(save_directory)
        hub = {key: kwargs.pop(key) for key in Upload.__dataclass_fields__ if push_to_hub and key in kwargs}
        save_plainly(folder, is_main_process, variant=variant, **kwargs)
        if not is_main_process or not (folder / CONFIG_NAME).is_file():  # given a file, transformers saves nothing
            return
        try:
            if KEPT_REPORT in vars(model):
                vars(model)[KEPT_REPORT] = save_report(folder, vars(model)[KEPT_REPORT])
            elif model.name_or_path and (source := Path(model.name_or_path)).is_dir() and not source.samefile(folder):
                take_along(source, folder)
            write_card(folder)
        except Exception as error:  # of whatever lies in the folder: the model is saved, and hours of training go on
            logger.warning("%s is saved, but not its card: %s: %s", folder, type(error).__name__, error)
        if push_to_hub:
            names = {"repo_id": folder.resolve().name, "tags": tuple(model.model_tags or ()), **hub}
            Upload(**names).push(folder, variant)

    @staticmethod
    def push(
        model: PreTrainedModel, repo_id: str, *, max_shard_size: Any = "50GB", tags: Any = None, **hub: Any
    ) -> CommitInfo:
        """As transformers' own, with our card in place of its template."""
        given = (tags,) if isinstance(tags, str) else tuple(tags or ())
        upload = Upload(repo_id, tags=(*(model.model_tags or ()), *given), **hub)
        return upload.push_saved(lambda folder: model.save_pretrained(folder, max_shard_size=max_shard_size))
