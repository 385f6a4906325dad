"""Test that models load completely: all weights, their own head and tokenizer, and the requested revision."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import RECIPE, save_dense, save_text
from forks import run_forked
from hub import Blob, Hub, serving
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny_models import tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaModel,
    PreTrainedTokenizerFast,
    XGLMConfig,
    XGLMForCausalLM,
)

from optimum_modegpt import CalibrationDataError, ModeGPTConfig, ModeGPTModelForCausalLM, ModeGPTQuantizer
from optimum_modegpt.cli import main as cli
from optimum_modegpt.loading.source import Source
from optimum_modegpt.modeling import DENSE_TYPES
from optimum_modegpt.report import count_parameters

FLAGS = [part for key, value in RECIPE.items() for part in (f"--{key.replace('_', '-')}", str(value))]
LOST = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    root = tmp_path_factory.mktemp("models")
    command("compress", save_dense(root / "dense"), "--output", root / "compressed", "--dataset", text, *FLAGS)
    return root / "compressed"


def command(*words: Any) -> None:
    """Run a command that succeeds."""
    assert cli.main([str(word) for word in words]) == 0


def refusal(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """Run a command that fails, and return its error."""
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    return capsys.readouterr().err.partition("error: ")[2]


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Change the tensors of a saved model in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ----------------------------------------------------------------------------------------------- incomplete checkpoints


def commands(dense: Path, compressed: Path, text: Path, folder: Path) -> dict[str, list[Any]]:
    """Return the words of every command that loads the dense model."""
    (folder / "prompts.txt").write_text("the cat\na dog\n")
    windows = ["--dataset", text, "--sequence-length", 32]
    return {
        "compress": ["compress", dense, "--output", folder / "out", "--dataset", text, *FLAGS],
        "evaluate": ["evaluate", dense, *windows],
        "reference": ["evaluate", compressed, "--reference", dense, *windows],
        "compare": ["compare", dense, compressed, "--prompts", folder / "prompts.txt"],
        "teacher": ["recover", compressed, "--teacher", dense, "--output", folder / "out", *windows],
        "benchmark": ["benchmark", dense],
        "benchmark reference": ["benchmark", compressed, "--reference", dense],
    }


@pytest.mark.parametrize("name", commands(Path(), Path(), Path(), Path("/tmp")))
def test_no_command_runs_on_weights_that_transformers_made_up(
    name: str, compressed: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = edit(save_dense(tmp_path / "lacking"), lambda tensors: tensors.pop(LOST))
    message = refusal(capsys, *commands(folder, compressed, text, tmp_path)[name])
    assert f"{str(folder)!r} cannot be loaded: LlamaForCausalLM: the checkpoint does not fit" in message
    assert f"missing: {LOST}\nThe folder is incomplete or was edited; save or download it again." in message
    assert not (tmp_path / "out").exists()


def test_tensors_of_other_shapes_are_named_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[LOST] = torch.zeros(3, 32)
        del tensors["model.norm.weight"]

    message = refusal(capsys, "benchmark", edit(save_dense(tmp_path), change))
    assert "missing: model.norm.weight\n" in message
    assert f"wrong shape: {LOST} is (3, 32), the configuration says (48, 32)\n" in message


def test_the_first_twenty_names_are_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "benchmark", edit(save_dense(tmp_path), lambda tensors: tensors.clear()))
    assert message.count("missing: ") == 20
    assert "… and 10 more" in message  # of 29 tensors, and the tied head


def test_a_checkpoint_without_a_head_is_refused_unless_it_is_tied(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, lacks_head in (("llama-gqa-tied", False), ("llama-mha", True)):
        folder = save_dense(tmp_path / name, name)
        LlamaModel.from_pretrained(folder).save_pretrained(folder)
        words = ["evaluate", folder, "--dataset", text, "--max-windows", 1]
        if lacks_head:
            assert "missing: lm_head.weight\n" in refusal(capsys, *words)
        else:
            command(*words)


def test_tensors_that_the_model_does_not_use_are_a_warning_of_one_line(
    tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {f"mtp.{index}": torch.zeros(1) for index in range(7)}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # as old checkpoints have it
    folder = edit(save_dense(tmp_path), lambda tensors: tensors.update(extra))
    command("evaluate", folder, "--dataset", text, "--max-windows", 1)
    (line,) = [record.message for record in caplog.records if "does not use" in record.message]
    assert line.endswith("they are ignored: mtp.0, mtp.1, mtp.2, mtp.3, mtp.4 and 2 more.")


def test_a_model_below_an_adapter_is_read_as_strictly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    dense, adapter = save_dense(tmp_path / "dense"), tmp_path / "adapter"
    adapted: Any = AutoModelForCausalLM.from_pretrained(dense)
    peft.get_peft_model(adapted, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    words = ["benchmark", adapter, "--batch-sizes", 1, "--prompt-lengths", 8, "--new-tokens", 2, "--repeats", 1]
    command(*words)
    edit(dense, lambda tensors: tensors.pop(LOST))
    assert f"missing: {LOST}" in refusal(capsys, *words)


# -------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize(("name", "says"), [("llama-gqa-tied", True), ("opt", True), ("opt", None)])
def test_a_head_in_the_file_is_kept_and_counted_everywhere(
    name: str, says: bool | None, text: Path, tmp_path: Path
) -> None:
    """`says` is `tie_word_embeddings` of the configuration; without the key, OPT is tied."""
    dense, output = save_dense(tmp_path / "dense", name), tmp_path / "out"
    edit(dense, lambda tensors: tensors.update({"lm_head.weight": torch.randn(260, 32) / 6}))
    if says is None:
        values = json.loads((dense / "config.json").read_text())
        del values["tie_word_embeddings"]
        (dense / "config.json").write_text(json.dumps(values))
    command("compress", dense, "--output", output, "--dataset", text, *FLAGS, "--sparsity", 0)
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (dense, output))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(after(ids).logits, before(ids).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    parameters = count_parameters(before)
    assert count_parameters(after) == parameters
    for verb, more in (("inspect", []), ("evaluate", ["--dataset", text, "--max-windows", 1])):
        command(verb, output, "--json", tmp_path / "found.json", *more)
        assert json.loads((tmp_path / "found.json").read_text())["parameters"] == parameters
    report = json.loads((output / "report.json").read_text())["parameters"]
    record = json.loads((output / "config.json").read_text())["modegpt"]["achieved"]["parameters"]
    assert report == record
    assert report["total_before"] == report["total_after"] == parameters
    assert f"{parameters:,}" in (output / "README.md").read_text()


# ----------------------------------------------------------------------------------------------------------- tokenizers


def turned() -> PreTrainedTokenizerFast:
    """Return the tiny tokenizer with the ids of the bytes shifted by one."""
    stored = json.loads(tokenizer().backend_tokenizer.to_str())
    ids = stored["model"]["vocab"]
    stored["model"]["vocab"] = {token: index if index < 3 else 3 + (index - 2) % 256 for token, index in ids.items()}
    backend = Tokenizer.from_str(json.dumps(stored))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def with_changes(**changes: Any) -> PreTrainedTokenizerFast:
    """Return the tiny tokenizer with other attributes."""
    changed = tokenizer()
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def lowercased() -> PreTrainedTokenizerFast:
    """Return the tiny tokenizer with another normaliser, so that the same text has other tokens."""
    stored = json.loads(tokenizer().backend_tokenizer.to_str())
    stored["normalizer"] = {"type": "Lowercase"}
    backend = Tokenizer.from_str(json.dumps(stored))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


FOREIGN: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str]] = {
    "tokens": (turned, "256 tokens of the vocabulary"),
    "special token": (lambda: with_changes(eos_token="<s>"), "eos_token '<s>' (id 1) instead of '</s>' (id 2)"),
    "one more": (lambda: with_changes(unk_token="a"), "unk_token 'a' (id 67) instead of none"),
    "normaliser": (lowercased, "the way in which it splits a text into tokens"),
    "template": (lambda: with_changes(chat_template="{{ messages }}"), "the chat template"),
}
SHARED = ["--dataset", "TEXT", "--sequence-length", 32, "--max-windows", 2]
USES: dict[str, list[Any]] = {
    "compress": ["compress", "DENSE", "--output", "OUT", "--dataset", "TEXT", *FLAGS],
    "evaluate": ["evaluate", "DENSE", *SHARED],
    "reference": ["evaluate", "SMALL", "--reference", "DENSE", *SHARED],
    "compare": ["compare", "DENSE", "SMALL", "--prompts", "PROMPTS", "--max-new-tokens", 2],
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", FOREIGN)
def test_the_tokenizer_of_another_model_is_refused_or_allowed_on_purpose(
    kind: str,
    use: str,
    compressed: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    make, difference = FOREIGN[kind]
    make().save_pretrained(tmp_path / "foreign")
    (tmp_path / "prompts.txt").write_text("the cat\n")
    named: dict[Any, Path] = {
        "DENSE": compressed.with_name("dense"),
        "SMALL": compressed,
        "OUT": tmp_path / "out",
        "TEXT": text,
    }
    named["PROMPTS"] = tmp_path / "prompts.txt"
    words = [named.get(word, word) for word in (*USES[use], "--tokenizer", tmp_path / "foreign")]
    message = refusal(capsys, *words)
    assert f"It differs in: {difference}. Omit" in message
    assert "--allow-foreign-tokenizer" in message
    assert not (tmp_path / "out").exists()
    caplog.clear()
    command(*words, "--allow-foreign-tokenizer")
    assert f"It differs in: {difference}." in caplog.text


@pytest.mark.parametrize("kind", FOREIGN)
def test_the_api_holds_to_the_same(kind: str, compressed: Path, text: Path, tmp_path: Path) -> None:
    dense = compressed.with_name("dense")
    foreign, difference = FOREIGN[kind][0](), FOREIGN[kind][1]
    foreign.save_pretrained(tmp_path)
    recipe = {**RECIPE, "dataset": str(text)}
    for given in (foreign, str(tmp_path)):
        config = ModeGPTConfig(**recipe, tokenizer=given)
        for call in (
            lambda given=given: ModeGPTQuantizer(recipe).compress_model(load(dense), given),
            lambda config=config: ModeGPTQuantizer(config).compress_model(load(dense)),
            lambda config=config: AutoModelForCausalLM.from_pretrained(dense, compression_config=config),
            lambda config=config: AutoModelForCausalLM.from_pretrained(dense, quantization_config=config),
            lambda config=config: ModeGPTModelForCausalLM.from_pretrained(dense, compression_config=config),
        ):
            with pytest.raises(CalibrationDataError, match=re.escape(f"differs in: {difference}")):
                call()


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def calibration(folder: Path) -> dict[str, Any]:
    """Return the calibration record, which is the same in configuration and report."""
    record = json.loads((folder / "config.json").read_text())["modegpt"]["calibration"]
    assert json.loads((folder / "report.json").read_text())["calibration"] == record
    return record


def test_the_record_says_which_tokenizer_it_was(
    compressed: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = json.dumps(sorted(tokenizer().get_vocab().items()))
    own = {"tokenizer": "dense", "vocabulary_sha256": hashlib.sha256(vocabulary.encode()).hexdigest()}
    assert calibration(compressed).items() >= {**own, "chat_template_sha256": None}.items()
    assert "foreign_tokenizer" not in calibration(compressed)
    command("inspect", compressed)
    assert f"tokenizer dense, sha256 of its vocabulary {own['vocabulary_sha256']}\n" in capsys.readouterr().out

    foreign, output = tmp_path / "foreign", tmp_path / "out"
    with_changes(chat_template="{{ messages }}").save_pretrained(foreign)
    words = ["compress", compressed.with_name("dense"), "--output", output, "--dataset", text, *FLAGS]
    command(*words, "--tokenizer", foreign, "--allow-foreign-tokenizer")
    template = hashlib.sha256(b"{{ messages }}").hexdigest()
    expected = own | {
        "tokenizer": "foreign",
        "chat_template_sha256": template,
        "foreign_tokenizer": "the chat template",
    }
    assert calibration(output).items() >= expected.items()
    capsys.readouterr()
    command("inspect", output)
    printed = capsys.readouterr().out
    assert (
        f"tokenizer foreign, sha256 of its vocabulary {own['vocabulary_sha256']}, of its chat template {template}"
        in printed
    )
    assert "not the dense model's own: it differs in the chat template\n" in printed
    assert "--tokenizer foreign --allow-foreign-tokenizer" in " ".join((output / "README.md").read_text().split())


def test_a_padding_token_that_was_added_is_no_difference(tmp_path: Path, text: Path) -> None:
    dense, bare = save_dense(tmp_path / "dense"), tokenizer()
    bare.pad_token = None
    bare.save_pretrained(dense)
    for pad in ("</s>", "<added>"):
        given = AutoTokenizer.from_pretrained(dense)
        given.add_special_tokens({"pad_token": pad})
        ModeGPTQuantizer(dataset=str(text), **RECIPE).compress_model(load(dense), given, progress=False)


def test_a_model_without_a_tokenizer_takes_any_and_says_so(
    compressed: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(compressed.with_name("dense")).save_pretrained(tmp_path / "bare")
    turned().save_pretrained(tmp_path / "other")
    words = ["compress", tmp_path / "bare", "--output", tmp_path / "out", "--dataset", text, *FLAGS]
    command(*words, "--tokenizer", tmp_path / "other")
    assert "bare' has no readable tokenizer of its own, so the chosen one was not compared with it." in caplog.text
    assert calibration(tmp_path / "out")["tokenizer"] == "other"


# ---------------------------------------------------------------------------------------------------------- Hub


UNKNOWN_FAMILY = """
from transformers import AutoModelForCausalLM, XGLMForCausalLM
from optimum_modegpt import ModeGPTConfig, ModeGPTModelForCausalLM, UnsupportedModel
given, config = sys.argv[1], ModeGPTConfig(dataset=[[1, 2]])
for load in (
    lambda: AutoModelForCausalLM.from_pretrained(given, quantization_config=config),
    lambda: XGLMForCausalLM.from_pretrained(given, quantization_config=config),
    lambda: AutoModelForCausalLM.from_pretrained(given, compression_config=config),
    lambda: ModeGPTModelForCausalLM.from_pretrained(given, compression_config=config),
):
    try:
        load()
    except UnsupportedModel as error:
        print(error)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


def client(code: str, *words: Any, **environment: str) -> Any:
    """Run Python in a new process, which may use another Hub or cache."""
    return run_forked(f"import sys\n{code}", [*map(str, words)], env=environment)


def test_an_unknown_family_is_refused_before_its_weights_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    XGLMForCausalLM(XGLMConfig(num_layers=1, attention_heads=2, d_model=8, ffn_dim=8, vocab_size=260)).save_pretrained(
        tmp_path / "xglm"
    )
    files = {
        path.name: Blob(path.read_bytes(), path.suffix == ".safetensors") for path in (tmp_path / "xglm").iterdir()
    }
    hub.create("user/xglm").commit("main", files)
    done = client(UNKNOWN_FAMILY, "user/xglm", **hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"model_type 'xglm' is not supported; known: {', '.join(DENSE_TYPES)}") == 4
    assert hub.asked(r"user/xglm/resolve/.*/config\.json")
    assert not hub.asked(r"\.safetensors|\.bin")


COMMIT = "0123456789abcdef0123456789abcdef01234567"
OFFLINE = """
from optimum_modegpt.cli import main as cli
for verb in ("evaluate", "inspect", "estimate", "benchmark"):
    assert cli.main([verb, "user/dense", "--revision", "v2"]) == 2
"""


def cached(home: Path, dense: Path) -> Path:
    """Create a cache of the Hub with one revision of user/dense."""
    snapshot = home / "hub" / "models--user--dense" / "snapshots" / COMMIT
    shutil.copytree(dense, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    return home / "hub"


def test_a_revision_that_is_not_cached_is_named_with_those_that_are(compressed: Path, tmp_path: Path) -> None:
    cache = cached(tmp_path, compressed.with_name("dense"))
    done = client(OFFLINE, **os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    expected = (
        f"\nRequested revision: v2. In the cache {cache}: main, {COMMIT}.\n"
        "HF_HUB_OFFLINE is set, so nothing is downloaded. Unset it, or set HF_HOME to another cache.\n"
    )
    assert done.stderr.count(expected) == 4


def test_a_cache_is_named_with_its_revisions(compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cached(tmp_path, compressed.with_name("dense"))
    other = cache / "models--user--dense" / "snapshots" / ("f" * 40)
    other.mkdir()
    report = Source("user/dense", {"cache_dir": cache}).cache_report()
    assert f"main, {COMMIT}, {other.name}.\nHF_HUB_OFFLINE" in report
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert (
        Source("user/dense", {"cache_dir": cache})
        .cache_report()
        .endswith("set HF_HUB_OFFLINE=1; HF_HOME sets the folder of the cache.")
    )
    report = Source("user/dense", {"cache_dir": tmp_path / "none"}).cache_report()
    assert f"Requested revision: main. In the cache {tmp_path}/none: no revision of this model.\n" in report
    assert Source(str(tmp_path)).cache_report() == ""
