"""Test the plugins of vLLM and SGLang by the rules of these engines, which are not installed for the tests."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_configs import EVERY_VARIANT
from tiny_models import classes, compressed, tokens
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from optimum_modegpt.errors import UnsupportedModel
from optimum_modegpt.serving import sglang_plugin, vllm_plugin

ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------------------------------------------- entry points


@pytest.mark.parametrize(
    ("group", "plugin"), [("vllm.general_plugins", vllm_plugin), ("sglang.srt.plugins", sglang_plugin)]
)
def test_the_entry_point_is_the_function_that_registers(group: str, plugin: ModuleType) -> None:
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [(name, value)] = project["entry-points"][group].items()
    assert EntryPoint(name, value, group).load() is plugin.register


def test_loading_the_plugin_of_sglang_registers_the_configurations() -> None:
    code = (
        f"from {sglang_plugin.__name__} import register; register(); from transformers import AutoConfig; "
        "print(type(AutoConfig.for_model('modegpt_llama')).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "ModeGPTLlamaConfig\n", done.stderr


def test_the_architectures_of_vllm_are_those_of_our_classes(vllm: SimpleNamespace) -> None:
    vllm_plugin.register()
    vllm_plugin.register()
    named = {classes(name)["AutoModelForCausalLM"].__name__ for name in EVERY_VARIANT}
    assert set(vllm.registered) == set(vllm_plugin.ARCHITECTURES)
    assert set(vllm.registered) <= named
    for value in vllm.registered.values():
        module, _, name = value.partition(":")
        assert issubclass(getattr(importlib.import_module(module), name), nn.Module)


# --------------------------------------------------------------------------------------------------- the vLLM model


class Backend(nn.Module):
    """The part of vLLM's Transformers backend that our class extends."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.model = AutoModel.from_config(self.config)
        self.logits_processor, self.pp_group = SimpleNamespace(scale=1.0), SimpleNamespace(is_last_rank=True)
        self.recursive_replace()

    def recursive_replace(self) -> None:
        """Replace every norm by one of vLLM, whose weight is a vector."""
        for module in self.model.modules():
            for name, child in list(module.named_children()):
                if name.endswith("norm"):
                    setattr(module, name, nn.RMSNorm(child.weight.shape[0]))

    def load_weights(self, weights: Any) -> set[str]:
        """Load the given tensors, and return their names."""
        found = dict(weights)
        self.load_state_dict(found, strict=False)
        return set(found)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Provide the modules of vLLM that the plugin imports, on a CPU whose kernels have the head dims 8 and 32."""
    state = SimpleNamespace(registered={}, is_cpu=True)
    registry = SimpleNamespace(register_model=state.registered.__setitem__)
    kernels = SimpleNamespace(get_supported_head_sizes=lambda: [8, 32])
    contents = {
        "vllm": {"ModelRegistry": registry},
        "vllm.config": {"VllmConfig": object},
        "vllm.model_executor.models.transformers": {"TransformersForCausalLM": Backend},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: state.is_cpu)},
        "vllm.v1.attention.backends.cpu_attn": {"CPUAttentionBackend": kernels},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    yield state
    sys.modules.pop("optimum_modegpt.serving.vllm_model", None)


def vllm_config(model: Any, processes: int = 1) -> Any:
    """Return the fields of vLLM's configuration that our class reads, with the head dims that vLLM derives."""
    blocks = [model.config.per_layer_config[index].head_dim for index in range(model.config.num_hidden_layers)]
    widest = max(blocks)
    overrides = [{} if head_dim == widest else {"head_size": head_dim} for head_dim in blocks]
    architecture = SimpleNamespace(head_size=widest, per_layer_overrides=overrides)
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=model.config, model_arch_config=architecture),
        parallel_config=SimpleNamespace(tensor_parallel_size=processes),
    )


def served(model: Any, **changes: Any) -> Any:
    """Create the vLLM model for a compressed one."""
    module = importlib.import_module("optimum_modegpt.serving.vllm_model")
    return module.ModeGPTForCausalLM(vllm_config=vllm_config(model, **changes))


def test_norms_with_a_weight_for_each_head_are_not_replaced(vllm: SimpleNamespace) -> None:
    model = compressed("qwen3")
    attention = served(model).model.layers[0].self_attn
    assert attention.q_norm.weight.shape == model.model.layers[0].self_attn.q_norm.weight.shape
    assert not isinstance(attention.q_norm, nn.RMSNorm)
    assert isinstance(served(model).model.layers[0].input_layernorm, nn.RMSNorm)


def test_logits_are_divided_as_the_family_does(vllm: SimpleNamespace) -> None:
    assert served(compressed("granite")).logits_processor.scale == 0.5
    assert served(compressed("llama-mha")).logits_processor.scale == 1.0


def test_head_dims_are_those_of_the_kernels(vllm: SimpleNamespace) -> None:
    model = compressed("mistral-head-dim")  # head dims 7, 6 and 12
    module = importlib.import_module("optimum_modegpt.serving.vllm_model")
    config = vllm_config(model)
    module.ModeGPTForCausalLM(vllm_config=config)
    architecture = config.model_config.model_arch_config
    assert (architecture.head_size, architecture.per_layer_overrides) == (32, [{"head_size": 8}, {"head_size": 8}, {}])
    vllm.is_cpu = False
    config = vllm_config(model)
    module.ModeGPTForCausalLM(vllm_config=config)
    architecture = config.model_config.model_arch_config
    assert (architecture.head_size, architecture.per_layer_overrides) == (12, [{"head_size": 7}, {"head_size": 6}, {}])


def test_a_head_wider_than_every_kernel_is_refused(vllm: SimpleNamespace) -> None:
    with pytest.raises(UnsupportedModel, match=r"head dim is 40; the attention kernels of vLLM have \[8, 32\]"):
        served(compressed("mistral-head-dim", head_dim=40))


def test_tensor_parallelism_is_refused(vllm: SimpleNamespace) -> None:
    with pytest.raises(UnsupportedModel, match="tensor_parallel_size is 2, expected 1"):
        served(compressed("llama-mha"), processes=2)


def test_a_checkpoint_without_rotary_pairs_is_refused(vllm: SimpleNamespace) -> None:
    model = compressed("llama-mha")
    weights = {f"model.{name}": tensor for name, tensor in model.model.state_dict().items()}
    assert served(model).load_weights(weights.items()) == set(weights)
    del weights["model.layers.1.self_attn.rope_index"]
    with pytest.raises(UnsupportedModel, match=r"lacks 1 tensors such as model\.layers\.1\.self_attn\.rope_index"):
        served(model).load_weights(weights.items())


# ------------------------------------------------------------------------------------------------------ the attention


def causal_kernel(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """Compute causal attention as an engine does: without a mask, and with (tokens, heads · width) as its output."""
    length = query.shape[2]
    bias = torch.full((length, length), float("-inf")).triu(1)
    kwargs.pop("sliding_window", None)
    output, weights = module.eager_function()(module, query, key, value, bias, **kwargs)
    return output.flatten(0, 1).flatten(1), weights


def with_kernels(model: Any, monkeypatch: pytest.MonkeyPatch, head_dim: int, heads: int = 4) -> Any:
    """Prepare a model for vLLM's attention, with kernels of this head dim and number of heads in every block."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", causal_kernel)
    model.config._attn_implementation = "vllm"
    for module in model.modules():
        if hasattr(module, "qk_head_dim"):
            module.attn = nn.Module()
            module.attn.num_heads, module.attn.head_size = heads, head_dim
    return model


def test_heads_are_padded_to_the_kernels_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compressed("llama-gqa-tied")
    model.set_attn_implementation("eager")
    expected = model(tokens()).logits
    found = with_kernels(model, monkeypatch, head_dim=32)(tokens(), use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ({"head_dim": 8, "heads": 2}, "vLLM has 2 heads for layer 0, which computes 4: .* tensor parallelism"),
        ({"head_dim": 6}, "vLLM has a head dim of 6 for layer 0; expected at least 7"),
    ],
)
def test_kernels_of_other_shapes_are_refused(
    kernels: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_kernels(compressed("llama-gqa-tied"), monkeypatch, **kernels)
    with pytest.raises(ValueError, match=message):
        model(tokens(), use_cache=False)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("name", "reason"), [("bloom", "a bias to the attention scores"), ("mixtral", "experts of the dense width")]
)
def test_families_that_an_engine_would_run_wrongly_are_refused(name: str, reason: str, engine: str) -> None:
    config = compressed(name).config
    config._attn_implementation = engine
    with pytest.raises(ValueError, match=f"{engine} cannot serve model_type 'modegpt_{name}': .*{reason}"):
        AutoModel.from_config(config)


@pytest.mark.parametrize(
    ("name", "message"),
    [("gemma2", r"SGLang ignores \['softcap'\] of layer 0"), ("mistral-window", "Layer 0 has a window of 6 tokens")],
)
def test_attention_that_sglang_would_compute_wrongly_is_refused(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sglang", causal_kernel)
    model = compressed(name)
    model.config._attn_implementation = "sglang"
    with pytest.raises(ValueError, match=message):
        model(tokens(), use_cache=False)


def test_sglang_reads_the_dense_sizes() -> None:
    """SGLang reads these attributes of the configuration, and sets those that are missing."""
    config = compressed("llama-mha").config
    widths = config.widths()
    for name, size in {"head_dim": 8, "v_head_dim": 8, "swa_head_dim": 8, "swa_v_head_dim": 8}.items():
        if getattr(config, name, None) is None:
            setattr(config, name, size)
        assert getattr(config, name) == size
    assert config.widths() == widths


# --------------------------------------------------------------------------------------------------------- parameters


def test_rotary_pairs_are_real_where_an_engine_creates_only_parameters_on_meta() -> None:
    """Engines move parameters to "meta" when they are registered, create them later, and never create buffers."""
    config = compressed("llama-mha").config
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: Any) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "register_parameter", on_meta)
        patch.setattr("optimum_modegpt.modeling.modegpt_blocks.ENGINES", ("sdpa",))  # as if it were an engine's
        model = AutoModel.from_config(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


@pytest.mark.parametrize(
    "plan", [{"tp_plan": "auto"}, {"tp_size": 2}, {"distributed_config": SimpleNamespace(tp_size=2)}]
)
def test_tensor_parallelism_of_transformers_is_refused(plan: dict[str, Any], tmp_path: Path) -> None:
    compressed("llama-mha").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"do not support tensor parallelism: leave out tp_plan and tp_size"):
        AutoModelForCausalLM.from_pretrained(tmp_path, **plan)
