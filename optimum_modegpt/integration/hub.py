"""Results on the Hub: a folder goes up whole, in one commit, with its card; what fails leaves the folder as it was."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, logging

from optimum_modegpt.errors import OutputError, UploadError
from optimum_modegpt.integration.card import CARD, is_ours, save_report, write_card
from optimum_modegpt.integration.headers import weight_files
from optimum_modegpt.integration.output import is_own
from optimum_modegpt.modeling.modegpt_common import ModeGPTModelMixin

logger = logging.get_logger(__name__)

TEMPLATE = "This model card has been automatically generated."
"""A sentence of the card that transformers writes for a model about which it knows nothing."""
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

    def push(self, folder: Path) -> CommitInfo:
        """Uploads a compressed model that was saved in `folder`, with its card, in one commit.

        Only files that belong to a model go up. A README on the Hub that a person wrote stays.

        Raises:
            OutputError: the folder is no complete compressed model; nothing was sent.
            UploadError: the Hub refused it, or could not be reached; the folder is as it was.
            KeyboardInterrupt: interrupted; the message says the same.
        """
        check_complete(folder)
        if is_ours(write_card(folder, self.repo_id).read_text(encoding="utf-8")):
            self._tag(folder / CARD)
        api = HfApi(token=self.token)
        try:
            repo_id = api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
            if self.revision is not None and not self.create_pr and not self.revision.startswith("refs/pr/"):
                api.create_branch(repo_id, branch=self.revision, exist_ok=True)
            # `upload_folder` may make several commits of it, and people would load half a model between them.
            return api.create_commit(
                repo_id,
                [CommitOperationAdd(path.name, path) for path in self._files(folder, api, repo_id)],
                commit_message=self.commit_message or "Upload compressed model",
                commit_description=self.commit_description,
                revision=self.revision,
                create_pr=self.create_pr,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{self.repo_id} was not updated.\n{self._resume(folder)}") from None
        except Exception as error:  # the Hub's library has many, and lets those of its HTTP client through
            raise UploadError(f"{self.repo_id} was not updated: {_reason(error)}\n{self._resume(folder)}") from error

    def push_saved(self, save: Callable[[Path], Any]) -> CommitInfo:
        """Lets `save` write a model into a temporary folder and uploads it; the folder stays where the upload fails.

        Raises:
            OutputError, UploadError, KeyboardInterrupt: as `check` and `push`.
        """
        self.check()
        folder = Path(tempfile.mkdtemp(prefix="modegpt-"))
        try:
            save(folder)
        except BaseException:
            shutil.rmtree(folder)
            raise
        commit = self.push(folder)
        shutil.rmtree(folder)
        return commit

    def _tag(self, readme: Path) -> None:
        card = ModelCard.load(readme)
        data: Any = card.data
        if new := [tag for tag in self.tags if tag not in (data.tags or ())]:
            data.tags = [*(data.tags or ()), *new]
            card.save(readme)

    def _files(self, folder: Path, api: HfApi, repo_id: str) -> list[Path]:
        """The files to upload: those of a model, and our card unless it would take the place of a person's."""
        files = [path for path in sorted(folder.iterdir()) if is_own(path)]
        if not is_ours((folder / CARD).read_text(encoding="utf-8")):
            return files
        try:
            there = Path(api.hf_hub_download(repo_id, CARD, revision=self.revision)).read_text(encoding="utf-8")
        except RemoteEntryNotFoundError:
            return files
        if is_ours(there) or TEMPLATE in there:
            return files
        logger.warning("%s has a README.md of its own, which stays; the card written here is not uploaded.", repo_id)
        return [path for path in files if path.name != CARD]

    def _resume(self, folder: Path) -> str:
        words = ["hf", "upload", self.repo_id, str(folder)]
        words += ["--private"] * bool(self.private) + ["--create-pr"] * self.create_pr
        words += [] if self.revision is None else ["--revision", self.revision]
        return f"The finished model is in {folder}, complete. To go on: {shlex.join(words)}"


def check_complete(folder: Path) -> None:
    """Refuses a folder that would not load by name.

    Raises:
        OutputError: it is no compressed model, or lacks weights or code that it names.
    """
    try:
        missing = sorted(path.name for path in _named_files(folder) if not path.is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{folder} is no compressed model that could be uploaded: {type(error).__name__} {error}"
        ) from error
    if missing:
        raise OutputError(f"{folder} lacks {', '.join(missing)}; nothing was uploaded. Save the model again.")


def _named_files(folder: Path) -> set[Path]:
    """Weights and code that a saved model names."""
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    code = {folder / f"{name.partition('.')[0]}.py" for name in config["auto_map"].values()}
    needed = {Path(other) for file in code if file.is_file() for other in get_relative_import_files(file)}
    return code | needed | set(weight_files(folder) or [folder / SAFE_WEIGHTS_NAME])


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
        is_main_process: bool = True,
        state_dict: Any = None,
        push_to_hub: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Weights, configuration and code as always; then the report of a compression in this process, and the card."""
        folder = Path(save_directory)
        hub = {key: kwargs.pop(key) for key in Upload.__dataclass_fields__ if push_to_hub and key in kwargs}
        save_plainly(folder, is_main_process, state_dict, False, *args, **kwargs)
        if not is_main_process or not (folder / CONFIG_NAME).is_file():  # of an adapter only the adapter is saved
            return
        try:
            if KEPT_REPORT in vars(model):
                vars(model)[KEPT_REPORT] = save_report(folder, vars(model)[KEPT_REPORT])
            write_card(folder)
        except Exception as error:  # of whatever lies in the folder: the model is saved, and hours of training go on
            logger.warning("%s is saved, but not its card: %s: %s", folder, type(error).__name__, error)
        if push_to_hub:
            Upload(**{"repo_id": folder.resolve().name, "tags": tuple(model.model_tags or ()), **hub}).push(folder)

    @staticmethod
    def push(
        model: PreTrainedModel, repo_id: str, *, max_shard_size: Any = "50GB", tags: Any = None, **hub: Any
    ) -> CommitInfo:
        """As transformers' own, with our card in place of its template."""
        given = (tags,) if isinstance(tags, str) else tuple(tags or ())
        upload = Upload(repo_id, tags=(*(model.model_tags or ()), *given), **hub)
        return upload.push_saved(lambda folder: model.save_pretrained(folder, max_shard_size=max_shard_size))


def install_companion() -> None:
    """Teaches the compressed classes what their files alone, as remote code, cannot know."""
    ModeGPTModelMixin.companion = Companion
