"""GGUF files, read by the `gguf` package and by transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import compressed, dense, tokenizer, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from twins import dense_twin

from optimum_modegpt import ModeGPTConfig
from optimum_modegpt.calibration.data import TokenWindows
from optimum_modegpt.compress import compress
from optimum_modegpt.errors import InvalidConfig, OutputError, UnsupportedModel
from optimum_modegpt.export.gguf import check_gguf, export_gguf
from optimum_modegpt.modeling.modegpt_family import Widths

gguf = pytest.importorskip("gguf")

UNEVEN = [Widths(8, 8, 31), Widths(8, 8, 40), Widths(8, 8, 48)]
"""The widths of blocks whose attention is not cut."""


def read(path: Path) -> Any:
    return gguf.GGUFReader(path)


def field(reader: Any, name: str) -> Any:
    return reader.get_field(name).contents()


@pytest.mark.parametrize(
    ("name", "widths", "architecture"),
    [
        ("llama-mha", [Widths(4, 6, 32)] * 3, "llama"),
        ("qwen2", [Widths(6, 3, 32)] * 3, "qwen2"),
    ],
)
def test_transformers_reads_a_padded_model_from_the_file(
    name: str, widths: list[Widths], architecture: str, tmp_path: Path
) -> None:
    model = compressed(name, widths=widths)
    report = export_gguf(model, None, tmp_path / "model.gguf", "f32")
    assert report.architecture == architecture
    assert "padded" in report.notes[0]
    assert "layout='stock'" in report.notes[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-mqa-biases", "qwen2"])
def test_a_file_with_one_mlp_width_per_layer_has_the_tensors_of_the_padded_model(name: str, tmp_path: Path) -> None:
    model = compressed(name)
    export_gguf(model, None, tmp_path / "model.gguf", "f32")
    reader, state = read(tmp_path / "model.gguf"), dense_twin(model, name).state_dict()
    assert field(reader, "general.architecture") == "deci"
    assert field(reader, "deci.feed_forward_length") == [31, 40, 48]
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    for index, width in enumerate((31, 40, 48)):
        block = f"model.layers.{index}"
        assert len(found[f"blk.{index}.ffn_up.weight"]) == width
        for role, key in (("attn_q", "q_proj"), ("attn_k", "k_proj")):
            for leaf in ("weight", "bias"):
                expected = state[f"{block}.self_attn.{key}.{leaf}"]
                # Coordinates i and i + 4 of a head are next to each other in the file.
                assert torch.equal(found[f"blk.{index}.{role}.{leaf}"].unflatten(0, (-1, 4, 2)), halves_last(expected))
        assert torch.equal(found[f"blk.{index}.attn_v.weight"], state[f"{block}.self_attn.v_proj.weight"])
        assert torch.equal(found[f"blk.{index}.attn_output.weight"], state[f"{block}.self_attn.o_proj.weight"])


def halves_last(tensor: Tensor) -> Tensor:
    return tensor.unflatten(0, (-1, 2, 4)).transpose(1, 2)


def test_kept_frequencies_are_factors_of_those_that_llama_cpp_computes(tmp_path: Path) -> None:
    model = stock_llama()
    export_gguf(model, None, tmp_path / "model.gguf", "f32")
    reader = read(tmp_path / "model.gguf")
    factors = next(tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    base = field(reader, "llama.rope.freq_base") ** -(torch.arange(0, 6, 2) / 6)
    torch.testing.assert_close(base / torch.tensor(factors), kept_frequencies())
    assert field(reader, "llama.attention.key_length") == field(reader, "llama.rope.dimension_count") == 6


def kept_frequencies() -> Tensor:
    """Three of the four frequencies of a head dim of 8."""
    return 10000.0 ** -(torch.tensor([0, 2, 6]) / 8)


def stock_llama() -> PreTrainedModel:
    """A dense model with a head dim of 6 instead of 8, and the frequencies of three pairs."""
    factors = (10000.0 ** -(torch.arange(0, 6, 2) / 6) / kept_frequencies()).tolist()
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": factors, "long_factor": factors}
    rope |= {"attention_factor": 1.0, "factor": 1.0, "original_max_position_embeddings": 64}
    return dense("llama-mha", head_dim=6, intermediate_size=40, rope_parameters=rope)


def test_matrices_that_no_block_of_32_fits_are_f16_in_a_q8_0_file(tmp_path: Path) -> None:
    report = export_gguf(compressed("llama-mha", widths=UNEVEN), None, tmp_path / "model.gguf", "q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in read(report.path).tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert "blk.0.ffn_down.weight" in report.notes[-1]
    assert report.size == report.path.stat().st_size


def test_the_tokenizer_and_its_chat_template_are_in_the_file(tmp_path: Path) -> None:
    source = tokenizer()
    source.chat_template = "{{ messages[0].content }}"
    export_gguf(dense("llama-mha"), source, tmp_path / "model.gguf")
    reader = read(tmp_path / "model.gguf")
    assert field(reader, "tokenizer.ggml.tokens")[:259] == source.convert_ids_to_tokens(range(259))
    assert len(field(reader, "tokenizer.ggml.tokens")) == dense("llama-mha").config.vocab_size
    assert field(reader, "tokenizer.ggml.token_type")[:4] == [3, 3, 3, 1]  # special, special, special, normal
    assert field(reader, "tokenizer.ggml.pre") == "gpt-2"
    assert field(reader, "tokenizer.ggml.eos_token_id") == 2
    assert field(reader, "tokenizer.ggml.add_bos_token") is False
    assert field(reader, "tokenizer.chat_template") == source.chat_template


def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(tmp_path: Path) -> None:
    from tokenizers import normalizers, pre_tokenizers

    other_split, lower_case = tokenizer(), tokenizer()
    other_split.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    lower_case.backend_tokenizer.normalizer = normalizers.Lowercase()
    for source, part in ((other_split, "Whitespace"), (lower_case, "Lowercase")):
        with pytest.raises(UnsupportedModel, match=part):
            export_gguf(dense("llama-mha"), source, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "part", "alternative"),
    [
        (lambda: dense("gpt2"), "model_type 'gpt2'", "another format"),
        (lambda: compressed("qwen3"), r"layers \[0, 1\] are narrower", "layout='mlp'"),
        (lambda: dense("mistral-window"), "sliding_window is 6", "sliding_window=None"),
        (lambda: compressed("qwen3", widths=UNEVEN, tie_word_embeddings=False), "openelm", "allocation='uniform'"),
        (
            lambda: compressed("gemma3_text", widths=[Widths(12, 12, 32), Widths(12, 12, 31), Widths(12, 12, 48)]),
            "one MLP width",
            "allocation='uniform'",
        ),
        (lambda: dense("llama-mha", hidden_act="gelu"), "activation is 'gelu'", "ONNX"),
        (lambda: dense("llama-mha").to(torch.float8_e4m3fn), "float8", "before it is quantized"),
    ],
)
def test_a_model_that_the_format_does_not_hold_is_refused_before_anything_is_written(
    model: Any, part: str, alternative: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match=part) as error:
        export_gguf(model(), None, tmp_path / "folder" / "model.gguf")
    assert alternative in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "values", "architecture"),
    [("gemma3_text", {}, "gemma3"), ("qwen3", {"tie_word_embeddings": False}, "qwen3")],
)
@pytest.mark.parametrize("sparsity", [0.2, 0.37])
def test_models_compressed_as_the_refusals_advise_are_exported(
    name: str, values: dict[str, Any], architecture: str, sparsity: float, tmp_path: Path
) -> None:
    model = dense(name, **values)
    config = ModeGPTConfig(sparsity=sparsity, layout="mlp", allocation="uniform", method="paper")
    compress(model, config, TokenWindows(tokens(8, 24), {}), progress=False)
    assert export_gguf(model, None, tmp_path / "model.gguf").architecture == architecture


def test_the_check_needs_a_configuration_only() -> None:
    narrow = check_gguf(compressed("llama-mha").config)
    assert (narrow.architecture, narrow.reason, narrow.padded) == ("deci", None, True)
    assert check_gguf(compressed("qwen3", widths=UNEVEN).config).architecture == "openelm"
    assert check_gguf(dense("gemma4_text").config).architecture == "gemma4"
    refused = check_gguf(dense("opt").config)
    assert refused.architecture is None
    assert refused.reason is not None
    assert "opt" in refused.reason


def test_without_the_package_the_check_works_and_the_export_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    model = dense("llama-mha")
    assert check_gguf(model.config).architecture == "llama"
    with pytest.raises(ImportError, match=r"optimum-modegpt\[gguf\]"):
        export_gguf(model, None, tmp_path / "model.gguf")


def test_a_file_is_replaced_only_if_that_is_allowed_and_it_is_a_gguf_file(tmp_path: Path) -> None:
    model, path, other = dense("llama-mha"), tmp_path / "model.gguf", tmp_path / "notes.txt"
    export_gguf(model, None, path, "f32")
    before = path.read_bytes()
    other.write_text("my notes")
    with pytest.raises(OutputError, match="--overwrite"):
        export_gguf(model, None, path, "f16")
    assert path.read_bytes() == before
    with pytest.raises(OutputError, match="no GGUF file"):
        export_gguf(model, None, other, overwrite=True)
    assert other.read_text() == "my notes"
    with pytest.raises(OutputError, match="is a folder"):
        export_gguf(model, None, tmp_path, overwrite=True)
    assert export_gguf(model, None, path, "f16", overwrite=True).size < len(before)


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = dense("llama-mha"), tmp_path / "model.gguf"
    export_gguf(model, None, path, "f32")
    before, written = path.read_bytes(), []

    def fails_later(self: Any, tensor: Any) -> None:
        written.append(tensor)
        if len(written) == 4:
            raise OSError("No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fails_later)
    with pytest.raises(OutputError, match="No space left"):
        export_gguf(model, None, path, "f16", overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="q8_0"):
        export_gguf(dense("llama-mha"), None, tmp_path / "model.gguf", "q4_0")  # pyright: ignore[reportArgumentType]
