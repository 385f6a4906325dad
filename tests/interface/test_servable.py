"""Test which serving engines are said to run a model, as a result and as a forecast, and where that is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import save_dense
from tiny_configs import EVERY_VARIANT, VARIANTS
from tiny_models import classes, mlp_widths
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, MistralConfig, Qwen2Config, Qwen3Config

from optimum_modegpt import AlreadyCompressed, EvaluationError, ModeGPTConfig, Servable, check_servable
from optimum_modegpt.architectures import family_of
from optimum_modegpt.budget.estimate import on_meta
from optimum_modegpt.cli import main as cli
from optimum_modegpt.modeling.modegpt_config import head_dim
from optimum_modegpt.modeling.modegpt_family import Widths
from optimum_modegpt.serving import engines
from optimum_modegpt.serving.servable import RULES, best
from optimum_modegpt.serving.shape import layout_of, shape_of
from optimum_modegpt.serving.vllm_plugin import ARCHITECTURES

ENGINES = ("transformers", "vLLM", "SGLang", "llama.cpp", "ONNX Runtime", "OpenVINO", "ExecuTorch", "TensorRT-LLM")
MARKS = {"yes": "y", "with package": "p", "no": "n", "unknown": "?"}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 2.0, 5.0], "long_factor": [1.0, 2.0, 5.0]}
KEPT = {**LONG, "original_max_position_embeddings": 64, "attention_factor": 1.0, "factor": 1.0}


def config_of(name: str) -> Any:
    """Return the dense configuration of a variant."""
    config_class, values = EVERY_VARIANT[name]
    return config_class(**values)


def compressed_config(name: str, *, heads: bool) -> Any:
    """Return the configuration of a compressed model, with narrow MLPs, and with narrow heads or dense ones."""
    dense = config_of(name)
    config_class: Any = classes(name)["AutoModelForCausalLM"].config_class
    family, width = config_class.family, head_dim(dense.per_layer_config[0])
    narrow = 4 if heads else width
    widths = []
    for index, mlp in enumerate(mlp_widths(dense, family)):
        parts = {"qk": narrow, "vo": narrow} | dict.fromkeys(family.uncut(dense), width)
        parts["shared"] = family.shared_width(dense, index)
        widths.append(Widths(mlp=mlp, **parts | dict.fromkeys(family.absent(dense, index), 0)))
    return config_class.from_dense(dense, widths, {"format_version": 1})


def marks(found: list[Servable]) -> str:
    """Return one letter for each engine, in the order of `ENGINES`."""
    assert tuple(each.engine for each in found) == ENGINES
    return "".join(MARKS[each.works] for each in found)


def row(found: list[Servable], engine: str) -> Servable:
    """Return the row of an engine."""
    return next(each for each in found if each.engine == engine)


@pytest.mark.parametrize(
    ("name", "heads", "expected"),
    [
        ("llama-gqa-tied", True, "pppppppn"),
        ("llama-gqa-tied", False, "pppppppn"),
        ("qwen2", True, "pppppppn"),
        ("qwen2-mixed-window", False, "pppnpppn"),  # deci has no window
        ("mistral-window", False, "ppnnpppn"),  # SGLang ignores a window without layer types
        ("qwen3", True, "pppnpppn"),  # the norms of narrow queries and keys have a gain for each head
        ("qwen3", False, "pppppppn"),
        ("qwen3-mixed-window-biases", False, "pppnpppn"),
        ("opt", True, "pnpnpppn"),
        ("gpt_neo", True, "pnnnpppn"),  # own scores
        ("gemma2", True, "pnnnpppn"),  # soft cap
        ("mixtral", True, "pnnn???n"),
        ("qwen3_5_text", True, "pnnn???n"),  # layers with linear attention
    ],
)
def test_results_of_our_classes(name: str, heads: bool, expected: str) -> None:
    config = compressed_config(name, heads=heads)
    assert layout_of(config) == ("per_layer" if heads else "mlp")
    assert marks(check_servable(config)) == expected


@pytest.mark.parametrize("name", VARIANTS)
def test_a_forecast_agrees_with_the_result(name: str) -> None:
    found = check_servable(config_of(name), ModeGPTConfig())
    assert marks(found) == marks(check_servable(compressed_config(name, heads=True)))
    assert all(each.evidence != "run" or each.serves for each in found)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(**SIZES), "yyyypppy"),
        (LlamaConfig(**SIZES, head_dim=6, rope_parameters=KEPT, attention_bias=True), "yyypppp?"),
        (MistralConfig(**SIZES, sliding_window=None), "yyyypppy"),
        (MistralConfig(**SIZES, sliding_window=8), "yyyyppp?"),
        (MistralConfig(**SIZES, sliding_window=64, max_position_embeddings=64), "yyyypppy"),  # longer than any text
        (Qwen2Config(**SIZES), "yyyyppp?"),
        (Qwen2Config(**SIZES, head_dim=6), "ynyyppp?"),  # vLLM computes the head dim
        (Qwen3Config(**SIZES, head_dim=6, rope_parameters=KEPT), "y??nppp?"),  # no frequencies in llama.cpp
        (MambaConfig(hidden_size=32, num_hidden_layers=2), "y???????"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.model_type,
)
def test_stock_checkpoints(config: Any, expected: str) -> None:
    assert layout_of(config) == "stock"
    assert marks(check_servable(config)) == expected


def test_a_model_without_some_experts_is_a_stock_checkpoint() -> None:
    config = config_of("mixtral")
    fewer = check_servable(config, ModeGPTConfig(sparsity=0, expert_sparsity=0.5))
    assert marks(fewer) == marks(check_servable(config))
    assert layout_of(config, ModeGPTConfig(expert_sparsity=0.5)) == "per_layer"


def test_a_model_whose_heads_cannot_be_cut_has_narrow_mlps_only() -> None:
    assert layout_of(config_of("olmo-clip"), ModeGPTConfig()) == "mlp"
    assert layout_of(config_of("olmo"), ModeGPTConfig()) == "per_layer"


@pytest.mark.parametrize(
    ("name", "layout", "expected"),
    [
        ("llama-gqa-tied", "mlp", "pppppppn"),
        ("llama-gqa-tied", "stock", "yyypppp?"),
        ("qwen2", "stock", "yyypppp?"),  # written as Llama
    ],
)
def test_a_forecast_of_another_layout(name: str, layout: str, expected: str) -> None:
    settings: dict[str, Any] = {"layout": layout}
    assert marks(check_servable(config_of(name), ModeGPTConfig(**settings))) == expected


def test_every_row_says_why_and_from_where() -> None:
    for config in (compressed_config("llama-mha", heads=True), config_of("qwen2"), MambaConfig()):
        for each in check_servable(config, name="my folder"):
            assert each.reason.endswith(".")
            assert (each.command is not None) == each.serves
            assert each.command is None or "'my folder'" in each.command
            assert (each.checked == "–") == (each.works == "unknown")
            assert json.loads(json.dumps(each.to_dict()))["works"] == each.works


def test_only_runs_are_called_runs() -> None:
    llama, qwen = (check_servable(compressed_config(name, heads=True)) for name in ("llama-mha", "qwen2"))
    assert row(llama, "transformers").checked == "run with 5.24.0"
    assert row(llama, "ONNX Runtime").checked == "run with 1.32.0"
    assert row(qwen, "ONNX Runtime").checked == "inferred from transformers 5.24.0"
    runs = {engine.name for engine, _ in RULES if engine.runs}
    assert {each.engine for each in llama if each.evidence == "run"} <= runs


def test_the_recommended_server_has_been_run_or_needs_no_package() -> None:
    assert best(check_servable(LlamaConfig(**SIZES))).command == "vllm serve '<result>'"
    ours = best(check_servable(compressed_config("llama-mha", heads=True)))
    assert ours.works == "with package"
    assert ours.evidence == "run"
    assert best(check_servable(MambaConfig())).engine == "transformers"


def test_head_dims_that_flash_attention_lacks_are_named() -> None:
    narrow = compressed_config("llama-mha", heads=True)
    assert "found 4." in row(check_servable(narrow), "vLLM").reason
    assert "found" not in row(check_servable(compressed_config("llama-mha", heads=False)), "vLLM").reason


def test_folder_model_and_configuration_are_the_same(tmp_path: Path) -> None:
    config = compressed_config("llama-gqa-tied", heads=True)
    config.save_pretrained(tmp_path)
    found = check_servable(tmp_path)
    assert found == check_servable(str(tmp_path)) == check_servable(config, name=str(tmp_path))
    assert found == check_servable(on_meta(AutoModelForCausalLM, config), name=str(tmp_path))
    assert shape_of(config).to_text() == "modegpt_llama, layout per_layer, mlp 31 to 48, qk 4, vo 4"


def test_models_that_cannot_be_compressed_or_read_are_refused() -> None:
    config = compressed_config("llama-gqa-tied", heads=True)
    with pytest.raises(AlreadyCompressed):
        check_servable(config, ModeGPTConfig())
    record = {"format_version": 1}
    config = type(config).from_dense(config_of("llama-gqa-tied"), [Widths(qk=99, vo=8, mlp=31)] * 3, record)
    with pytest.raises(EvaluationError, match="cannot be read"):
        check_servable(config)


def test_the_commands_print_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, result = save_dense(tmp_path / "dense"), tmp_path / "found.json"
    assert cli.main(["servable", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("llama, a checkpoint of the stock class\nengine")
    assert f"vllm serve {folder}" in printed
    assert printed.endswith("--sparsity 0.3\n")
    words = printed.splitlines()[-1].partition(": ")[2].split()[3:]
    assert cli.main([*words, "--json", str(result)]) == 0
    assert "modegpt_llama, layout per_layer (forecast)" in capsys.readouterr().out
    found = json.loads(result.read_text())
    assert (found["layout"], found["forecast"]) == ("per_layer", True)
    assert [each["engine"] for each in found["engines"]] == list(ENGINES)

    length = ["--sequence-length", "32", "--num-samples", "2"]
    assert cli.main(["estimate", str(folder), "--sparsity", "0.2", "--device", "cpu", *length]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Served by: transformers, vLLM, SGLang, llama.cpp, ONNX Runtime")
    assert "; not by: TensorRT-LLM; details: " in last
    words = last.partition("details: ")[2].split()[3:]
    assert words == ["servable", str(folder), "--sparsity", "0.2"]
    assert cli.main(words) == 0


def test_the_plugin_of_vllm_registers_the_types_of_the_table() -> None:
    found = [family_of(model_type) for model_type in engines.VLLM_PLUGIN]
    assert {classes.causal_lm.__name__ for classes in found if classes is not None} == set(ARCHITECTURES)
