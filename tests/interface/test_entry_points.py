"""Test that all entry points give the same compressed model and refuse the same input."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import RECIPE, save_dense, save_text
from forks import run_forked
from safetensors.torch import load_file, save_file
from tiny_configs import FAMILIES
from tiny_models import classes, dense, tokenizer, tokens
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    XGLMConfig,
    XGLMForCausalLM,
    pipeline,
)

from optimum_modegpt import (
    AlreadyCompressed,
    CalibrationDataError,
    InvalidConfig,
    ModeGPTConfig,
    ModeGPTModelForCausalLM,
    ModeGPTQuantizer,
    UnsupportedModel,
)
from optimum_modegpt.integration.keyword import install_keyword
from optimum_modegpt.loading.source import Source, default_dataset
from optimum_modegpt.modeling import DENSE_TYPES


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def config(text: Path) -> ModeGPTConfig:
    return ModeGPTConfig(dataset=str(text), **RECIPE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def expected(checkpoint: Path, config: ModeGPTConfig) -> PreTrainedModel:
    """Compress a loaded model with the quantizer."""
    return ModeGPTQuantizer(config).quantize_model(LlamaForCausalLM.from_pretrained(checkpoint))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory, expected: PreTrainedModel) -> Path:
    folder = tmp_path_factory.mktemp("compressed")
    expected.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def fields(config: ModeGPTConfig, **more: Any) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key != "quant_method"} | more


def from_pipeline(name: Path, config: ModeGPTConfig) -> PreTrainedModel:
    return pipeline("text-generation", model=str(name), model_kwargs={"compression_config": config}).model


def from_quantizer(name: Path, config: ModeGPTConfig) -> PreTrainedModel:
    quantizer = ModeGPTQuantizer.from_dict(ModeGPTQuantizer(**fields(config)).to_dict())
    return quantizer.compress_model(AutoModelForCausalLM.from_pretrained(name), tokenizer())


ENTRY_POINTS = {
    "Auto class, keyword": lambda n, c: AutoModelForCausalLM.from_pretrained(n, compression_config=c),
    "Auto class, dict": lambda n, c: AutoModelForCausalLM.from_pretrained(n, compression_config=fields(c)),
    "Auto class, both keywords, one None": lambda n, c: AutoModelForCausalLM.from_pretrained(
        n, compression_config=None, quantization_config=c
    ),
    "concrete class, keyword": lambda n, c: LlamaForCausalLM.from_pretrained(n, compression_config=c),
    "quantization_config": lambda n, c: AutoModelForCausalLM.from_pretrained(n, quantization_config=c),
    "quantization_config, dict": lambda n, c: LlamaForCausalLM.from_pretrained(
        n, quantization_config=fields(c, quant_method="modegpt")
    ),
    "own class": lambda n, c: ModeGPTModelForCausalLM.from_pretrained(n, compression_config=c),
    "own class, dict": lambda n, c: ModeGPTModelForCausalLM.from_pretrained(n, compression_config=fields(c)),
    "pipeline": from_pipeline,
    "quantizer from a dict, alias, tokenizer object": from_quantizer,
}


@pytest.mark.parametrize("entry", ENTRY_POINTS.values(), ids=ENTRY_POINTS.keys())
def test_every_entry_point_gives_the_same_model(
    entry: Any, checkpoint: Path, config: ModeGPTConfig, expected: PreTrainedModel
) -> None:
    model = entry(checkpoint, config)
    assert type(model) is type(expected)
    assert model.config.modegpt == expected.config.modegpt
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, expected(tokens()).logits)


@pytest.mark.parametrize("keyword", ["compression_config", "quantization_config"])
def test_compressed_model_is_not_marked_as_quantised(
    keyword: str, checkpoint: Path, config: ModeGPTConfig, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **{keyword: config})
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model, "quantization_method")
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(model.config, "_is_quantized")
    assert not model.training
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not {"quantization_config", "compression_config"} & saved.keys()
    assert model.to(torch.bfloat16).dtype is torch.bfloat16  # transformers refuses this for quantised models


def test_saved_model_can_be_reloaded(checkpoint: Path, compressed: Path, expected: PreTrainedModel) -> None:
    for reload in (AutoModelForCausalLM, ModeGPTModelForCausalLM):
        model = reload.from_pretrained(compressed)
        with torch.no_grad():
            assert torch.equal(model(tokens()).logits, expected(tokens()).logits)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, ModeGPTModelForCausalLM])
def test_compressed_model_is_refused(loader: Any, compressed: Path, config: ModeGPTConfig) -> None:
    with pytest.raises(AlreadyCompressed, match="already compressed"):
        loader.from_pretrained(compressed, compression_config=config)


def test_quantizer_refuses_a_compressed_model(compressed: Path, config: ModeGPTConfig) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    with pytest.raises(AlreadyCompressed):
        ModeGPTQuantizer(config).quantize_model(model)


@pytest.mark.parametrize("thing", ["Qwen/Qwen2.5-1.5B", None, torch.nn.Linear(2, 2)])
def test_quantizer_refuses_objects_that_are_no_model(thing: Any, config: ModeGPTConfig) -> None:
    with pytest.raises(InvalidConfig, match=f"expected a loaded PreTrainedModel, found {type(thing).__name__}"):
        ModeGPTQuantizer(config).quantize_model(thing)


def test_unknown_family_is_refused_before_weights_are_read(tmp_path: Path, config: ModeGPTConfig) -> None:
    small = XGLMConfig(num_layers=1, attention_heads=2, d_model=8, ffn_dim=8, vocab_size=260)
    XGLMForCausalLM(small).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"not weights")
    with pytest.raises(UnsupportedModel, match=f"'xglm' is not supported; known: {', '.join(DENSE_TYPES)}"):
        AutoModelForCausalLM.from_pretrained(tmp_path, compression_config=config)


def loaders(name: Path, config: ModeGPTConfig) -> list[Callable[[], Any]]:
    """Return functions that load and compress the model, one per entry point."""
    entries = [entry for title, entry in ENTRY_POINTS.items() if not title.startswith("quantizer")]
    return [partial(entry, name, config) for entry in entries]


@pytest.mark.parametrize("name", FAMILIES)
def test_model_with_missing_weights_is_refused(name: str, tmp_path: Path, config: ModeGPTConfig) -> None:
    folder = save_dense(tmp_path, name)
    model_class = classes(name)["AutoModelForCausalLM"]
    family = model_class.config_class.family
    lost = f"{model_class.base_model_prefix}.{family.blocks}.2.{family.mlp.output}.weight"
    tensors = load_file(folder / "model.safetensors")
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for load in loaders(folder, config) if issubclass(model_class, LlamaForCausalLM) else loaders(folder, config)[:1]:
        # UnsupportedModel is a ValueError; `pipeline` raises a ValueError with its message.
        with pytest.raises(ValueError, match=rf"cannot be loaded: .*\n *missing: {lost}\n *The folder is incomplete"):
            load()


def test_model_with_mismatched_weights_is_refused(tmp_path: Path, config: ModeGPTConfig) -> None:
    folder = save_dense(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.zeros(3, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"model\.embed_tokens\.weight"):
        AutoModelForCausalLM.from_pretrained(folder, compression_config=config, ignore_mismatched_sizes=True)


def test_missing_text_is_refused_before_weights_are_read(checkpoint: Path, tmp_path: Path) -> None:
    folder = save_dense(tmp_path)
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CalibrationDataError, match=r"nowhere.txt"):
        AutoModelForCausalLM.from_pretrained(folder, compression_config={"dataset": "nowhere.txt"})


def test_both_keywords_are_refused(checkpoint: Path, config: ModeGPTConfig) -> None:
    with pytest.raises(InvalidConfig, match="found both"):
        AutoModelForCausalLM.from_pretrained(checkpoint, compression_config=config, quantization_config=config)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity": 30}, r"sparsity=0\.3"),
        ({"sparsty": 0.3}, "Did you mean 'sparsity'"),
        ({"quant_method": "gptq"}, "gptq"),
        (0.3, "found float"),
    ],
)
def test_invalid_configuration_is_refused(given: Any, message: str, checkpoint: Path) -> None:
    with pytest.raises(InvalidConfig, match=message):
        AutoModelForCausalLM.from_pretrained(checkpoint, compression_config=given)


def test_quantised_model_is_refused(tmp_path: Path, config: ModeGPTConfig) -> None:
    folder = save_dense(tmp_path)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**stored, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ValueError, match="quantized with GPTQConfig"):
        AutoModelForCausalLM.from_pretrained(folder, compression_config=config)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"model": "cpu", "lm_head": "disk"}, "disk"),
        ({"": "meta"}, "meta"),
        ({"model": "cpu", "lm_head": 0}, "several devices"),
    ],
)
def test_device_map_with_several_devices_or_disk_is_refused(
    device_map: dict[str, Any], message: str, checkpoint: Path, config: ModeGPTConfig
) -> None:
    with pytest.raises(InvalidConfig, match=message):
        AutoModelForCausalLM.from_pretrained(checkpoint, compression_config=config, device_map=device_map)


def test_error_for_weights_on_disk_recommends_the_command(
    checkpoint: Path, config: ModeGPTConfig, tmp_path: Path
) -> None:
    with pytest.raises(InvalidConfig, match=r"weights on disk(.|\n)*optimum-cli modegpt compress MODEL --output DIR"):
        AutoModelForCausalLM.from_pretrained(
            checkpoint,
            compression_config=config,
            device_map="auto",
            max_memory={"cpu": 40_000},
            offload_folder=tmp_path,
        )


def test_device_map_with_one_device_is_accepted(
    checkpoint: Path, config: ModeGPTConfig, expected: PreTrainedModel
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, compression_config=config, device_map={"": "cpu"})
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, expected(tokens()).logits)


def test_own_class_refuses_a_dense_model_without_a_configuration(checkpoint: Path) -> None:
    with pytest.raises(InvalidConfig, match="is a dense model"):
        ModeGPTModelForCausalLM.from_pretrained(checkpoint)


def test_failed_compression_does_not_change_the_model(checkpoint: Path, config: ModeGPTConfig) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CalibrationDataError):
        ModeGPTQuantizer(config, num_samples=10_000).quantize_model(model)
    assert type(model) is LlamaForCausalLM
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------------------------ tokenizer


@pytest.mark.parametrize(
    ("loader", "keyword"),
    [
        (AutoModelForCausalLM, "compression_config"),
        (AutoModelForCausalLM, "quantization_config"),
        (LlamaForCausalLM, "compression_config"),
        (LlamaForCausalLM, "quantization_config"),
        (ModeGPTModelForCausalLM, "compression_config"),
    ],
)
def test_tokenizer_is_loaded_with_the_arguments_of_the_caller(
    loader: Any,
    keyword: str,
    tmp_path: Path,
    config: ModeGPTConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_dense(tmp_path / "inner")
    calls: list[tuple[str, dict[str, Any]]] = []
    original = AutoTokenizer.from_pretrained

    def listen(name: str, **arguments: Any) -> Any:
        calls.append((name, arguments))
        return original(name, **arguments)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", listen)
    given = {
        "revision": "a-branch",
        "token": "a-token",
        "cache_dir": str(tmp_path / "cache"),
        "subfolder": "inner",
        "local_files_only": True,
    }
    loader.from_pretrained(tmp_path, **{keyword: config}, **given)
    ((name, arguments),) = calls
    assert name == str(tmp_path)
    assert {key: arguments[key] for key in given} == given


def test_quantizer_loads_the_tokenizer_with_the_arguments_of_the_caller(
    tmp_path: Path, config: ModeGPTConfig, expected: PreTrainedModel
) -> None:
    save_dense(tmp_path / "inner")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="inner")
    with pytest.raises(CalibrationDataError, match="no tokenizer could be loaded"):
        ModeGPTQuantizer(config).quantize_model(model)
    with pytest.raises(InvalidConfig, match="unknown argument 'subfoldr'"):
        ModeGPTQuantizer(config).quantize_model(model, subfoldr="inner")
    ModeGPTQuantizer(config).quantize_model(model, subfolder="inner")
    assert model.config.modegpt["achieved"] == expected.config.modegpt["achieved"]


def test_source_resolves_the_commit_of_a_cached_model(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name, content in (("refs/main", commit), (f"snapshots/{commit}/config.json", "{}")):
        file = tmp_path / "models--me--model" / name
        file.parent.mkdir(parents=True)
        file.write_text(content)
    cache = {"cache_dir": str(tmp_path)}
    assert Source("me/model", cache).revision == commit
    assert Source("me/model", {**cache, "revision": "other"}).revision == "other"
    assert Source(str(tmp_path), {"revision": "other"}).revision == "other"


def test_demo_model_defaults_to_the_demo_text() -> None:
    assert default_dataset(ModeGPTConfig(), Source("demo")).dataset == "demo"
    assert default_dataset(ModeGPTConfig(dataset="c4"), Source("demo")).dataset == "c4"
    assert default_dataset(ModeGPTConfig(), Source("me/model")).dataset == {"c4": 1.0, "wikitext2": 1.0}


def test_base_model_of_a_folder_is_its_name(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    assert Source(str(tmp_path)).base_model == tmp_path.name
    assert Source("me/model").base_model == "me/model"
    assert Source("demo").base_model == "demo"
    assert Source(str(tmp_path / "demo")).base_model == "./demo"  # a folder, not the demo model


def test_token_ids_as_dataset_need_no_tokenizer(tmp_path: Path, config: ModeGPTConfig) -> None:
    dense("llama-gqa-tied").save_pretrained(tmp_path)
    windows = tokens(batch=8, length=32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, compression_config=fields(config, dataset=windows))
    assert model.config.modegpt["recipe"]["dataset"].startswith("in memory: Tensor")
    encoded = fields(config, dataset=[{"input_ids": row} for row in windows.tolist()])
    again = AutoModelForCausalLM.from_pretrained(tmp_path, compression_config=encoded)
    assert again.config.modegpt["calibration"]["sha256"] == model.config.modegpt["calibration"]["sha256"]
    with pytest.raises(CalibrationDataError, match="no tokenizer could be loaded"):
        AutoModelForCausalLM.from_pretrained(tmp_path, compression_config=config)


def test_tokenizer_of_the_configuration_is_used(
    tmp_path: Path, checkpoint: Path, config: ModeGPTConfig, expected: PreTrainedModel
) -> None:
    dense("llama-gqa-tied").save_pretrained(tmp_path)
    for chosen in (str(checkpoint), tokenizer()):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, compression_config=fields(config, tokenizer=chosen))
        with torch.no_grad():
            assert torch.equal(model(tokens()).logits, expected(tokens()).logits)


def test_model_without_a_source_needs_a_tokenizer(config: ModeGPTConfig) -> None:
    with pytest.raises(CalibrationDataError, match="pass a tokenizer"):
        ModeGPTQuantizer(config).quantize_model(dense("llama-gqa-tied"))


# ------------------------------------------------------------------------------------------------ quantizer and keyword


def test_quantizer_saves_model_tokenizer_code_and_report(
    checkpoint: Path, config: ModeGPTConfig, tmp_path: Path
) -> None:
    quantizer = ModeGPTQuantizer(config, sparsity=0.2)
    model = quantizer.quantize_model(AutoModelForCausalLM.from_pretrained(checkpoint), progress=False)
    quantizer.save(model, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "report.json"} <= names
    assert {"modegpt_common.py", "modegpt_llama.py"} <= names
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["requested_sparsity"] == 0.2
    assert report.pop("weight_bytes") == (tmp_path / "model.safetensors").stat().st_size
    assert len(report.pop("weights_sha256")) == 64
    assert report.items() <= json.loads(json.dumps(quantizer.report.to_dict())).items()
    assert report["base_model"] == checkpoint.name


def test_keyword_is_installed_only_once() -> None:
    before = PreTrainedModel.from_pretrained.__func__
    install_keyword(PreTrainedModel)
    assert PreTrainedModel.from_pretrained.__func__ is before


def test_keyword_can_be_disabled(checkpoint: Path, config: ModeGPTConfig) -> None:
    code = f"""
from transformers import LlamaForCausalLM, PreTrainedModel
before = PreTrainedModel.from_pretrained.__func__
from optimum_modegpt import ModeGPTModelForCausalLM
assert PreTrainedModel.from_pretrained.__func__ is before
config = {fields(config)!r}
try:
    LlamaForCausalLM.from_pretrained({str(checkpoint)!r}, compression_config=config)
except TypeError as error:
    assert "compression_config" in str(error)
else:
    raise SystemExit("the keyword was accepted")
for loader, keyword in ((ModeGPTModelForCausalLM, "compression_config"), (LlamaForCausalLM, "quantization_config")):
    model = loader.from_pretrained({str(checkpoint)!r}, **{{keyword: {{**config, "quant_method": "modegpt"}}}})
    assert model.config.model_type == "modegpt_llama"
"""
    environment = {**os.environ, "OPTIMUM_MODEGPT_NO_PATCH": "1"}
    done = run_forked(code, env=environment)
    assert done.returncode == 0, done.stderr
