"""Test results on a local Hub: one process pushes them, and others load them with and without the package."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import RECIPE, save_dense, save_text
from forks import run_forked
from hub import Blob, Hub, serving
from huggingface_hub import ModelCard, ModelCardData
from peft_versions import own_adapters
from safetensors.torch import load, load_file, save_file
from tiny_models import SHARED_CODE, compressed, tokenizer, tokens

from optimum_modegpt import OutputError
from optimum_modegpt.hub.card import is_ours
from optimum_modegpt.hub.upload import Upload
from optimum_modegpt.loading.models import load_config
from optimum_modegpt.loading.source import Source

FLAGS = [part for key, value in RECIPE.items() for part in (f"--{key.replace('_', '-')}", str(value))]
CLOSED = "http://127.0.0.1:9"

COMMON = """
import json, sys
given = json.loads(sys.argv[1])
if given["hidden"]:
    sys.modules["optimum_modegpt"] = None  # an import fails, installed or not
else:
    import optimum_modegpt
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
torch.set_num_threads(1)
found, outputs, ids = {}, {}, torch.tensor(given["ids"])
def failure(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except Exception as error:
        return [type(error).__name__, str(error)]
def continued(pipe):
    return pipe("a", max_new_tokens=2, do_sample=False)[0]["generated_text"]
def load(key, name, **options):
    model = AutoModelForCausalLM.from_pretrained(name, **options)
    with torch.no_grad():
        outputs[key] = model(ids).logits.contiguous()
    return model
"""
END = """
from safetensors.torch import save_file
save_file(outputs, given["outputs"])
Path(given["found"]).write_text(json.dumps(found))
"""

PUSH = """
import contextlib, io
from optimum_modegpt import ModeGPTQuantizer
from optimum_modegpt.cli import main as cli
model, tokenizer = load("here", given["folder"]), AutoTokenizer.from_pretrained(given["folder"])
tokenizer.push_to_hub("user/small")  # with the template of transformers as its card
model.push_to_hub("user/small", tags=["mine"], commit_message="Smaller")
model.push_to_hub("user/sharded", max_shard_size="20KB")
tokenizer.push_to_hub("user/sharded")
model.push_to_hub("user/private", private=True)
model.push_to_hub("user/kept")
model.save_pretrained(given["saved"], push_to_hub=True, repo_id="user/saved")
found["refused"] = failure(model.push_to_hub, "user/refused")
found["wrong name"] = failure(model.push_to_hub, "user/..wrong")
found["of another"] = failure(model.push_to_hub, "other/small")
found["wrong token"] = failure(model.push_to_hub, "user/new", token="wrong")
with torch.no_grad():
    model.get_input_embeddings().weight.mul_(2)
model.push_to_hub("user/small", revision="wide")
commit = model.push_to_hub("user/small", create_pr=True)
found["pull request"] = [commit.pr_revision, commit.pr_url]
again = load("small", "user/small")
with torch.no_grad():
    again.get_input_embeddings().weight.mul_(3)
again.save_pretrained(given["changed"])
load("changed", given["changed"]).push_to_hub("user/changed")
with contextlib.redirect_stderr(io.StringIO()) as printed:
    found["code"] = cli.main(given["never"])
found["command"] = printed.getvalue()
quantizer = ModeGPTQuantizer(given["recipe"])
small = quantizer.quantize_model(AutoModelForCausalLM.from_pretrained("user/dense"), progress=False)
with torch.no_grad():
    outputs["quantized"] = small(ids).logits
found["quantized"] = quantizer.push_to_hub(small, "user/quantized", private=True, commit_message="By 30 %").oid
"""

PLACES = """
import tempfile
from optimum_modegpt.hub.upload import Upload
model, tokenizer = load("here", given["folder"]), AutoTokenizer.from_pretrained(given["folder"])
tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
work = Path(given["work"])
tokenizer.save_pretrained(work)
model.save_pretrained(work, push_to_hub=True, repo_id="user/work")
def same(repo, size, **options):
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    commit = model.push_to_hub(repo, max_shard_size=size, **options)
    load("found", repo, revision=commit.pr_revision or "main")
    with torch.no_grad():
        return torch.equal(outputs.pop("found"), model(ids).logits)
found["same"] = [same("user/sizes", size) for size in ("50GB", "20KB", "30KB", "50GB")]
found["same"].append(same("user/sizes", "20KB", create_pr=True))
model.save_pretrained(given["half"], variant="half", push_to_hub=True, repo_id="user/sizes")
load("half", "user/sizes", variant="half")
for repo in ("header", "template", "trainer", "proofread"):
    model.push_to_hub(f"user/{repo}")
model.push_to_hub("short")
tempfile.tempdir = tempfile.mkdtemp(dir=".")
found["broken"] = failure(Upload("user/broken").push_saved, lambda folder: (folder / "config.json").write_text("{}"))
found["left"] = [path.name for path in Path(tempfile.tempdir).iterdir()]
"""

ADAPTERS = """
from peft import LoraConfig
model = load("here", given["folder"])
model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
model.push_to_hub("user/adapter")
model.save_pretrained(given["saved"], push_to_hub=True, repo_id="user/adapter-saved")
"""

INTERRUPT = """
import os
Path(given["pid"]).write_text(str(os.getpid()))
try:
    load("here", given["folder"]).push_to_hub("user/held")
except KeyboardInterrupt as interrupt:
    found["interrupted"] = str(interrupt)
"""

LOAD = """
import contextlib, io
from huggingface_hub import snapshot_download
from optimum_modegpt.cli import main as cli
model = load("small", "user/small")
assert type(model).__module__.startswith("optimum_modegpt."), type(model)
load("sharded", "user/sharded")
load("wide", "user/small", revision="wide")
load("pull request", "user/small", revision="refs/pr/1")
load("private", "user/private")
load("quantized", "user/quantized")
found["private"] = failure(load, "none", "user/private", token=False)
found["tokens"] = AutoTokenizer.from_pretrained("user/small")("a b").input_ids
found["text"] = continued(pipeline("text-generation", model="user/small"))
found["files"] = sorted(path.name for path in Path(snapshot_download("user/small")).iterdir())
with contextlib.redirect_stdout(io.StringIO()) as printed:
    found["code"] = cli.main(["inspect", "user/sharded"])
found["inspect"] = printed.getvalue()
"""

OFFLINE = """
load("small", "user/small")
found["tokens"] = AutoTokenizer.from_pretrained("user/small")("a b").input_ids
found["text"] = continued(pipeline("text-generation", model="user/small"))
"""

REMOTE = """
found["refused"] = failure(load, "none", "user/saved")
found["forbidden"] = failure(load, "none", "user/saved", trust_remote_code=False)
model = load("small", "user/small", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
load("changed", "user/changed", trust_remote_code=True)
load("pull request", "user/small", revision="refs/pr/1", trust_remote_code=True)
found["text"] = continued(pipeline("text-generation", model="user/small", trust_remote_code=True))
"""


class Clients:
    """Start processes that know only the address of the Hub."""

    def __init__(self, hub: Hub, root: Path) -> None:
        self.hub, self.root = hub, root

    def python(
        self, script: str, home: str, *, hidden: bool = False, given: Mapping[str, Any] | None = None, **more: Any
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Run a script. Return its findings and its output tensors."""
        number = len(list(self.root.iterdir()))
        found, outputs = (self.root / f"{home}-{number}.{suffix}" for suffix in ("json", "safetensors"))
        files = {"found": str(found), "outputs": str(outputs)}
        arguments = {"hidden": hidden, "ids": tokens().tolist(), **files, **(given or {})}
        environment = self.hub.environment(self.root / home, **more)
        words = [json.dumps(arguments)]
        done = run_forked(COMMON + script + END, words, env=environment, cwd=self.root, isolated=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(found.read_text()), load_file(outputs)

    def run(self, words: list[str], home: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a command, and return the finished process."""
        return subprocess.run(
            words,
            cwd=self.root,
            env=self.hub.environment(self.root / home, **more),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def compress(self, repo: str, text: Path, *more: str) -> list[str]:
        """Return the words of a command that compresses user/dense and uploads the result."""
        output = str(self.root / repo.replace("/", "-"))
        start = [sys.executable, "-m", "optimum_modegpt", "compress", "user/dense", "--output", output]
        return [*start, "--dataset", str(text), *FLAGS, "--push-to-hub", repo, *more]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture(scope="module")
def clients(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Clients:
    return Clients(hub, tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def dense(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Upload a dense model, and return its commit."""
    folder = save_dense(tmp_path_factory.mktemp("dense"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Dense\n")
    files = {path.name: Blob(path.read_bytes(), path.suffix == ".safetensors") for path in folder.iterdir()}
    return hub.create("user/dense").commit("main", files)


@pytest.fixture(scope="module", autouse=True)
def dropped(hub: Hub, clients: Clients, dense: str, text: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a compression whose upload fails. It starts first because the library of the Hub retries for 30 seconds."""
    hub.dropped.add("user/dropped")
    words = clients.compress("user/dropped", text)
    environment = hub.environment(clients.root / "dropped")
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.fixture(scope="module")
def pushed(hub: Hub, clients: Clients, dense: str, text: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Push all models from one process. Return its findings and the outputs of the models."""
    folder, root = clients.root / "folder", clients.root
    compressed("llama-gqa-tied").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    kept = hub.create("user/kept")
    kept.commit("main", kept.files() | {"README.md": Blob(b"# Mine\n", False)})
    hub.refused.add("user/refused")
    folders = {"folder": str(folder), "saved": str(root / "saved"), "changed": str(root / "changed")}
    never = clients.compress("user/never", text, "--token", "wrong")[3:]
    recipe = RECIPE | {"dataset": str(text)}
    return clients.python(PUSH, "pusher", given=folders | {"never": never, "recipe": recipe})


def card_of(hub: Hub, repo: str, revision: str = "main") -> str:
    return hub.repos[repo].files(revision)["README.md"].data.decode()


def test_one_commit_has_everything(hub: Hub, pushed: tuple[dict[str, Any], Any]) -> None:
    code = {*SHARED_CODE, "modegpt_llama.py"}
    for repo in ("private", "sharded", "saved", "changed", "quantized"):
        repo = hub.repos[f"user/{repo}"]
        first = list(repo.commits.values())[1]
        assert {"config.json", "generation_config.json", "README.md", ".gitattributes", *code} <= first.keys()
        weights = [name for name in first if name.endswith(".safetensors")]
        assert all(first[name].large for name in weights)
        assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in first)
    assert len([name for name in hub.repos["user/sharded"].files() if name.endswith(".safetensors")]) > 1
    assert hub.repos["user/private"].private
    assert not hub.repos["user/small"].private
    assert len(hub.repos["user/private"].commits) == 2
    assert hub.asked("POST /api/validate-yaml")


def test_the_card_is_ours_and_names_the_import(hub: Hub, pushed: tuple[dict[str, Any], Any]) -> None:
    for repo in ("small", "sharded", "private", "saved", "changed", "quantized"):
        card = card_of(hub, f"user/{repo}")
        assert is_ours(card), repo
        beginning = "\n".join(ModelCard(card).text.splitlines()[:20])
        assert "import optimum_modegpt" in beginning
        assert "pip install" in beginning
        assert "trust_remote_code=True" in beginning
    assert "mine" in ModelCard(card_of(hub, "user/small")).data.tags
    card = ModelCard(card_of(hub, "user/quantized")).data
    assert card.base_model == "user/dense"
    assert card.license == "mit"


def test_a_readme_written_by_a_person_is_kept(hub: Hub, pushed: tuple[dict[str, Any], Any]) -> None:
    files = hub.repos["user/kept"].files()
    assert files["README.md"].data == b"# Mine\n"
    assert "model.safetensors" in files


def test_branches_and_pull_requests(hub: Hub, pushed: tuple[dict[str, Any], Any]) -> None:
    repo = hub.repos["user/small"]
    assert pushed[0]["pull request"] == ["refs/pr/1", f"{hub.url}/user/small/discussions/1"]
    assert repo.refs.keys() == {"main", "wide", "refs/pr/1"}
    weights = [repo.files(revision)["model.safetensors"].oid for revision in repo.refs]
    assert weights[0] != weights[1] == weights[2]


def test_a_compression_is_pushed_with_tokenizer_and_report(hub: Hub, pushed: tuple[dict[str, Any], Any]) -> None:
    files = hub.repos["user/quantized"].files(pushed[0]["quantized"])
    assert {"tokenizer.json", "tokenizer_config.json", "report.json"} <= files.keys()
    report = json.loads(files["report.json"].data)
    assert report["weight_bytes"] == len(files["model.safetensors"].data)
    assert report["requested_sparsity"] == RECIPE["sparsity"]


def test_a_new_process_loads_by_name(
    hub: Hub, clients: Clients, dense: str, pushed: tuple[dict[str, Any], dict[str, torch.Tensor]]
) -> None:
    found, outputs = clients.python(LOAD, "reader")
    expected = pushed[1]
    for key in ("small", "sharded", "private"):
        assert torch.equal(outputs[key], expected["here"]), key
    assert torch.equal(outputs["quantized"], expected["quantized"])
    assert torch.equal(outputs["wide"], outputs["pull request"])
    assert not torch.equal(outputs["wide"], expected["here"])
    assert found["tokens"] == tokenizer()("a b").input_ids
    assert found["text"].startswith("a")
    assert found["files"] == sorted(hub.repos["user/small"].files())
    error, words = found["private"]
    assert error == "OSError"
    assert "private" in words
    assert found["code"] == 0
    assert found["inspect"].startswith("modegpt_llama, ")

    offline, again = clients.python(OFFLINE, "reader", token=None, HF_HUB_OFFLINE="1", HF_ENDPOINT=CLOSED)
    assert torch.equal(again["small"], expected["here"])
    assert (offline["tokens"], offline["text"]) == (found["tokens"], found["text"])


def test_without_the_package_the_code_of_the_repository_loads_it(
    hub: Hub, clients: Clients, pushed: tuple[dict[str, Any], dict[str, torch.Tensor]]
) -> None:
    found, outputs = clients.python(REMOTE, "stranger", hidden=True, token=None)
    for key in ("refused", "forbidden"):
        error, words = found[key]
        assert error == "ValueError"
        assert "trust_remote_code=True" in words
    assert hub.asked("GET /user/saved/resolve/[^/]+/config.json")
    assert not hub.asked("/user/saved/resolve/.*safetensors"), "weights were fetched"
    expected = pushed[1]
    assert torch.equal(outputs["small"], expected["here"])
    assert torch.equal(outputs["changed"], expected["changed"])
    assert not torch.equal(outputs["changed"], expected["here"])
    assert outputs["pull request"].shape == expected["here"].shape
    assert found["text"].startswith("a")


# ----------------------------------------------------------------------------------------- existing repositories

GENERATED = {
    "header": "---\nlicense: mit\ntags:\n- mine\n---\n",
    "template": str(
        ModelCard.from_template(
            ModelCardData(library_name="transformers", tags=["mine"], license="mit"),
            model_description="This model card has been automatically generated.",
        )
    ),
    "trainer": """---
license: mit
tags:
- generated_from_trainer
- mine
---
<!-- This model card has been generated automatically according to the information the Trainer had access to. You
should probably proofread and complete it, then remove this comment. -->
# run
""",
}


@pytest.fixture(scope="module")
def placed(hub: Hub, clients: Clients) -> dict[str, Any]:
    """Push to existing repositories from one process, and return its findings."""
    folder, work = clients.root / "plain", clients.root / "work"
    compressed("llama-gqa-tied").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    work.mkdir()
    for name in ("credentials.json", "train.py", "notes.txt", "other.safetensors"):
        (work / name).write_text("{}")
    proofread = GENERATED["template"].replace("[More Information Needed]", "Written by me.", 10)
    for name, text in {**GENERATED, "proofread": proofread}.items():
        repo = hub.create(f"user/{name}")
        repo.commit("main", repo.files() | {"README.md": Blob(text.encode(), False)})
    kept = hub.create("user/sizes")
    kept.commit("main", kept.files() | {"model.gguf": Blob(b"x", True)})
    given = {"folder": str(folder), "work": str(work), "half": str(clients.root / "half")}
    return clients.python(PLACES, "placer", given=given)[0]


def test_existing_weights_are_not_read_instead_of_new_ones(hub: Hub, placed: dict[str, Any]) -> None:
    assert placed["same"] == [True] * 5
    weights = [name for name in hub.repos["user/sizes"].files() if name.startswith("model")]
    assert sorted(weights) == ["model.gguf", "model.half.safetensors", "model.safetensors"]


def test_nothing_but_the_model_is_published(hub: Hub, placed: dict[str, Any]) -> None:
    files = hub.repos["user/work"].files().keys()
    assert not files & {"credentials.json", "train.py", "notes.txt", "other.safetensors"}
    assert {"model.safetensors", "tokenizer.json", "additional_chat_templates/tools.jinja"} <= files


def test_a_generated_readme_is_replaced_and_its_header_kept(hub: Hub, placed: dict[str, Any]) -> None:
    for name in GENERATED:
        card = card_of(hub, f"user/{name}")
        assert is_ours(card), name
        assert ModelCard(card).data.license == "mit"
        assert {"mine", "modegpt"} <= {*ModelCard(card).data.tags}
    assert "Written by me." in card_of(hub, "user/proofread")


def test_the_card_names_the_whole_repository(hub: Hub, placed: dict[str, Any]) -> None:
    assert '"user/short"' in card_of(hub, "user/short")


def test_a_failed_save_leaves_no_folder(hub: Hub, placed: dict[str, Any]) -> None:
    assert placed["broken"][0] == "OutputError"
    assert placed["left"] == []


@own_adapters()
def test_adapters_are_pushed_as_adapters(hub: Hub, clients: Clients) -> None:
    folder = clients.root / "under-adapters"
    compressed("llama-gqa-tied").save_pretrained(folder)
    clients.python(ADAPTERS, "adapter", given={"folder": str(folder), "saved": str(clients.root / "adapter-saved")})
    for repo in ("user/adapter", "user/adapter-saved"):
        files = hub.repos[repo].files().keys()
        assert {"adapter_config.json", "adapter_model.safetensors"} <= files
        assert not {"config.json", "model.safetensors"} & files


# --------------------------------------------------------------------------------------------------------- failures


def resume_upload(clients: Clients, message: str, home: str) -> Path:
    """Run the command that a message advises, and return the folder that it names."""
    command = re.search(r"^.*To resume: (hf upload .*)$", message, flags=re.MULTILINE)
    assert command, message
    words = command[1].split()
    done = clients.run([sys.executable, "-m", "huggingface_hub.cli.hf", *words[1:]], home)
    assert done.returncode == 0, done.stderr
    return Path(words[3])


def check_uploaded(hub: Hub, repo: str, folder: Path) -> None:
    files = hub.repos[repo].files()
    assert {path.name for path in folder.iterdir()} == files.keys() - {".gitattributes"}
    assert all(files[path.name].data == path.read_bytes() for path in folder.iterdir())


def test_a_refused_upload_keeps_the_folder_and_advises_a_command(
    hub: Hub, clients: Clients, pushed: tuple[dict[str, Any], dict[str, torch.Tensor]]
) -> None:
    error, words = pushed[0]["refused"]
    assert error == "UploadError"
    assert words.startswith("user/refused was not updated: 403 Forbidden: You have exceeded your storage quota.")
    assert list(hub.repos["user/refused"].files()) == [".gitattributes"]
    hub.refused.clear()
    folder = resume_upload(clients, words, "pusher")
    check_uploaded(hub, "user/refused", folder)
    assert load(hub.repos["user/refused"].files()["model.safetensors"].data).keys()


def test_impossible_uploads_are_refused_before_the_work(
    hub: Hub, clients: Clients, pushed: tuple[dict[str, Any], Any]
) -> None:
    found = pushed[0]
    assert {found[key][0] for key in ("wrong name", "of another", "wrong token")} == {"OutputError"}
    assert "'user/..wrong'" in found["wrong name"][1]
    assert "--create-pr" in found["of another"][1]
    assert "Invalid user token" in found["wrong token"][1]
    assert found["code"] == 2
    assert found["command"] == "error: cannot push to 'user/never': Invalid user token.\n"
    assert not hub.repos.keys() & {"user/..wrong", "other/small", "user/new", "user/never"}
    assert not (clients.root / "user-never").exists()


def test_the_command_uploads(hub: Hub, clients: Clients, dense: str, text: Path) -> None:
    done = clients.run(clients.compress("user/command", text, "--private", "--create-pr"), "command")
    assert done.returncode == 0, done.stderr
    assert f"uploaded: {hub.url}/user/command/discussions/1\n" in done.stdout
    repo, folder = hub.repos["user/command"], clients.root / "user-command"
    assert repo.private
    assert list(repo.files()) == [".gitattributes"]
    files = repo.files("refs/pr/1")
    assert all(files[path.name].data == path.read_bytes() for path in folder.iterdir())
    record = load_config(Source(str(folder))).modegpt
    assert (record["base_model"], record["base_revision"]) == ("user/dense", dense)


def test_a_dropped_connection_keeps_the_folder_and_advises_a_command(
    hub: Hub, clients: Clients, dropped: subprocess.Popen[str]
) -> None:
    printed, errors = dropped.communicate(timeout=120)
    assert dropped.returncode == 2, errors
    folder = clients.root / "user-dropped"
    assert f"saved in {folder}" in printed
    assert "error: user/dropped was not updated: " in errors
    assert len(hub.asked("PUT /lfs/user/dropped")) > 1
    assert list(hub.repos["user/dropped"].files()) == [".gitattributes"]
    hub.dropped.clear()
    assert resume_upload(clients, errors, "dropped") == folder
    check_uploaded(hub, "user/dropped", folder)


def test_an_interrupted_upload_keeps_the_folder_and_advises_a_command(hub: Hub, clients: Clients) -> None:
    folder, pid = clients.root / "to-interrupt", clients.root / "pid"
    compressed("llama-gqa-tied").save_pretrained(folder)
    hub.held.add("user/held")

    def interrupt() -> None:
        while not hub.asked("POST /api/models/user/held/commit") and not hub.released.wait(timeout=0.1):
            pass
        if not hub.released.is_set():
            os.kill(int(pid.read_text()), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        found, _ = clients.python(INTERRUPT, "interrupted", given={"folder": str(folder), "pid": str(pid)})
    finally:
        hub.released.set()
        hub.held.clear()
    thread.join()
    assert found["interrupted"].startswith("user/held was not updated.\n")
    assert list(hub.repos["user/held"].files()) == [".gitattributes"]
    check_uploaded(hub, "user/held", resume_upload(clients, found["interrupted"], "interrupted"))


@pytest.mark.parametrize(
    "lost",
    [
        "model.safetensors",
        "modegpt_common.py",
        "modegpt_contract.py",
        "modegpt_family.py",
        "modegpt_files.py",
        "modegpt_llama.py",
        "config.json",
    ],
)
def test_an_incomplete_folder_is_not_sent(lost: str, tmp_path: Path) -> None:
    compressed("llama-gqa-tied").save_pretrained(tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(OutputError, match=re.escape(lost)):
        Upload("user/name").push(tmp_path)


def test_links_are_not_sent(tmp_path: Path) -> None:
    """A link may point to any file, and a folder of links would upload nothing."""
    compressed("llama-gqa-tied").save_pretrained(tmp_path / "real")
    (tmp_path / "links").mkdir()
    for path in (tmp_path / "real").iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    with pytest.raises(OutputError, match=r"lacks config\.json.*links"):
        Upload("user/name").push(tmp_path / "links")


def test_a_dense_model_is_not_sent(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(OutputError, match="not a compressed model"):
        Upload("user/name").push(tmp_path)
