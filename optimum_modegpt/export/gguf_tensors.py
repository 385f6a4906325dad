"""The tensors of a GGUF file: names, order of rows, and zeros for the parts of narrow attention heads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimum_modegpt.errors import UnsupportedModel
from optimum_modegpt.export.gguf_architecture import Container, dense_type
from optimum_modegpt.modeling.modegpt_attention import ModeGPTAttentionMixin
from optimum_modegpt.modeling.modegpt_config import head_dim

UNROTATED = 1e30
"""The factor of a pair that does not rotate: its frequency is divided by it."""

_ATTENTION = re.compile(r"^(model\.layers\.(\d+)\.self_attn)\.(q|k|v|o)_proj\.(weight|bias)$")


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: its name in the file.
        shape: its shape, as in PyTorch.
        load: computes its values in float32.
        source_size: the number of values that the model has for it; the others are zeros.
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]
    source_size: int


def tensors_of(model: Any, container: Container, names: Any) -> Iterator[GGUFTensor]:
    """Yield the tensors of a model, in the order of the file.

    Args:
        model: a dense or compressed causal language model.
        container: the architecture that holds it.
        names: the `gguf.TensorNameMap` of that architecture.

    Raises:
        UnsupportedModel: the architecture has no place for a tensor of the model.
    """
    state, seen = model.state_dict(), set()
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        seen.add("lm_head.weight")
    if container.frequencies and (factors := frequency_factors(model)) is not None:
        yield GGUFTensor("rope_freqs.weight", tuple(factors.shape), lambda: factors, len(factors))
    for key in state:
        if key in seen or key.endswith(".rope_index"):
            continue
        parts = [key]
        if container.fused and ".q_proj." in key:
            parts = [key.replace(".q_proj.", f".{role}_proj.") for role in "qkv"]
        seen.update(parts)
        yield _tensor(model, container, state, parts, names)


def frequency_factors(model: Any) -> Tensor | None:
    """Return the numbers that divide the frequencies base^(-2j / d) of llama.cpp to give those of the model, (d / 2,).

    None if all are 1. For Gemma 4, they are those of the layers with full attention.
    """
    name = "full_attention" if dense_type(model.config) == "gemma4_text" else None
    frequencies = rotary_frequencies(model, name).double()
    plain = plain_frequencies(rope_theta(model.config, name), 2 * len(frequencies))
    factors = torch.where(frequencies == 0, UNROTATED, plain / frequencies).float()
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-6, atol=0) else factors


def rotary_frequencies(model: Any, layer_type: str | None) -> Tensor:
    """Return the frequencies of the pairs of a head, as the model computes them."""
    rotary = model.model.rotary_emb
    return getattr(rotary, "inv_freq" if layer_type is None else f"{layer_type}_inv_freq").detach().cpu()


def rotary_scale(model: Any, layer_type: str | None) -> float:
    """Return the number that multiplies the sines and cosines of a model."""
    rotary = model.model.rotary_emb
    return float(getattr(rotary, "attention_scaling" if layer_type is None else f"{layer_type}_attention_scaling"))


def rope_theta(config: Any, layer_type: str | None) -> float:
    """Return the base of the frequencies of a model, or of one type of its layers."""
    rope = config.rope_parameters
    return float((rope if layer_type is None else rope[layer_type])["rope_theta"])


def plain_frequencies(theta: float, dim: int) -> Tensor:
    """Return the frequencies that llama.cpp computes for a head of `dim` coordinates, (dim / 2,)."""
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def _tensor(model: Any, container: Container, state: dict[str, Tensor], keys: list[str], names: Any) -> GGUFTensor:
    key, leaf = keys[0], keys[0].rpartition(".")[2]
    source = re.sub(r"\.q_proj\.", ".qkv_proj.", key) if len(keys) > 1 else key
    if leaf not in ("weight", "bias"):  # the scalar of a layer
        source = f"{key}.weight"
    name = names.get_name(source, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise UnsupportedModel(
            f"GGUF: {container.name} of llama.cpp has no place for the tensor {key}. Export to another format."
        )
    shapes = [_shape(model, one, state[one]) for one in keys]
    shape = (sum(one[0] for one in shapes), *shapes[0][1:])

    def load() -> Tensor:
        values = [_values(model, container, one, state[one].detach().cpu().float()) for one in keys]
        return torch.cat(values) if len(values) > 1 else values[0]

    return GGUFTensor(name, shape, load, sum(state[one].numel() for one in keys))


def _shape(model: Any, key: str, tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of a tensor with whole heads."""
    match = _ATTENTION.match(key)
    if match is None:
        return tuple(tensor.shape) or (1,)
    axis, attention = _axis(match), model.get_submodule(match[1])
    shape = list(tensor.shape)
    if axis is not None and isinstance(attention, ModeGPTAttentionMixin):
        shape[axis] = shape[axis] // _width(attention, match[3]) * attention.dense_head_dim
    return tuple(shape)


def _axis(match: re.Match[str]) -> int | None:
    """Return the axis of a projection's weight or bias that counts coordinates of heads."""
    return 0 if match[3] != "o" else None if match[4] == "bias" else 1


def _width(attention: ModeGPTAttentionMixin, role: str) -> int:
    return attention.qk_head_dim if role in "qk" else attention.v_head_dim


def _values(model: Any, container: Container, key: str, tensor: Tensor) -> Tensor:
    match = _ATTENTION.match(key)
    if match is not None:
        return _projection(model, container, match, tensor)
    if key.endswith("norm.weight") and dense_type(model.config) == "gemma3_text":
        gain = tensor + 1.0  # llama.cpp multiplies by the whole gain
        return gain * _gemma3_query_scale(model) if key.endswith("q_norm.weight") else gain
    return tensor.reshape(tensor.shape or (1,))


def _gemma3_query_scale(model: Any) -> float:
    """Return the ratio of the softmax scale of a Gemma 3 model and that of llama.cpp, which depends on the depth."""
    config = model.config
    width = head_dim(config) if config.num_hidden_layers != 62 else config.hidden_size // config.num_attention_heads
    return (width / config.query_pre_attn_scalar) ** 0.5


def _projection(model: Any, container: Container, match: re.Match[str], tensor: Tensor) -> Tensor:
    """Return the weight or bias of a projection with whole heads, in the order of coordinates of llama.cpp."""
    attention, axis = model.get_submodule(match[1]), _axis(match)
    width = attention.head_dim
    if axis is not None and isinstance(attention, ModeGPTAttentionMixin):
        width = attention.dense_head_dim
        tensor = _whole_heads(attention, match[3], tensor, axis)
    if match[3] == "q" and container.frequencies and container.name != "gemma4":
        tensor = tensor * rotary_scale(model, None) ** 2  # of the queries and of the keys
    if container.consecutive and match[3] in "qk":
        return tensor.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)
    return tensor


def _whole_heads(attention: ModeGPTAttentionMixin, role: str, tensor: Tensor, axis: int) -> Tensor:
    """Place the coordinates of narrow heads at those of the dense model, along an axis, with zeros for the others."""
    whole, width = attention.dense_head_dim, _width(attention, role)
    heads = tensor.shape[axis] // width
    if role in "qk" and attention.rotates:
        pairs = attention.rope_index.cpu().long()
        kept = torch.cat((pairs, pairs + whole // 2), dim=1).repeat_interleave(heads // len(pairs), dim=0)
    else:
        kept = torch.arange(width).expand(heads, -1)
    places = (kept + whole * torch.arange(heads)[:, None]).flatten()
    shape = list(tensor.shape)
    shape[axis] = heads * whole
    return tensor.new_zeros(shape).index_copy_(axis, places, tensor)
