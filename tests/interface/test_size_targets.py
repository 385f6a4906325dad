"""Test targets for the size of the result: their arithmetic, the files that they predict, and their refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import RECIPE, save_dense, save_text
from tiny_models import compressed, dense, tokens
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from optimum_modegpt import InvalidConfig, ModeGPTConfig, ModeGPTQuantizer
from optimum_modegpt.allocation.plan import Plan
from optimum_modegpt.allocation.targets import plan_from_targets
from optimum_modegpt.architectures import check_dense, read_blocks, resolve
from optimum_modegpt.budget.estimate import estimate, on_meta
from optimum_modegpt.budget.experts import with_kept_experts
from optimum_modegpt.budget.size_target import TOLERANCE, Target, plan_size, resolve_target
from optimum_modegpt.budget.sizes import part_sizes
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.cli import main as cli
from optimum_modegpt.cli.commands.common import configuration
from optimum_modegpt.compress import compress
from optimum_modegpt.quantities import read_bytes, read_count, written_bytes, written_count
from optimum_modegpt.report import Report

WINDOWS = TokenWindows(tokens(10, 16, seed=7), {"name": "random tokens", "windows": 10})
UNIFORM: dict[str, Any] = {"method": "paper", "allocation": "uniform"}


def weight_bytes(file: Path) -> int:
    """Return the bytes of the tensors in a safetensors file, which follow its header."""
    with file.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    return file.stat().st_size - 8 - header


# ----------------------------------------------------------------------------------------------------------- quantities


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GB", 4 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("500 mb", 5 * 10**8),
        (".5kB", 500),
        ("7", 7),
        (123, 123),
        (2e6, 2_000_000),
    ],
)
def test_sizes_are_read(text: Any, expected: int) -> None:
    assert read_bytes("target_size", text) == expected


@pytest.mark.parametrize(("text", "expected"), [("1.2B", 1_200_000_000), ("500m", 5 * 10**8), ("3k", 3000), (7e9, 7e9)])
def test_counts_are_read(text: Any, expected: int) -> None:
    assert read_count("target_parameters", text) == expected


@pytest.mark.parametrize("value", ["", "GB", "4XB", "-4GB", "1..5GB", 0, -1, True, float("nan"), float("inf"), [4]])
def test_another_size_is_refused(value: Any) -> None:
    message = f'target_size must be bytes, or a size such as "4GB", "500MB" or "1.5GiB", found {value!r}.'
    with pytest.raises(InvalidConfig, match=re.escape(message)):
        ModeGPTConfig(target_size=value)


def test_sizes_are_written_with_four_digits() -> None:
    assert [written_bytes(size) for size in (7, 1234567, 4.125e9)] == ["7 B", "1.235 MB", "4.125 GB"]
    assert [written_count(number) for number in (7, 1234567, 1.2e9)] == ["7", "1.235M", "1.2B"]


# -------------------------------------------------------------------------------------------------------- configuration


def test_a_target_replaces_the_default_sparsity() -> None:
    assert ModeGPTConfig().sparsity == 0.3
    config = ModeGPTConfig(target_size="4GB", target_quantization="int4")
    assert config.sparsity is None
    assert ModeGPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert ModeGPTQuantizer(ModeGPTConfig(sparsity=0.2), target_size="4GB").config == ModeGPTConfig(target_size="4GB")
    assert ModeGPTQuantizer({"target_parameters": "1B"}, sparsity=0.2).config == ModeGPTConfig(sparsity=0.2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"sparsity": 0.3, "target_size": "4GB"},
            "found sparsity=0.3 and target_size='4GB'; each sets the size of the result, so give only one.",
        ),
        ({"target_size": 5, "target_parameters": "1B"}, "found target_size=5 and target_parameters='1B'"),
        ({"target_parameters": "4GB"}, 'target_parameters must be a number such as 1200000000, "500M" or "1.2B"'),
        ({"target_size": "4GB", "target_quantization": "int3"}, "must be one of 'int8', 'int4', found 'int3'."),
        ({"sparsity": 0.2, "target_quantization": "int8"}, "the meaning of target_size; found sparsity=0.2."),
        ({"target_quantization": "int8"}, "the meaning of target_size; found no target_size."),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig, match=re.escape(message)):
        ModeGPTConfig(**fields)


def test_one_of_the_flags_overrides_any_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"sparsity": 0.4, "seed": 7}))
    words = ["compress", "m", "--output", "o", "--config", str(file), "--target-size", "4GB"]
    options = cli.build_parser().parse_args([*words, "--quantize", "int4"])
    assert configuration(options) == ModeGPTConfig(target_size="4GB", target_quantization="int4", seed=7)
    with pytest.raises(SystemExit):
        cli.build_parser().parse_args([*words, "--sparsity", "0.2"])
    assert "argument --sparsity: not allowed with argument --target-size" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    "name", ["llama-gqa-tied", "llama-mqa-biases", "qwen3", "gpt2", "opt-post-ln", "qwen3_next", "mixtral", "gpt_oss"]
)
def test_the_size_of_a_plan_is_that_of_the_saved_weights(name: str, tmp_path: Path) -> None:
    original, model = dense(name), compressed(name)
    model.save_pretrained(tmp_path)
    size = plan_size(read_blocks(original, check_dense(original.config)), Plan(tuple(model.config.widths())))
    assert size.bytes == size.quantized_bytes == weight_bytes(tmp_path / "model.safetensors")
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("share", [0.75, 0.9])
@pytest.mark.parametrize("fields", [{}, {"target_quantization": "int8"}, {"target_quantization": "int4"}])
@pytest.mark.parametrize("name", ["llama-gqa-tied", "llama-mqa-biases", "qwen3", "opt"])
def test_the_sparsity_reaches_the_size(name: str, fields: dict[str, Any], share: float) -> None:
    architecture = resolve(dense(name).half())
    sizes = part_sizes(architecture, ModeGPTConfig())
    whole = plan_size(architecture, Plan.dense(sizes), fields.get("target_quantization"))
    assert whole.quantized_bytes < whole.bytes if fields else whole.quantized_bytes == whole.bytes
    for target in ({"target_size": int(share * whole.quantized_bytes), **fields}, {"target_parameters": 20_000}):
        asked = ModeGPTConfig(**target)
        config = resolve_target(architecture, asked)
        assert (config.target_size, config.target_parameters, config.target_quantization) == (None, None, None)
        plan = plan_from_targets([config.sparsity] * len(sizes), sizes)
        wanted = Target.of(asked)
        assert wanted is not None
        assert not wanted.is_missed(plan_size(architecture, plan, asked.target_quantization))


def test_experts_that_are_removed_do_not_count() -> None:
    architecture = resolve(dense("mixtral"))
    config = ModeGPTConfig(target_size=200_000, expert_sparsity=0.5)
    remaining = with_kept_experts(architecture, config)
    sizes = part_sizes(remaining, config)
    fewer = plan_size(remaining, Plan.dense(sizes)).parameters
    assert plan_size(architecture, Plan.dense(sizes)).parameters - fewer == 3 * 2 * (3 * 32 * 128 + 32)
    sparsity = resolve_target(remaining, config).sparsity
    assert resolve_target(architecture, ModeGPTConfig(target_size=200_000)).sparsity > sparsity > 0


# ------------------------------------------------------------------------------------------------------------- the walk


def test_the_command_reaches_the_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, text, output = save_dense(tmp_path / "m"), save_text(tmp_path / "t.txt"), tmp_path / "out"
    recipe = {**RECIPE, "sparsity": None, "target_size": "85kB"}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in recipe.items() if value is not None]
    words = [str(model), "--dataset", str(text), "--device", "cpu", *flags]
    assert cli.main(["estimate", *words, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert f"sparsity {found['sparsity']:.4g} reaches target_size=85kB: " in capsys.readouterr().out
    assert cli.main(["compress", *words, "--output", str(output)]) == 0
    reached = weight_bytes(output / "model.safetensors")
    assert abs(reached - 85_000) < TOLERANCE * 85_000
    assert found["result"]["bytes"] == reached
    line, chosen = f"target_size=85kB, reached {written_bytes(reached)}", f"for the target {found['sparsity']:.2%})"
    assert line in capsys.readouterr().out.splitlines()
    assert "quality drops quickly" in caplog.text, "the sparsity that follows is above the limit of the warning"
    report, record = Report.load(output / "report.json"), AutoConfig.from_pretrained(output).modegpt
    assert report.target == record["target"]
    assert report.target == {
        "field": "target_size",
        "requested": "85kB",
        "wanted": 85_000,
        "quantization": None,
        "reached": reached,
    }
    assert record["recipe"]["sparsity"] == report.requested_sparsity == found["sparsity"]
    assert not report.warnings
    card = (output / "README.md").read_text(encoding="utf-8")
    assert f"\n| target | {line} |\n" in card
    assert f" projections, {100 * found['sparsity']:.2f} % for the target |\n" in card
    assert cli.main(["inspect", str(output)]) == 0
    inspected = capsys.readouterr().out
    assert line in inspected.splitlines()
    assert chosen in inspected
    assert chosen in report.summary()


@pytest.mark.parametrize("target", [3, "big", {"field": "target_size"}, {"field": "x", "requested": 1, "reached": "x"}])
def test_an_edited_target_is_named(target: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = compressed("llama-mha")
    model.config.modegpt = {**model.config.modegpt, "target": target}
    model.save_pretrained(tmp_path)
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert "\nthe target in the record was edited, and cannot be read: " in capsys.readouterr().out
    assert "| target |" not in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama-mha", {"target_parameters": 37_200, "round_to": 24}),
        ("mixtral", {"target_parameters": 70_000, "round_to": 64, "expert_sparsity": 0.5}),
    ],
)
def test_a_coarse_grid_that_misses_the_size_is_a_warning(name: str, fields: dict[str, Any]) -> None:
    model = dense(name)
    config = ModeGPTConfig(**UNIFORM, **fields)
    report = compress(model, config, WINDOWS, device="cpu", progress=False)
    reached = sum(parameter.numel() for parameter in model.parameters())
    assert report.target["reached"] == reached == report.parameters.total_after
    said = f"the widths allowed by round_to={config.round_to} give {written_count(reached)}, not the requested "
    assert f"{said}target_parameters={config.target_parameters}." in report.warnings


def test_a_plan_replaces_the_target() -> None:
    model = dense("llama-mha")
    plan = Plan.from_list([{"qk": 8, "vo": 8, "mlp": 48}] * 3)
    config = ModeGPTConfig(target_size="1GB", **UNIFORM)
    report = compress(model, config, WINDOWS, plan=plan, device="cpu", progress=False)
    assert not report.target


# ------------------------------------------------------------------------------------------------------------- refusals

REFUSED = pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "llama-gqa-tied",
            {"target_size": "1MB"},
            r"target_size=1MB cannot be reached: with max_sparsity=0\.95 and round_to='auto' the weights of the result "
            r"take .* kB \(.*K parameters\) to .* kB \(.*K parameters\)\.",
        ),
        ("llama-gqa-tied", {"target_parameters": "9k"}, r"target_parameters=9k cannot be reached"),
        (
            "llama-gqa-tied",
            {"target_size": "100kB", "target_quantization": "int4"},
            r"target_size=100kB after quantization to int4 cannot be reached: .* after quantization to int4\.",
        ),
        ("llama-gqa-tied", {"expert_sparsity": 0.5}, "no experts"),
        ("mixtral", {"expert_sparsity": 0.75}, r"leaves 1 of 4 experts, but the router chooses 2"),
        ("mixtral", {"expert_sparsity": 0.5, "target_size": "600kB"}, "target_size=600kB cannot be reached"),
    ],
)


@REFUSED
def test_the_impossible_is_refused_from_the_configuration_alone(name: str, fields: Any, message: str) -> None:
    model: PreTrainedModel = on_meta(AutoModelForCausalLM, dense(name).config, torch.float32)
    with pytest.raises(InvalidConfig, match=message):
        estimate(model, ModeGPTConfig(**fields), 32)


def test_the_impossible_is_refused_before_text_and_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_dense(tmp_path / "m")
    with pytest.raises(InvalidConfig, match="target_size=1MB cannot be reached"):
        AutoModelForCausalLM.from_pretrained(
            folder, compression_config=ModeGPTConfig(target_size="1MB", dataset="nowhere.txt")
        )
    (folder / "model.safetensors").unlink()
    words = ["compress", str(folder), "--target-size", "1MB", "--output", str(tmp_path / "out")]
    assert cli.main([*words, "--ignore-estimate"]) == 2
    assert "target_size=1MB cannot be reached" in capsys.readouterr().err


def test_an_estimate_counts_the_experts_that_are_left() -> None:
    model = on_meta(AutoModelForCausalLM, dense("mixtral").config, torch.float32)
    whole, fewer = (estimate(model, ModeGPTConfig(sparsity=0.0, expert_sparsity=share), 32) for share in (0, 0.5))
    assert fewer.parameters == whole.parameters == whole.result.parameters
    assert fewer.result.parameters == whole.parameters - 3 * 2 * (3 * 32 * 128 + 32)
    assert fewer.forward_passes["experts"] == 1
    assert "experts" not in whole.forward_passes
