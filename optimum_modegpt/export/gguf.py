"""Export a dense or compressed model to a GGUF file, the format of llama.cpp."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from optimum_modegpt.errors import InvalidConfig, OutputError, UnsupportedModel
from optimum_modegpt.export.gguf_architecture import (
    Container,
    GGUFSupport,
    check_gguf,
    find_container,
    is_padded,
    mlp_widths,
    rope_tables,
    window_of,
)
from optimum_modegpt.export.gguf_tensors import GGUFTensor, rope_theta, tensors_of
from optimum_modegpt.export.gguf_tokenizer import Vocabulary, read_tokenizer
from optimum_modegpt.modeling.modegpt_config import head_dim
from optimum_modegpt.output import replacing_file, saving
from optimum_modegpt.progress import bar

__all__ = ["GGUFReport", "GGUFSupport", "GGUFType", "check_gguf", "check_gguf_output", "export_gguf"]

GGUFType = Literal["f32", "f16", "bf16", "q8_0"]
"""The types of the matrices in the file. Vectors are float32 always."""

MAGIC = b"GGUF"
"""The first bytes of every GGUF file."""

Q8_0_BLOCK = 32
"""The number of values of a row that share a scale."""


@dataclass(frozen=True)
class GGUFReport:
    """The description of a GGUF file that was written.

    Attributes:
        path: the file.
        architecture: the architecture of llama.cpp that it is written for.
        dtype: the type of its matrices.
        size: its size in bytes.
        notes: sentences for the user: parts that are stored larger than in the model, or in another type.
    """

    path: Path
    architecture: str
    dtype: GGUFType
    size: int
    notes: tuple[str, ...] = ()


def export_gguf(
    model: Any, tokenizer: Any, path: str | Path, dtype: GGUFType = "f16", overwrite: bool = False
) -> GGUFReport:
    """Write a causal language model and its tokenizer to a GGUF file.

    Everything is checked before the file is created. It is written next to `path` and renamed at the end, so that
    `path` is never half a file.

    Args:
        model: a compressed model, or a dense one of the same families, with its weights in memory.
        tokenizer: its fast tokenizer, or None. Without one, llama.cpp takes and returns token ids only.
        path: the file to write.
        dtype: the type of the matrices. "q8_0" stores blocks of 32 values of a row with one scale; a matrix whose rows
            are no multiple of 32 becomes float16.
        overwrite: whether an existing GGUF file may be replaced. Other files never are.

    Raises:
        ImportError: `gguf` is not installed.
        InvalidConfig: `dtype` is unknown.
        UnsupportedModel: llama.cpp cannot compute the same. The message names the part and an alternative.
        OutputError: the file cannot or must not be written.
    """
    path = Path(path)
    if dtype not in get_args(GGUFType):
        raise InvalidConfig(f"dtype is {dtype!r}; expected one of {', '.join(get_args(GGUFType))}.")
    gguf = _package()
    check_gguf_output(path, overwrite=overwrite)
    container, reason = find_container(model.config)
    if container is None:
        raise UnsupportedModel(reason)
    _check_weights(model)
    vocabulary = read_tokenizer(tokenizer, model.config.vocab_size)
    names = gguf.get_tensor_name_map(_architecture(gguf, container), model.config.num_hidden_layers)
    tensors = list(tensors_of(model, container, names))
    still_allowed = partial(check_gguf_output, path, overwrite=overwrite)
    with saving(path), replacing_file(path, still_allowed) as unfinished:
        writer = gguf.GGUFWriter(None, container.name)
        _add_metadata(writer, model, container)
        _add_vocabulary(writer, vocabulary)
        _add_file_type(gguf, writer, dtype)
        _write(gguf, writer, unfinished, tensors, dtype)
    notes = (*_padding_notes(model, tensors), *_type_notes(tensors, dtype), *vocabulary.notes)
    return GGUFReport(path, container.name, dtype, path.stat().st_size, notes)


def check_gguf_output(path: Path, *, overwrite: bool) -> None:
    """Raise an error if a file cannot or must not be written.

    Raises:
        OutputError: the path is a folder, or a file that may not be overwritten.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder; expected the name of a file, such as {path / 'model.gguf'}.")
    if not path.exists() and not path.is_symlink():
        return
    if not overwrite:
        raise OutputError(f"{path} exists; choose another --output, or overwrite it with --overwrite.")
    with saving(path), path.open("rb") as file:
        found = file.read(len(MAGIC))
    if found != MAGIC:
        raise OutputError(f"{path} is no GGUF file; --overwrite replaces GGUF files only. Choose another --output.")


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("exporting to GGUF requires gguf: pip install 'optimum-modegpt[gguf]'") from error
    logging.getLogger("gguf").setLevel(logging.WARNING)
    return gguf


def _architecture(gguf: Any, container: Container) -> Any:
    return next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == container.name)


def _check_weights(model: Any) -> None:
    """Refuse weights that are quantized, elsewhere than in memory, or of another head than a language model's."""
    if model.get_output_embeddings() is None:
        raise UnsupportedModel(
            f"GGUF: {type(model).__name__} has no language model's head; load it with AutoModelForCausalLM."
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise UnsupportedModel(f"GGUF: {name} is not in memory; load the model without a disk offload.")
        is_float = tensor.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
        if not is_float and not name.endswith(".rope_index"):
            raise UnsupportedModel(
                f"GGUF: {name} is {tensor.dtype}; export the model before it is quantized, and quantize the file."
            )


def _add_metadata(writer: Any, model: Any, container: Container) -> None:
    """Add the sizes of a model."""
    config = model.config
    writer.add_type("model")
    writer.add_name(Path(config.name_or_path or "model").name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    widths = mlp_widths(config)
    writer.add_feed_forward_length(widths if container.per_layer_mlp else widths[0])
    writer.add_head_count(config.num_attention_heads)
    if container.name == "gemma4":
        _add_gemma4_heads(writer, config)
    else:
        writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
        writer.add_key_length(head_dim(config))
        writer.add_value_length(head_dim(config))
        writer.add_rope_dimension_count(head_dim(config))
    if container.name.startswith("gemma"):
        _add_gemma(writer, config)
    else:
        writer.add_rope_freq_base(rope_theta(config, None))


def _add_gemma(writer: Any, config: Any) -> None:
    """Add the values that Gemma 3 and 4 have: the layers with a window, two bases of frequencies, and a cap."""
    tables = rope_tables(config)
    full = tables["full_attention"]
    writer.add_rope_freq_base(full["rope_theta"])
    if full.get("rope_type", "default") == "linear":
        writer.add_rope_scaling_type(_package().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    window = window_of(config)
    if window is not None:
        writer.add_sliding_window(window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        writer.add_rope_freq_base_swa(tables["sliding_attention"]["rope_theta"])
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _add_gemma4_heads(writer: Any, config: Any) -> None:
    """Add the heads of Gemma 4, which has one head dim for each type of layers."""
    layers = [config.per_layer_config[index] for index in range(config.num_hidden_layers)]
    dims = {kind: layer.head_dim for kind, layer in zip(config.layer_types, layers, strict=True)}
    writer.add_head_count_kv([layer.num_key_value_heads for layer in layers])
    full, sliding = dims["full_attention"], dims["sliding_attention"]
    writer.add_key_length(full)
    writer.add_value_length(full)
    writer.add_key_length_swa(sliding)
    writer.add_value_length_swa(sliding)
    writer.add_rope_dimension_count(full)
    writer.add_rope_dimension_count_swa(sliding)
    writer.add_shared_kv_layers(0)
    writer.add_embedding_length_per_layer_input(0)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Add the tokenizer."""
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.model == "none":
        return
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([token.encode() for token in vocabulary.tokens])
    writer.add_token_types(vocabulary.types)
    for name, index in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    optional = {
        "token_scores": vocabulary.scores,
        "token_merges": vocabulary.merges,
        "precompiled_charsmap": vocabulary.charsmap,
        "chat_template": vocabulary.chat_template or None,
    }
    for name, value in (optional | vocabulary.flags).items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)


def _add_file_type(gguf: Any, writer: Any, dtype: GGUFType) -> None:
    names = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[names[dtype]])
    if dtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write(gguf: Any, writer: Any, path: Path, tensors: list[GGUFTensor], dtype: GGUFType) -> None:
    """Write the file, with one tensor in memory at a time."""
    import numpy

    kinds = [gguf.GGMLQuantizationType[tensor_type(tensor, dtype).upper()] for tensor in tensors]
    for tensor, kind in zip(tensors, kinds, strict=True):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        shape = list(tensor.shape)
        count = shape[0] if len(shape) == 1 else shape[0] * shape[1]
        writer.add_tensor_info(tensor.name, shape, numpy.dtype("float32"), count // block * size, raw_dtype=kind)
    writer.open_output_file(path)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, kind in bar(zip(tensors, kinds, strict=True), desc="GGUF", unit="tensor", total=len(tensors)):
            values = tensor.load().contiguous()
            if kind.name in ("F16", "Q8_0"):  # whose scales are float16
                _check_range(tensor.name, values)
            writer.write_tensor_data(gguf.quants.quantize(values.numpy(), kind))
    finally:
        writer.close()


def _check_range(name: str, values: torch.Tensor) -> None:
    limit = torch.finfo(torch.float16).max
    if not bool((values.abs() <= limit).all()):
        raise UnsupportedModel(
            f"GGUF: {name} has values up to {values.abs().max().item():g}, and float16 ends at {limit:g}; export with "
            "dtype='bf16' or 'f32'."
        )


def tensor_type(tensor: GGUFTensor, dtype: GGUFType) -> str:
    """Return the type of a tensor in a file whose matrices have the type `dtype`."""
    if len(tensor.shape) == 1:
        return "f32"
    return "f16" if dtype == "q8_0" and tensor.shape[-1] % Q8_0_BLOCK else dtype


def _padding_notes(model: Any, tensors: list[GGUFTensor]) -> Iterator[str]:
    if not is_padded(model.config):
        return
    stored = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
    own = sum(tensor.source_size for tensor in tensors)
    yield (
        f"Attention is padded with zeros to the dense head dim {head_dim(model.config)}: the file has "
        f"{stored:,} values, the model {own:,}. It computes the same, but the narrower attention saves nothing in this "
        "format. Compress with layout='stock' to save it, or with layout='mlp' to cut the MLPs only."
    )


def _type_notes(tensors: list[GGUFTensor], dtype: GGUFType) -> Iterator[str]:
    other = [tensor.name for tensor in tensors if len(tensor.shape) > 1 and tensor_type(tensor, dtype) != dtype]
    if other:
        yield (
            f"{len(other)} of {len(tensors)} tensors are f16, because their rows are no multiple of {Q8_0_BLOCK}: "
            f"{', '.join(other[:3])}…"
        )
