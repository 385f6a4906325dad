"""Test saving and loading in fresh processes: with and without the package, in one file and in shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from subprocess_load import run_worker
from tiny_configs import FAMILIES, VARIANTS
from tiny_models import OTHER_CODE, SHARED_CODE, classes, compressed, tokenizer, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from optimum_modegpt.modeling.modegpt_family import Widths

CLASSIFIER = "AutoModelForSequenceClassification"
"""Families for which transformers has no classifier have none."""
EVERY = pytest.mark.parametrize("name", VARIANTS)
FAMILY = pytest.mark.parametrize("name", FAMILIES)


def narrow_dtype(model: Any, dtype: torch.dtype) -> Any:
    """Convert the parameters only. `model.to` would also round the rotary table, which loading keeps in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Save every variant, and load it in one process with the package and in one without.

    Return the folders, the expected outputs and the outputs of the other processes, by variant.
    """
    root = tmp_path_factory.mktemp("disk")
    found: dict[str, dict[str, Any]] = {}
    local_jobs, remote_jobs = [], []
    ids = tokens()
    for name in VARIANTS:
        entry: dict[str, Any] = {"folder": root / name, "bf16": root / f"{name}-bf16", "sharded": root / f"{name}-s"}
        model = compressed(name)
        with torch.no_grad():
            entry["float32"] = model(ids).logits
            entry["base"] = model.base_model(ids).last_hidden_state
        model.save_pretrained(entry["folder"])
        tokenizer().save_pretrained(entry["folder"])
        model.save_pretrained(entry["sharded"], max_shard_size="20KB")
        narrow_dtype(model, torch.bfloat16).save_pretrained(entry["bf16"])
        with torch.no_grad():
            entry["bfloat16"] = model(ids).logits
        if CLASSIFIER in classes(name):
            classifier = compressed(name, auto=CLASSIFIER)
            classifier.save_pretrained(root / f"{name}-cls")
            with torch.no_grad():
                entry["classification"] = classifier(ids).logits
        found[name] = entry

        def job(kind: str, folder: Path, out: str, auto: str = "AutoModelForCausalLM", name: str = name) -> dict:
            path = root / f"{name}-{kind}-{out}.safetensors"
            dtype = "bfloat16" if "bf16" in out else "float32"
            return {"folder": str(folder), "auto": auto, "dtype": dtype, "out": str(path)}

        local_jobs += [job("local", entry[key], key) for key in ("folder", "sharded", "bf16")]
        if name in FAMILIES:
            first = job("remote", entry["folder"], "folder") | {"save": str(root / f"{name}-again")}
            remote_jobs += [
                first,
                job("remote", entry["bf16"], "bf16"),
                job("remote", entry["folder"], "base", "AutoModel"),
                *([job("remote", root / f"{name}-cls", "cls", CLASSIFIER)] if CLASSIFIER in classes(name) else []),
                job("remote", root / f"{name}-again", "again"),
            ]
        if name in ("llama-mha", "opt-bare"):
            model = AutoModelForCausalLM.from_pretrained(entry["folder"])
            model.get_input_embeddings().weight.data.mul_(1.5)
            model.save_pretrained(root / f"{name}-changed")
            model.base_model.save_pretrained(root / f"{name}-inner")
            with torch.no_grad():
                entry["changed"] = model(ids, output_hidden_states=True)
            remote_jobs += [
                job("remote", root / f"{name}-changed", "changed"),
                job("remote", root / f"{name}-inner", "inner", "AutoModel"),
            ]
    run_worker(local_jobs, "local", root)
    run_worker(remote_jobs, "remote", root)
    for name, entry in found.items():
        entry["found"] = read_outputs(root, name)
    return found


def read_outputs(root: Path, name: str) -> dict[tuple[str, str], torch.Tensor]:
    """Return the outputs that the other processes wrote for a variant, by process and folder."""
    found = {}
    for kind in ("local", "remote"):
        for out in ("folder", "sharded", "bf16", "base", "cls", "again", "changed", "inner"):
            path = root / f"{name}-{kind}-{out}.safetensors"
            if path.exists():
                found[kind, out] = load_file(path)["out"]
    return found


@EVERY
def test_fresh_process_computes_identical_outputs(name: str, saved: dict[str, dict[str, Any]]) -> None:
    entry = saved[name]
    assert torch.equal(entry["found"]["local", "folder"], entry["float32"])
    assert torch.equal(entry["found"]["local", "sharded"], entry["float32"])
    assert torch.equal(entry["found"]["local", "bf16"], entry["bfloat16"])
    assert len(list(entry["sharded"].glob("*.safetensors"))) > 1


@FAMILY
def test_remote_code_computes_identical_outputs_without_the_package(
    name: str, saved: dict[str, dict[str, Any]]
) -> None:
    entry = saved[name]
    assert torch.equal(entry["found"]["remote", "folder"], entry["float32"])
    assert torch.equal(entry["found"]["remote", "bf16"], entry["bfloat16"])
    assert torch.equal(entry["found"]["remote", "base"], entry["base"])
    if CLASSIFIER in classes(name):
        assert torch.equal(entry["found"]["remote", "cls"], entry["classification"])
    assert torch.equal(entry["found"]["remote", "again"], entry["float32"]), "model saved and loaded by remote code"


@EVERY
def test_saved_files_have_the_compressed_shapes_and_metadata(name: str, saved: dict[str, dict[str, Any]]) -> None:
    folder = saved[name]["folder"]
    config = json.loads((folder / "config.json").read_text())
    family = VARIANTS[name][0].model_type
    assert config["model_type"] == f"modegpt_{family}"
    assert config["modegpt"]["format_version"] == 1
    assert not {"quantization_config", "compression_config"} & config.keys()
    names = {"AutoConfig", *classes(name)}
    assert config["auto_map"].keys() == names
    code = {path.name for path in folder.glob("*.py")}
    assert code - OTHER_CODE == {*SHARED_CODE, f"modegpt_{family}.py"}
    assert {value.partition(".")[0] + ".py" for value in config["auto_map"].values()} <= code
    assert not list(folder.glob("*.bin"))

    model = compressed(name)
    family, widths = model.config.family, model.config.widths()
    head_dim, mlp_width = model.config.dense_head_dim, model.config.dense_mlp_width(0)
    reference = compressed(name, widths=[Widths(head_dim, head_dim, mlp_width)] * 3)
    reference_shapes = {key: value.shape for key, value in reference.state_dict().items()}
    heads, kv_heads = 4, VARIANTS[name][1].get("num_key_value_heads", 4)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != model.config.tie_word_embeddings  # noqa: SIM118
        for key in file.keys():  # noqa: SIM118
            value = file.get_tensor(key)
            if key.endswith("rope_index"):
                assert value.dtype is torch.int32
                continue
            if value.ndim > len(reference_shapes[key]):  # every narrow head has gains of its own
                assert value.shape[0] in (heads, kv_heads)
                assert value.shape[1] < head_dim
                continue
            assert all(new <= old for new, old in zip(value.shape, reference_shapes[key], strict=True)), key
            if value.ndim == 2:
                assert value.any(dim=1).all(), f"{key}: a row of zeros"
                assert value.any(dim=0).all(), f"{key}: a column of zeros"
        for index, width in enumerate(widths):
            prefix = f"{model.base_model_prefix}.{family.blocks}.{index}"
            expected = {
                family.attention.query: (heads * width.qk, 32),
                family.attention.key: (kv_heads * width.qk, 32),
                family.attention.value: (kv_heads * width.vo, 32),
                family.attention.output: (32, heads * width.vo),
                family.mlp.output: (32, width.mlp),
                **dict.fromkeys(family.mlp.inputs, (width.mlp, 32)),
            }
            for path, shape in expected.items():
                assert file.get_slice(f"{prefix}.{path}.weight").get_shape() == list(shape)
    assert widths[0].qk < head_dim
    assert widths[0].mlp < mlp_width


@EVERY
def test_configuration_survives_every_round_trip(name: str, tmp_path: Path) -> None:
    config = compressed(name).config
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert loaded.widths() == config.widths()
    assert loaded.base_model_tp_plan is None
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    assert type(config)(**config.to_diff_dict()).widths() == config.widths()
    assert json.loads(config.to_json_string(use_diff=False))["per_layer_config"]
    assert {path.name for path in tmp_path.iterdir()} > {"config.json", "modegpt_common.py"}


@FAMILY
def test_changed_model_can_be_saved_and_moved(name: str, saved: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved[name]["folder"])
    assert type(model) is classes(name)["AutoModelForCausalLM"]
    model.resize_token_embeddings(262, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
        expected = model(tokens()).logits
    first, elsewhere = tmp_path / "first", tmp_path / "elsewhere"
    model.save_pretrained(first)
    first.rename(elsewhere)
    config = json.loads((elsewhere / "config.json").read_text())
    assert config["auto_map"].keys() == {"AutoConfig", *classes(name)}
    assert "--" not in json.dumps(config["auto_map"]), "auto_map must not refer to the original repository"
    again = AutoModelForCausalLM.from_pretrained(elsewhere)
    assert torch.equal(again(tokens()).logits, expected)


@pytest.mark.parametrize("name", ["llama-mha", "opt-bare"])
def test_changed_folder_loads_without_the_package(name: str, saved: dict[str, dict[str, Any]]) -> None:
    """Load models that the package loaded, changed and saved, with and without the language model head."""
    entry = saved[name]
    assert torch.equal(entry["found"]["remote", "changed"], entry["changed"].logits)
    assert torch.equal(entry["found"]["remote", "inner"], entry["changed"].hidden_states[-1])


@EVERY
def test_base_model_and_classifier_can_be_loaded(name: str, saved: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    folder, ids = saved[name]["folder"], tokens()
    base = AutoModel.from_pretrained(folder)
    assert torch.equal(base(ids).last_hidden_state, saved[name]["base"])
    if CLASSIFIER not in classes(name):
        return
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, output_loading_info=True
    )
    assert info["missing_keys"] == {"score.weight"}
    assert torch.equal(classifier.base_model(ids).last_hidden_state, saved[name]["base"])
    assert classifier(ids).logits.shape == (2, 3)
    classifier.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, classifier(ids).logits)
    if classifier.config.tie_word_embeddings:
        assert AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits.shape[-1] == 260


@FAMILY
def test_loading_options_give_the_same_logits(name: str, saved: dict[str, dict[str, Any]]) -> None:
    folder, ids, expected = saved[name]["folder"], tokens(), saved[name]["float32"]
    model_class = classes(name)["AutoModelForCausalLM"]
    model = model_class.from_pretrained(folder, attn_implementation="eager")
    torch.testing.assert_close(model(ids).logits, expected, atol=3e-5, rtol=1e-5)
    state = compressed(name).state_dict()
    from_state = model_class.from_pretrained(None, config=AutoConfig.from_pretrained(folder), state_dict=state)
    assert torch.equal(from_state(ids).logits, expected)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")(ids).logits, expected)
