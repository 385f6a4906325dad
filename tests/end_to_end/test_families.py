"""The description of a family: every field is read, and a family is named in its own file only."""

from __future__ import annotations

import ast
import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_configs import FAMILIES, INSTALLED, TOO_NEW, TOWERS
from tiny_models import dense, tokens

from optimum_modegpt.architectures import family_of, resolve
from optimum_modegpt.calibration.streams import skipping_blocks
from optimum_modegpt.modeling import DENSE_TYPES, modegpt_family

ROOT = Path(modegpt_family.__file__).parents[1]
DESCRIPTIONS = (
    modegpt_family.Family,
    modegpt_family.Storage,
    modegpt_family.Positions,
    modegpt_family.HeadNorms,
    modegpt_family.Attention,
    modegpt_family.MLP,
    modegpt_family.Experts,
    modegpt_family.SharedExpert,
    modegpt_family.Norm,
    modegpt_family.Residual,
    modegpt_family.Head,
    modegpt_family.Projection,
)


@cache
def nodes() -> list[tuple[Path, ast.AST]]:
    """Return all nodes of the package's code with their files."""
    return [
        (path, node) for path in ROOT.rglob("*.py") for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    ]


@pytest.mark.parametrize("description", DESCRIPTIONS, ids=lambda each: each.__name__)
def test_every_field_is_read(description: type) -> None:
    read = {node.attr for _, node in nodes() if isinstance(node, ast.Attribute)}
    roles = {"query", "key", "value", "output"}  # read by role too
    assert {field.name for field in dataclasses.fields(description)} - roles <= read


OTHER_PROGRAMS = (
    "engines",
    "gguf",
    "gguf_architecture",
    "gguf_tensors",
    "gguf_tokenizer",
    "servable",
    "modegpt_phi3",
    "modegpt_qwen2",
)
"""Modules with facts about other programs by type of model, and families that have a stock class of another one."""


def test_a_family_is_named_in_its_own_file_only() -> None:
    elsewhere = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value!r}"
        for path, node in nodes()
        if isinstance(node, ast.Constant)
        and node.value in DENSE_TYPES
        and path.stem != f"modegpt_{node.value}"
        and path.stem not in OTHER_PROGRAMS
    ]
    assert elsewhere == []


def test_every_file_of_a_family_describes_it() -> None:
    for model_type in INSTALLED:
        classes = family_of(model_type)
        assert classes is not None
        assert classes.family.model_type == model_type


@pytest.mark.parametrize("name", FAMILIES)
def test_the_projections_are_all_matrices_of_a_block(name: str) -> None:
    block = resolve(dense(name)).blocks[0].compressible_copy(torch.device("cpu"))
    matrices = {path for path, tensor in block.module.named_parameters() if tensor.ndim == 2}
    assert matrices == {f"{projection.path}.weight" for projection in block.family.projections}


def test_every_family_has_a_tiny_model() -> None:
    assert {*INSTALLED, *TOWERS, *TOO_NEW} == set(DENSE_TYPES)


@pytest.mark.parametrize("name", ["phi", "cohere", "granite", "opt-post-ln"])
def test_the_linear_head_gives_the_logits_of_the_modules(name: str) -> None:
    """The head may have a bias, a scale, a divisor, or a projection before it."""
    model = dense(name)
    architecture = resolve(model)
    with torch.no_grad():
        stream, logits = skipping_blocks(architecture, tokens())
        if architecture.final_norm is not None:
            stream = architecture.final_norm(stream)
        matrix, offset = architecture.head(torch.device("cpu"))
        torch.testing.assert_close(stream @ matrix.T + offset, logits, atol=1e-5, rtol=1e-5)


def test_a_dense_configuration_may_have_a_name_that_the_compressed_one_computes() -> None:
    architecture = resolve(dense("falcon", num_key_value_heads=3))
    widths = [block.dense_widths for block in architecture.blocks]
    config = architecture.classes.config.from_dense(architecture.model.config, widths, {"format_version": 1})
    assert config.num_key_value_heads == 2, "the number that the dense class reads"
    assert "num_key_value_heads" not in config.to_dict()
