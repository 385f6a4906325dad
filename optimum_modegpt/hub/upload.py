"""Upload results to the Hub: a folder with its card in one commit. A failed upload leaves the folder unchanged."""

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

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, logging
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from optimum_modegpt.errors import OutputError, UploadError
from optimum_modegpt.hub.card import CARD, PICTURE, TRAINER, copy_records, is_ours, save_report, write_card
from optimum_modegpt.hub.commands import flags
from optimum_modegpt.hub.result import EVALUATION, REPORT
from optimum_modegpt.layouts.records import is_stock_result
from optimum_modegpt.loading.source import CARD_FIELDS, PROCESSOR_FILES
from optimum_modegpt.modeling.modegpt_files import index_name, weight_files, whole_name

logger = logging.get_logger(__name__)

TEMPLATE, TO_FILL, UNTOUCHED = "This model card has been automatically generated.", "[More Information Needed]", 35
"""A sentence of the placeholder card of transformers, its placeholder, and the fewest that an unedited one has."""
KEPT_REPORT = "_modegpt_report"
"""Attribute of a model that was compressed in this process; it holds the `Report` to save with the model."""


@dataclass(frozen=True)
class Upload:
    """Destination and options of an upload to the Hub; `None` uses a default of the Hub.

    Args:
        repo_id: "user/name", or "name" in the user's own namespace; created if it does not exist.
        private: whether a new repository is private.
        revision: branch to commit to, created if it does not exist, or a pull request such as "refs/pr/1".
        create_pr: whether to open a pull request instead.
        token: access token; `None` uses that of the logged-in user.
        commit_message: one line.
        commit_description: description of the commit or of the pull request.
        tags: tags to add to those of the card.
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
        """Raise an error if the upload cannot succeed, before hours of work; create nothing.

        Raises:
            OutputError: the name is invalid, nobody is logged in, the Hub cannot be reached, the token is read-only, or
                the namespace belongs to somebody else and no pull request was requested.
        """
        try:
            validate_repo_id(self.repo_id)
            user = HfApi(token=self.token).whoami()
        except Exception as error:  # huggingface_hub raises many kinds, and those of its HTTP client
            raise OutputError(f"cannot push to {self.repo_id!r}: {_reason(error)}") from error
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise OutputError(
                f"cannot push to {self.repo_id!r}: the token is read-only. Log in with a token that has write access."
            )
        namespace, slash, _ = self.repo_id.lower().partition("/")
        known = [owner["name"] for owner in (user, *user.get("orgs", ()))]
        if slash and not self.create_pr and namespace not in map(str.lower, known):
            raise OutputError(
                f"cannot push to {self.repo_id!r}: this token belongs to {', '.join(known)}. Choose another name, or "
                "open a pull request with create_pr=True, on the command line --create-pr."
            )

    def push(self, folder: Path, variant: str | None = None) -> CommitInfo:
        """Upload a compressed model that was saved in `folder`, with its card, in one commit.

        Only files that belong to a model are uploaded. The same commit deletes weights in the repository that would be
        loaded together with these, or instead of them. A README on the Hub that a person wrote is kept.

        Raises:
            OutputError: the folder is not a complete compressed model; nothing was uploaded.
            UploadError: the Hub rejected the upload or could not be reached; the folder is unchanged.
            KeyboardInterrupt: interrupted; the message names the folder and how to resume, as for `UploadError`.
        """
        check_complete(folder, variant)
        options = {"private": self.private, "create_pr": self.create_pr, "revision": self.revision}
        command = shlex.join(["hf", "upload", self.repo_id, str(folder), *flags(options)])
        resume = f"The complete model is in {folder}. To resume: {command}"
        try:
            return self._commit(folder, variant)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{self.repo_id} was not updated.\n{resume}") from None
        except Exception as error:  # huggingface_hub raises many kinds, and those of its HTTP client
            raise UploadError(f"{self.repo_id} was not updated: {_reason(error)}\n{resume}") from error

    def push_saved(self, save: Callable[[Path], Any]) -> CommitInfo:
        """Save a model with `save` into a temporary folder and upload it; keep the folder if the upload fails.

        Errors are those of `check` and `push`.
        """
        self.check()
        folder = Path(tempfile.mkdtemp(prefix="modegpt-"))
        try:
            save(folder)
            check_complete(folder)
        except BaseException:
            shutil.rmtree(folder)
            raise
        commit = self.push(folder)
        shutil.rmtree(folder)
        return commit

    def _commit(self, folder: Path, variant: str | None) -> CommitInfo:
        api = HfApi(token=self.token)
        repo_id = api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
        if self.revision is not None and not self.create_pr and not self.revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=self.revision, exist_ok=True)
        names, former = api.list_repo_files(repo_id, revision=self.revision), ""
        if CARD in names:
            former = Path(api.hf_hub_download(repo_id, CARD, revision=self.revision)).read_text(encoding="utf-8")
        path = write_card(folder, repo_id)
        files = published(folder, variant)
        if is_ours(path.read_text(encoding="utf-8")):
            if is_ours(former) or is_template(former):
                merge_header(path, former, self.tags)
            else:
                logger.warning("%s has a README.md that a person wrote; the generated card is not uploaded.", repo_id)
                files.remove(path)
        stale = set(filter(weights_of(variant).fullmatch, names))
        operations: list[CommitOperationAdd | CommitOperationDelete] = []
        for path in files:
            name = path.relative_to(folder).as_posix()
            operations.append(CommitOperationAdd(name, path))
            stale.discard(name)
        operations += map(CommitOperationDelete, sorted(stale))
        # `upload_folder` may split the upload into several commits; until the last, the model would be incomplete.
        return api.create_commit(
            repo_id,
            operations,
            commit_message=self.commit_message or "Upload compressed model",
            commit_description=self.commit_description,
            revision=self.revision,
            create_pr=self.create_pr,
        )


def _reason(error: Exception) -> str:
    """Return the response of the Hub, or the error that prevented one, in one line."""
    reason, cause = str(error) or type(error).__name__, error.__cause__
    if cause is not None and not isinstance(error, HfHubHTTPError):
        reason += f" {str(cause) or type(cause).__name__}"
    return " ".join(reason.split())


def is_template(text: str) -> bool:
    """Return whether no person wrote a README: front matter alone, the template of transformers or of `Trainer`."""
    untouched = TEMPLATE in text and text.count(TO_FILL) >= UNTOUCHED
    return untouched or TRAINER in text or not ModelCard(text, ignore_metadata_errors=True).text.strip()


def merge_header(path: Path, former: str, tags: tuple[str, ...]) -> None:
    """Add tags to the front matter of a card, and merge that of a README that no person wrote into it."""
    card = ModelCard.load(path)
    merged: dict[str, Any] = card.data.to_dict()
    merged["tags"] = [*merged["tags"], *tags]
    if not is_ours(former):
        theirs = ModelCard(former, ignore_metadata_errors=True).data.to_dict()
        merged["tags"] += theirs.pop("tags", None) or ()
        for key, value in theirs.items():
            if value and (key in CARD_FIELDS or not merged.get(key)):
                merged[key] = value
    merged["tags"] = list(dict.fromkeys(map(str, merged["tags"])))
    card.data = ModelCardData(ignore_metadata_errors=True, **merged)
    card.save(path)


# -------------------------------------------------------------------------------------------------- files to publish

PUBLISHED = (
    *(CONFIG_NAME, GENERATION_CONFIG_NAME, CARD, REPORT, EVALUATION, PICTURE),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("merges.txt", "vocab.*", "*.model", "*.tiktoken", "chat_template.jinja", f"{CHAT_TEMPLATE_DIR}/*.jinja"),
    *PROCESSOR_FILES,
)
"""Patterns of the files of a model, its tokenizer and its processor of images, except weights and code."""


def published(folder: Path, variant: str | None = None) -> list[Path]:
    """Return the files of a folder that have known names of a compressed model; no other file is ever uploaded."""
    found = named_files(folder, variant) | code_of(folder / TOKENIZER_CONFIG_FILE)
    for pattern in PUBLISHED:
        found |= set(folder.glob(pattern))
    # A link may point to any file.
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


def check_complete(folder: Path, variant: str | None = None) -> None:
    """Raise an `OutputError` if a folder is not a compressed model, or lacks weights or code that it names."""
    try:
        missing = sorted(path.name for path in named_files(folder, variant) - set(published(folder, variant)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{folder} is not a compressed model that can be uploaded: {type(error).__name__} {error}"
        ) from error
    if missing:
        raise OutputError(
            f"{folder} lacks {', '.join(missing)}, or has links instead; nothing was uploaded. Save the model again."
        )


def weights_of(variant: str | None) -> re.Pattern[str]:
    """Return a pattern of the names under which weights and their index are saved."""
    part = re.escape(f".{variant}") if variant else ""
    return re.compile(rf"model{part}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{part}\.json")


def named_files(folder: Path, variant: str | None) -> set[Path]:
    """Return the configuration, and the weights and code that it names."""
    code = code_of(folder / CONFIG_NAME)
    if not code and not is_stock_result(json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))):
        raise ValueError(f"{CONFIG_NAME} names no code")
    weights = weight_files(folder, variant) or [folder / whole_name(variant)]
    if folder / whole_name(variant) not in weights:
        weights.append(folder / index_name(variant))
    return {folder / CONFIG_NAME, *code, *weights}


def code_of(file: Path) -> set[Path]:
    """Return the code files that the `auto_map` of a file names, and the modules that they import from its folder."""
    code: set[Path] = set()
    if not file.is_file():
        return code
    for names in json.loads(file.read_text(encoding="utf-8")).get("auto_map", {}).values():
        for name in names if isinstance(names, list) else [names]:
            if name and "--" not in name:  # "owner/name--module.Class" is in another repository
                code.add(file.with_name(f"{name.partition('.')[0]}.py"))
    for module in list(code):
        if module.is_file():
            code |= set(map(Path, get_relative_import_files(module)))
    return code


# ------------------------------------------------------------------------------------ save_pretrained and push_to_hub


def save_result(model: PreTrainedModel, folder: Path) -> None:
    """Save a result with its report and its card. Compressed classes write both; classes of transformers do not."""
    model.save_pretrained(folder)
    if not is_stock_result(model.config):
        return
    if KEPT_REPORT in vars(model):
        vars(model)[KEPT_REPORT] = save_report(folder, vars(model)[KEPT_REPORT])
    write_card(folder)


class Companion:
    """The additions to `save_pretrained` and `push_to_hub` of compressed models: report and card."""

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
        """Save weights, configuration and code as usual, then the report and the card.

        The report is that of a compression in this process. For a model that was loaded from a folder and not changed,
        it is the one in that folder, and the evaluation there is copied too.
        """
        folder = Path(save_directory)
        hub = {}
        if push_to_hub:
            for key in Upload.__dataclass_fields__.keys() & kwargs.keys():
                hub[key] = kwargs.pop(key)
        save_plainly(folder, is_main_process, variant=variant, **kwargs)
        if not is_main_process or not (folder / CONFIG_NAME).is_file():  # the path is a file: nothing was saved
            return
        try:
            if KEPT_REPORT in vars(model):
                vars(model)[KEPT_REPORT] = save_report(folder, vars(model)[KEPT_REPORT])
            elif model.name_or_path and (source := Path(model.name_or_path)).is_dir() and not source.samefile(folder):
                copy_records(source, folder)
            write_card(folder)
        except Exception as error:  # any file of the folder may be invalid; a training run that saves must continue
            logger.warning("%s is saved, but not its card: %s: %s", folder, type(error).__name__, error)
        if push_to_hub:
            names = {"repo_id": folder.resolve().name, "tags": tuple(model.model_tags or ()), **hub}
            Upload(**names).push(folder, variant)

    @staticmethod
    def push(
        model: PreTrainedModel, repo_id: str, *, max_shard_size: Any = "50GB", tags: Any = None, **hub: Any
    ) -> CommitInfo:
        """Push a model as transformers does, with our card instead of its template."""
        given = (tags,) if isinstance(tags, str) else tuple(tags or ())
        upload = Upload(repo_id, tags=(*(model.model_tags or ()), *given), **hub)
        return upload.push_saved(lambda folder: model.save_pretrained(folder, max_shard_size=max_shard_size))
