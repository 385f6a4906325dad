"""Test the accepted values and the error messages of `ModeGPTConfig`, and its copies in memory and in JSON."""

from __future__ import annotations

import copy
import inspect
import json
import re
from typing import Any

import pytest
import torch

from optimum_modegpt import InvalidConfig, ModeGPTConfig


def test_defaults_are_those_of_the_documentation() -> None:
    fields = ModeGPTConfig().to_dict()
    assert fields == {
        "quant_method": "modegpt",
        "sparsity": 0.3,
        "method": "default",
        "allocation": None,
        "layout": "per_layer",
        "dataset": {"c4": 1.0, "wikitext2": 1.0},
        "dataset_split": None,
        "text_column": None,
        "num_samples": 128,
        "sequence_length": None,
        "batch_size": None,
        "round_to": "auto",
        "seed": 0,
        "influence_temperature": 0.1,
        "max_sparsity": 0.95,
        "leverage_ridge": 1e-2,
        "output_ridge": 1e-4,
        "query_ridge": 1e-3,
        "input_ridge": 0.1,
        "refit_iterations": 4,
        "expert_sparsity": 0.0,
        "target_size": None,
        "target_parameters": None,
        "target_quantization": None,
        "tokenizer": None,
        "allow_foreign_tokenizer": False,
    }


@pytest.mark.parametrize(
    ("method", "allocation", "expected"),
    [("default", None, "sensitivity"), ("paper", None, "influence"), ("paper", "uniform", "uniform")],
)
def test_the_allocation_follows_the_method(method: Any, allocation: Any, expected: str) -> None:
    assert ModeGPTConfig(method=method, allocation=allocation).resolved_allocation == expected


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sparsity", 30, "sparsity must be in [0, 1), found 30. Fractions, not percent: for 30 % write sparsity=0.3."),
        ("sparsity", 1.0, "sparsity must be in [0, 1), found 1.0."),
        ("sparsity", -0.1, "sparsity must be in [0, 1), found -0.1."),
        ("sparsity", float("nan"), "sparsity must be in [0, 1), found nan."),
        ("sparsity", "0.3", "sparsity must be a number, found '0.3'."),
        ("sparsity", True, "sparsity must be a number, found True."),
        ("sparsity", 0.96, "sparsity=0.96 is above max_sparsity=0.95"),
        ("max_sparsity", 1.0, "max_sparsity must be in (0, 1), found 1.0."),
        ("method", "gptq", "method must be one of 'default', 'paper', found 'gptq'."),
        ("allocation", "best", "allocation must be one of 'sensitivity', 'influence', 'uniform', found 'best'."),
        ("num_samples", 0, "num_samples must be an integer of at least 1, found 0."),
        ("num_samples", 1.5, "num_samples must be an integer of at least 1, found 1.5."),
        ("sequence_length", 1, "sequence_length must be an integer of at least 2, found 1."),
        ("batch_size", 0, "batch_size must be an integer of at least 1, found 0."),
        ("round_to", 0, "round_to must be an integer of at least 1 or 'auto', found 0."),
        ("round_to", "big", "round_to must be an integer of at least 1 or 'auto', found 'big'."),
        ("seed", -1, "seed must be an integer of at least 0, found -1."),
        ("refit_iterations", -1, "refit_iterations must be an integer of at least 0, found -1."),
        ("influence_temperature", 0, "influence_temperature must be in (0, inf), found 0."),
        ("output_ridge", -1e-4, "output_ridge must be in (0, inf), found -0.0001."),
        ("dataset", None, "dataset=None: expected a name"),
        ("dataset", "", "dataset=''"),
        ("dataset_split", 3, "dataset_split must be a string or None, found 3."),
        ("text_column", ["text"], "text_column must be a string or None"),
        ("tokenizer", "in memory: Fast", "pass the tokenizer again"),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidConfig, match=re.escape(message)):
        ModeGPTConfig(**{field: value})


def test_an_unknown_key_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(InvalidConfig, match=r"'sparsty'.*Did you mean 'sparsity'"):
        ModeGPTConfig.from_dict({"sparsty": 0.3})
    with pytest.raises(InvalidConfig, match=r"'xyz'.*Fields: sparsity, method"):
        ModeGPTConfig.from_dict({"xyz": 0.3})


def test_json_round_trip() -> None:
    config = ModeGPTConfig(sparsity=0.2, method="paper", dataset="c4", round_to=1, batch_size=2, seed=3)
    assert ModeGPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert json.loads(config.to_json_string())["sparsity"] == 0.2


def test_deep_copies_share_a_live_dataset() -> None:
    windows = torch.zeros(4, 8, dtype=torch.int64)
    config = ModeGPTConfig(dataset=windows)
    copied = copy.deepcopy({"inner": config})["inner"]
    assert copied is not config
    assert copied.dataset is windows


def test_a_live_dataset_is_described_in_json_and_not_read_back() -> None:
    described = ModeGPTConfig(dataset=torch.zeros(4, 8, dtype=torch.int64)).to_dict()
    assert described["dataset"] == "in memory: Tensor shape (4, 8)"
    with pytest.raises(InvalidConfig, match="pass the dataset again"):
        ModeGPTConfig.from_dict(described)


@pytest.mark.parametrize(
    ("field", "hint"), [("sparsty", "Did you mean 'sparsity'?"), ("zzz", "Fields: sparsity, method,")]
)
def test_a_name_that_is_no_field_is_refused_with_the_nearest(field: str, hint: str) -> None:
    with pytest.raises(
        InvalidConfig, match=f"unknown field '{field}' in the compression configuration. {re.escape(hint)}"
    ):
        ModeGPTConfig(**{field: 0.3})
    assert list(inspect.signature(ModeGPTConfig).parameters)[:2] == ["sparsity", "method"]
