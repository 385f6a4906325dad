"""Test that hostile model folders are refused with a clear error, run no code and use no excessive memory."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import run_forked
from hub import LARGE, Blob, serving
from safetensors.torch import load_file, save_file
from tiny_models import compressed, dense, tokenizer, tokens
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from optimum_modegpt import EvaluationError, ModeGPTModelForCausalLM
from optimum_modegpt.cli import main as cli
from optimum_modegpt.report import REPORT_VERSION, Report

MEMORY = 64 * 2**20
"""The most bytes of Python objects that a refusal may allocate, including the import of a module."""


class Payload:
    """Create a folder when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save read-only models: "llama", "opt", "qwen2", and "sharded" in several shards."""
    root = tmp_path_factory.mktemp("originals")
    for name, variant in (("llama", "llama-gqa-tied"), ("opt", "opt"), ("qwen2", "qwen2-mixed-window")):
        compressed(variant).save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    compressed("llama-gqa-tied").save_pretrained(root / "sharded", max_shard_size="20KB")
    tokenizer().save_pretrained(root / "sharded")
    return root


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    """Return a path that hostile code would create, and check that it does not exist at the end."""
    path = tmp_path / "owned"
    yield path
    assert not path.exists(), "hostile code ran"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 50)
    return path


def save_dense(folder: Path, name: str = "llama-gqa-tied") -> Path:
    dense(name).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def copy_of(root: Path, name: str, target: Path) -> Path:
    return shutil.copytree(root / name, target)


def edit(folder: Path, file: str = "config.json", **values: Any) -> Path:
    """Change keys of a JSON file in place."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Run a command that must fail and return its error message."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return errors[errors.index("error: ") :]


def loads_fail(folder: Path, match: str, error: type[Exception] = ValueError) -> None:
    """Check that every Auto class refuses the folder with the same message."""
    for load in (AutoModelForCausalLM, AutoModel, ModeGPTModelForCausalLM):
        with pytest.raises(error, match=match):
            load.from_pretrained(folder)


# -------------------------------------------------------------------------------------------------------------- pickles


def pickle_weights(folder: Path, trace: Path, *, sharded: bool = False) -> None:
    """Replace the safetensors by pickles with a payload."""
    weights = folder / "model.safetensors"
    state: dict[str, Any] = dict(load_file(weights))
    weights.unlink()
    file = folder / ("pytorch_model-00001-of-00001.bin" if sharded else "pytorch_model.bin")
    torch.save(state | {"payload": Payload(trace)}, file)
    if sharded:
        index = {"metadata": {}, "weight_map": dict.fromkeys(state, file.name)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_payload_runs_when_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "owned")))
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_pickles_are_never_opened(
    sharded: bool, root: Path, tmp_path: Path, trace: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(root, "llama", tmp_path / "model")
    pickle_weights(folder, trace, sharded=sharded)
    loads_fail(folder, r"has no safetensors but pytorch_model.*A pickle can run code")
    for choice in ({"use_safetensors": False}, {"use_safetensors": False, "weights_only": False}):
        with pytest.raises(ValueError, match="leave out use_safetensors=False"):
            AutoModelForCausalLM.from_pretrained(folder, **choice)
    assert "A pickle can run code" in refused(capsys, "evaluate", folder, "--dataset", text)
    assert "no readable safetensors" in refused(capsys, "inspect", folder)


def test_pickles_never_replace_safetensors(root: Path, tmp_path: Path, trace: Path) -> None:
    """Try a pickle next to damaged safetensors, one named by the index and one named by the configuration."""
    damaged = copy_of(root, "llama", tmp_path / "damaged")
    whole = (damaged / "model.safetensors").read_bytes()
    pickle_weights(damaged, trace)
    (damaged / "model.safetensors").write_bytes(whole[:-10])
    loads_fail(damaged, r"model\.safetensors is cut off or damaged")

    indexed = copy_of(root, "llama", tmp_path / "indexed")
    keys = load_file(indexed / "model.safetensors").keys()
    pickle_weights(indexed, trace)
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "pytorch_model.bin")}
    (indexed / "model.safetensors.index.json").write_text(json.dumps(index))
    loads_fail(indexed, r"names 'pytorch_model.bin'; expected safetensors files of its own folder")

    named = copy_of(root, "llama", tmp_path / "named")
    pickle_weights(named, trace)
    (named / "pytorch_model.bin").rename(named / "adapter_model.bin")
    loads_fail(edit(named, transformers_weights="adapter_model.bin"), "transformers_weights.*no compressed model has")


def test_pickle_of_an_adapter_runs_no_code(root: Path, tmp_path: Path, trace: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    model = AutoModelForCausalLM.from_pretrained(root / "llama")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    torch.save({"payload": Payload(trace)}, tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises((pickle.UnpicklingError, FileNotFoundError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "lora")
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights.only"):
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "llama"), tmp_path / "lora")


def test_pickles_of_dense_models_are_read_as_weights_only(
    tmp_path: Path, trace: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dense models such as OPT may have no safetensors. torch then restores only tensors from the pickles."""
    folder = save_dense(tmp_path / "dense", "opt")
    expected = AutoModelForCausalLM.from_pretrained(folder)(tokens()).logits
    state: dict[str, Any] = dict(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(tokens()).logits, expected)
    recipe = ["--method", "paper", "--allocation", "uniform", "--num-samples", 4, "--sequence-length", 16]
    arguments = ["compress", folder, "--dataset", text, *recipe]
    assert cli.main([str(one) for one in [*arguments, "--output", tmp_path / "small"]]) == 0
    assert not {".bin", ".pt", ".pth", ".pkl"} & {path.suffix for path in (tmp_path / "small").rglob("*")}
    torch.save(state | {"payload": Payload(trace)}, folder / "pytorch_model.bin")
    assert "eights" in refused(capsys, *arguments, "--output", tmp_path / "never")
    assert not (tmp_path / "never").exists()


# ---------------------------------------------------------------------------------------------------------------- sizes

_COMMON = (
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "max_position_embeddings",
    "num_labels",
)
SIZES = {
    "llama": (*_COMMON, "num_key_value_heads", "head_dim", "intermediate_size"),
    "opt": (*_COMMON, "ffn_dim", "word_embed_proj_dim"),
    "qwen2": (*_COMMON, "num_key_value_heads", "intermediate_size"),
}
HARMLESS = {"max_position_embeddings": (33, 10**9), "num_labels": (33,)}
"""Values of fields that size no tensor and may be loaded. (OPT's positions are a table and do size one.)"""
HOSTILE = (10**12, 10**9, 0, -4, 33, "32", 32.0, float("nan"), float("inf"), True, [32], {"a": 1})


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Limit Python objects to `MEMORY` bytes, and make the allocation of a gigabyte a RuntimeError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    tracemalloc.start()
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, limits[1]))
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        tracemalloc.stop()


def test_memory_limit_works() -> None:
    with bounded(), pytest.raises(RuntimeError, match="alloc"):
        torch.empty(2**31, dtype=torch.uint8)


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in SIZES.items() for field in fields])
def test_hostile_sizes_are_refused(name: str, field: str, root: Path, tmp_path: Path) -> None:
    folder = copy_of(root, name, tmp_path / "model")
    for value in HOSTILE:
        fits = value in HARMLESS.get(field, ()) and (name, field) != ("opt", "max_position_embeddings")
        expectation = contextlib.nullcontext() if fits else pytest.raises(Exception, match=r"config|alidation|must be")
        with bounded(), expectation as caught:
            AutoModelForCausalLM.from_pretrained(edit(folder, **{field: value}))
        if caught is not None:
            # transformers checks the types of the dense class first.
            is_ours = isinstance(caught.value, ValueError)
            assert is_ours or "StrictDataclass" in type(caught.value).__name__, repr(caught.value)


def test_hostile_sizes_of_missing_tensors_are_refused(root: Path, tmp_path: Path) -> None:
    """transformers would initialize missing tensors with the sizes of the configuration."""
    folder = edit(copy_of(root, "llama", tmp_path / "model"), hidden_size=2**29, vocab_size=2**30)
    for keep in ("model.layers.0.self_attn.rope_index", "model.norm.weight"):
        state = load_file(root / "llama" / "model.safetensors")
        save_file({keep: state[keep]}, folder / "model.safetensors", metadata={"format": "pt"})
        with bounded():
            loads_fail(folder, r"missing: (model\.)?embed_tokens\.weight")


def entries(count: int) -> dict[str, Any]:
    widths = {"qk_head_dim": 4, "v_head_dim": 4, "head_dim": 4, "intermediate_size": 8}
    return {str(index): widths for index in range(count)}


@pytest.mark.parametrize(
    ("blocks", "match"),
    [
        (entries(20_000), "has 20000 entries; expected one for each of 3 blocks"),
        (entries(2), "has 2 entries; expected one for each of 3 blocks"),
        (entries(2) | {"x": {}}, "look at \\['2', 'x'\\]"),
        (entries(2) | {"-1": {}}, "look at \\['-1', '2'\\]"),
        (entries(2) | {"00": {}}, "look at \\['2'\\]"),
        ({}, "has 0 entries"),
        ([{}, {}, {}], "no object of objects"),
        ({"0": [], "1": [], "2": []}, "no object of objects"),
        ("all", "no object of objects"),
        (entries(2) | {"2": {"skip": ["attention"]}}, "has \\['skip'\\]; expected only"),
        (entries(2) | {"2": {"hidden_size": 10**9}}, "has \\['hidden_size'\\]; expected only"),
    ],
)
def test_hostile_widths_of_blocks_are_refused(blocks: Any, match: str, root: Path, tmp_path: Path) -> None:
    folder = edit(copy_of(root, "llama", tmp_path / "model"), per_layer_config=blocks)
    loads_fail(folder, match)


def test_too_many_blocks_are_refused(root: Path, tmp_path: Path) -> None:
    folder = copy_of(root, "llama", tmp_path / "model")
    loads_fail(edit(folder, num_hidden_layers=20_000, per_layer_config=entries(20_000)), r"in \[1, 4096\]")


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, "", "{", "[]", "null", '"modegpt_llama"', "\x00"]
)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_hostile_json_is_refused(
    file: str, content: str, root: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(root, "sharded", tmp_path / "model")
    (folder / file).write_text(content)
    for verb in ("inspect", "evaluate"):
        assert str(folder) in refused(capsys, verb, folder, *(["--dataset", text] if verb == "evaluate" else []))


@pytest.mark.parametrize("key", ["_auto_class", "auto_classes", "family", "widths", "save_pretrained", "_check_blocks"])
def test_configuration_cannot_override_attributes_of_its_class(key: str, root: Path, tmp_path: Path) -> None:
    """For example, a later save writes `auto_classes` as `auto_map`."""
    evil = {"AutoModelForCausalLM": "evil/repo--modeling.Evil"}
    loads_fail(edit(copy_of(root, "llama", tmp_path / "model"), **{key: evil}), f"config.json has \\['{key}'\\]")


@pytest.mark.parametrize("field", ["num_hidden_layers", "num_labels", "hidden_size"])
@pytest.mark.parametrize("name", ["llama-gqa-tied", "opt", "qwen2"])
def test_commands_refuse_dense_models_of_hostile_sizes(
    name: str, field: str, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = edit(save_dense(tmp_path / "dense", name), **{field: 10**12})
    for arguments in (
        ("inspect",),
        ("estimate",),
        ("evaluate", "--dataset", text),
        ("compress", "--dataset", text, "--output", tmp_path / "never"),
    ):
        with bounded():
            assert f"{field} is {10**12}" in refused(capsys, arguments[0], folder, *arguments[1:])
    assert not (tmp_path / "never").exists()


# ----------------------------------------------------------------------------------------------------------------- code


def plant(folder: Path, trace: Path) -> Path:
    """Add hostile files under every name from which transformers may import code."""
    code = f"import os\nos.mkdir({str(trace)!r})\nclass Evil: pass\n"
    for name in ("evil.py", "modegpt_llama.py", "modegpt_common.py", "modeling_evil.py", "tokenization_evil.py"):
        (folder / name).write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    return folder


@pytest.mark.parametrize("module", ["evil.Evil", "evil/repo--evil.Evil", "../evil.Evil", "modegpt_llama.Evil"])
@pytest.mark.parametrize("trust", [None, False])
def test_code_in_the_folder_is_not_run(
    module: str, trust: bool | None, root: Path, tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    autos = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    folder = plant(copy_of(root, "llama", tmp_path / "model"), trace)
    edit(folder, auto_map=dict.fromkeys(autos, module))
    for load in (AutoModelForCausalLM, AutoModel, ModeGPTModelForCausalLM):
        assert type(load.from_pretrained(folder, trust_remote_code=trust)).__module__.startswith("optimum_modegpt.")
    assert cli.main(["inspect", str(folder)]) == 0
    # A new save names and includes the code of the package.
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert "evil" not in (tmp_path / "again" / "config.json").read_text().lower()
    assert "evil" not in (tmp_path / "again" / "modegpt_llama.py").read_text().lower()


def test_classes_of_the_package_are_used_even_with_trust_remote_code(root: Path, tmp_path: Path, trace: Path) -> None:
    folder = copy_of(root, "llama", tmp_path / "model")
    plant(folder, trace)
    shutil.rmtree(folder / "custom_generate")  # transformers runs this with trust_remote_code=True
    for module in ("evil.Evil", "evil/repo--evil.Evil"):
        edit(folder, auto_map=dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), module))
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__module__ == "optimum_modegpt.modeling.modegpt_llama"


def test_tokenizer_code_is_not_run(
    root: Path, tmp_path: Path, trace: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = plant(copy_of(root, "llama", tmp_path / "model"), trace)
    edit(
        folder,
        "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]},
        tokenizer_class="Evil",
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert "no tokenizer could be loaded" in refused(capsys, "evaluate", folder, "--dataset", text)


def test_chat_templates_are_sandboxed(root: Path, tmp_path: Path, trace: Path) -> None:
    folder = copy_of(root, "llama", tmp_path / "model")
    escape = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.mkdir('" + str(trace) + "') }}"
    )
    (folder / "chat_template.jinja").write_text(escape)
    with pytest.raises(Exception, match="unsafe"):
        AutoTokenizer.from_pretrained(folder).apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


def test_model_folder_cannot_request_compression(tmp_path: Path, text: Path) -> None:
    """Otherwise the folder would choose the text that is read and the time that it takes."""
    folder = save_dense(tmp_path / "dense")
    edit(folder, quantization_config={"quant_method": "modegpt", "dataset": str(text), "method": "paper"})
    with pytest.raises(ValueError, match="Only the caller can request one"):
        AutoModelForCausalLM.from_pretrained(folder)


# -------------------------------------------------------------------------------------------------------------- damage


def lengthened(data: bytes, length: int) -> bytes:
    """Return a safetensors file that states another length of its header."""
    return struct.pack("<Q", length) + data[8:]


def reheaded(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return a safetensors file with a changed header."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def overlap(header: dict[str, Any]) -> None:
    first, second = [entry for name, entry in header.items() if name != "__metadata__"][:2]
    second["data_offsets"] = first["data_offsets"]


def beyond(header: dict[str, Any]) -> None:
    next(entry for name, entry in header.items() if name != "__metadata__")["data_offsets"] = [0, 2**62]


def grow(header: dict[str, Any]) -> None:
    next(entry for name, entry in header.items() if name != "__metadata__")["shape"] = [2**40, 2**40]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut in the header's length": lambda data: data[:5],
    "cut in the header": lambda data: data[:100],
    "cut in the data": lambda data: data[: len(data) // 2],
    "cut by a byte": lambda data: data[:-1],
    "longer by a byte": lambda data: data + b"\0",
    "header of 2**60 bytes": lambda data: lengthened(data, 2**60),
    "header of 0 bytes": lambda data: lengthened(data, 0),
    "header longer than the file": lambda data: lengthened(data, len(data)),
    "zeros": lambda data: bytes(len(data)),
    "header that is not JSON": lambda data: data[:9] + b"!" + data[10:],
    "overlapping tensors": lambda data: reheaded(data, overlap),
    "tensors beyond the end of the file": lambda data: reheaded(data, beyond),
    "tensor larger than its bytes": lambda data: reheaded(data, grow),
    "HTML page": lambda data: b"<!doctype html><title>502 Bad Gateway</title>" * 40,
    "git-lfs pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_by_name(
    damage: str, root: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("llama", "sharded"):
        folder = copy_of(root, name, tmp_path / name)
        file = sorted(folder.glob("*.safetensors"))[-1]
        file.write_bytes(DAMAGE[damage](file.read_bytes()))
        with bounded():
            loads_fail(folder, f"{file.name} is cut off or damaged.*Save or download it again")
        for arguments in (("inspect",), ("evaluate", "--dataset", text)):
            message = refused(capsys, arguments[0], folder, *arguments[1:])
            assert f"{file.name} is cut off or damaged" in message


REMOTE = """
import json, sys
from pathlib import Path
import optimum_modegpt
from transformers import AutoModelForCausalLM
found = {}
for name in json.loads(sys.argv[1]):
    try:
        AutoModelForCausalLM.from_pretrained(f"user/{name}")
        found[name] = "loaded"
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
Path(sys.argv[2]).write_text(json.dumps(found))
"""


def test_hostile_models_of_the_hub_are_refused(root: Path, tmp_path: Path, trace: Path) -> None:
    """Load all models in one fresh process, since the address of the Hub is read at import."""
    whole = load_file(root / "llama" / "model.safetensors").keys()
    folders = {"valid": copy_of(root, "sharded", tmp_path / "valid")}
    for number, path in enumerate(("pytorch_model.bin", "../outside.safetensors", "a/b.safetensors")):
        folder = folders[f"astray{number}"] = copy_of(root, "llama", tmp_path / f"astray{number}")
        pickle_weights(folder, trace)
        index = {"metadata": {}, "weight_map": dict.fromkeys(whole, path)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    untyped = folders["astray-untyped"] = shutil.copytree(folders["astray0"], tmp_path / "untyped")
    edit(untyped, dtype=None)  # then transformers reads the dtype from a weights file
    damages = ("cut in the data", "cut in the header", "empty", "HTML page")
    for number, damage in enumerate(damages):
        folder = folders[f"damaged{number}"] = copy_of(root, "llama", tmp_path / f"damaged{number}")
        file = folder / "model.safetensors"
        file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with serving() as hub:
        for name, folder in folders.items():
            files = {path.name: Blob(path.read_bytes(), path.suffix in LARGE) for path in folder.iterdir()}
            hub.create(f"user/{name}").commit("main", files)
        words = [json.dumps([*folders]), str(tmp_path / "found.json")]
        run_forked(REMOTE, words, env=hub.environment(tmp_path / "home"), isolated=True).check_returncode()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.pop("valid") == "loaded"
    for name, message in found.items():
        expected = rf"the weights of 'user/{name}' are cut off or damaged .*force_download=True"
        if name.startswith("astray"):
            expected = r"model\.safetensors\.index\.json names .*; expected safetensors files of its own folder"
        assert re.match(rf"ValueError: .*{expected}", message), (name, message)


def test_missing_shards_are_refused_by_name(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of(root, "sharded", tmp_path / "model")
    file = sorted(folder.glob("*.safetensors"))[1]
    file.unlink()
    loads_fail(folder, f"names {file.name}, which is not there. Save or download the model again")
    assert file.name in refused(capsys, "inspect", folder)
    shutil.rmtree(folder)
    folder = copy_of(root, "sharded", tmp_path / "model")
    (folder / "model.safetensors.index.json").unlink()
    loads_fail(folder, r"no file named model\.safetensors", OSError)


@pytest.mark.parametrize("variant", [None, "half"])
def test_save_removes_weights_of_an_earlier_save(variant: str | None, tmp_path: Path) -> None:
    """transformers prefers one file to an index when it loads, and does not remove one when it saves the other."""
    model, others = compressed("llama-gqa-tied"), None if variant else "half"
    model.save_pretrained(tmp_path, variant=others)
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("model*")}
    for size in ("50GB", "20KB", "50GB", "30KB", "20KB"):
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(2)
        model.save_pretrained(tmp_path, max_shard_size=size, variant=variant)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, variant=variant)
        assert torch.equal(again(tokens()).logits, model(tokens()).logits), size
        names = {path.name for path in tmp_path.glob("model*")} - kept.keys()
        assert (size == "50GB") == (len(names) == 1), names
    assert all((tmp_path / name).read_bytes() == data for name, data in kept.items())


def test_failed_save_keeps_the_earlier_weights(root: Path, tmp_path: Path) -> None:
    folder = copy_of(root, "sharded", tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.glob("model*")}
    with pytest.raises(ValueError, match="Unit"):
        compressed("llama-gqa-tied").save_pretrained(folder, max_shard_size="wrong")
    compressed("llama-gqa-tied").save_pretrained(folder, is_main_process=False)
    assert {path.name: path.read_bytes() for path in folder.glob("model*")} == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 4.0])
def test_rope_index_without_integers_is_refused(value: float, root: Path, tmp_path: Path) -> None:
    folder = copy_of(root, "llama", tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    index = state["model.layers.0.self_attn.rope_index"].float()
    index[0, 0] = value
    state["model.layers.0.self_attn.rope_index"] = index
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    loads_fail(folder, r"rope_index has values outside \[0, 4\)")


# ------------------------------------------------------------------------------------------------------ paths, text


@pytest.mark.parametrize(
    "path", ["../outside.safetensors", "{outside}", "..\\outside.safetensors", "", ".", "a:b.safetensors", 3, None]
)
def test_index_with_paths_outside_its_folder_is_refused(
    path: Any, root: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = shutil.copy(root / "llama" / "model.safetensors", tmp_path / "outside.safetensors")
    folder = copy_of(root, "llama", tmp_path / "model")
    keys = load_file(folder / "model.safetensors").keys()
    (folder / "model.safetensors").unlink()
    name = path.format(outside=outside) if isinstance(path, str) else path
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, name)}))
    loads_fail(folder, r"expected safetensors files of its own folder")
    assert "of its own folder" in refused(capsys, "inspect", folder)
    dense_folder = save_dense(tmp_path / "dense")
    (dense_folder / "model.safetensors").unlink()
    shutil.copy(index, dense_folder)
    assert "of its own folder" in refused(capsys, "inspect", dense_folder)
    assert "of its own folder" in refused(capsys, "evaluate", dense_folder, "--dataset", text)


ESCAPE = "\x1b]0;owned\x07\x1b[2J\rremoved 99%\u202e\nremoved 99.00%\x9b31m"


def test_control_characters_of_a_model_are_escaped(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"format_version": 1, "base_model": ESCAPE, "base_revision": ESCAPE, "recipe": {ESCAPE: ESCAPE}}
    folder = edit(copy_of(root, "llama", tmp_path / "model"), modegpt=record, _name_or_path=ESCAPE)
    capsys.readouterr()
    assert cli.main(["inspect", str(folder), "--json", str(tmp_path / "found.json")]) == 0
    shown = capsys.readouterr().out
    assert "\\x1b[2J" in shown
    assert not set("\x1b\x07\r\x9b\u202e") & set(shown)
    assert not any(line.startswith("removed 99") for line in shown.splitlines())
    assert json.loads((tmp_path / "found.json").read_text())["record"]["base_model"] == ESCAPE
    message = refused(capsys, "inspect", edit(folder, model_type=ESCAPE))
    assert not set("\x1b\x07\r\x9b\u202e") & set(message)


@pytest.mark.parametrize("recipe", [[], "x", 3, {"sparsity": "x"}, {"sparsity": float("nan")}, {"a": {"b": [1]}}, None])
def test_inspect_accepts_any_stored_recipe(recipe: Any, root: Path, tmp_path: Path) -> None:
    record = {"format_version": 1, "base_model": ["x"], "recipe": recipe}
    assert cli.main(["inspect", str(edit(copy_of(root, "llama", tmp_path / "model"), modegpt=record))]) == 0


def test_suggested_command_is_quoted(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, dataset = tmp_path / "a; touch 'x'\n$(y)", tmp_path / "t `z`.txt"
    save_dense(model)
    shutil.copy(text, dataset)
    recipe = ["--method", "paper", "--allocation", "uniform", "--num-samples", "4", "--sequence-length", "16"]
    output = tmp_path / "o & p"
    assert cli.main(["compress", str(model), "--dataset", str(dataset), "--output", str(output), *recipe]) == 0
    shown = capsys.readouterr().out
    _, _, command = shown[shown.index("next, ") :].partition(": ")
    words = shlex.split(command)
    assert words[words.index("evaluate") :][:4] == ["evaluate", str(output), "--reference", str(model)]
    assert str(dataset) not in words, "the calibration text would give too low a perplexity"


# -------------------------------------------------------------------------------------------------------------- reports


@pytest.mark.parametrize("version", [REPORT_VERSION + 1, 10**9])
def test_reports_of_a_newer_version_are_refused(version: int, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"report_version": version, "anything": "else"}))
    with pytest.raises(EvaluationError, match=f"report_version {version}; the supported maximum is {REPORT_VERSION}"):
        Report.load(tmp_path / "report.json")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "3", "{}", '{"report_version": "1"}', '{"report_version": 1}']
)
def test_files_that_are_no_report_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(EvaluationError, match=r"report\.json is not a compression report"):
        Report.load(tmp_path / "report.json")
