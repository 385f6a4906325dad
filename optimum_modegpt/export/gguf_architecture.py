"""The architectures of llama.cpp that hold a model. Everything here reads a configuration only and needs no `gguf`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from optimum_modegpt.modeling.modegpt_config import head_dim
from optimum_modegpt.modeling.modegpt_family import PREFIX, is_compressed


@dataclass(frozen=True)
class Container:
    """An architecture of llama.cpp.

    Attributes:
        name: its name in a GGUF file.
        per_layer_mlp: whether every layer has its own MLP width.
        frequencies: whether it reads rotary frequencies from the file, one set for all layers.
        consecutive: whether coordinates 2i and 2i + 1 of a head are a rotary pair, instead of i and i + n / 2.
        fused: whether query, key and value are one tensor.
        tied_only: whether the head is always the token embedding.
    """

    name: str
    per_layer_mlp: bool = False
    frequencies: bool = False
    consecutive: bool = False
    fused: bool = False
    tied_only: bool = False


_LLAMA = Container("llama", frequencies=True, consecutive=True)
_DECI = Container("deci", per_layer_mlp=True, frequencies=True, consecutive=True)
_QWEN2 = Container("qwen2")
_QWEN3 = Container("qwen3")
_OPENELM = Container("openelm", per_layer_mlp=True, fused=True, tied_only=True)
_GEMMA3 = Container("gemma3")
_GEMMA4 = Container("gemma4", per_layer_mlp=True, frequencies=True)

CONTAINERS: dict[str, tuple[Container, ...]] = {
    "llama": (_LLAMA, _DECI),
    "mistral": (_LLAMA, _DECI),
    "qwen2": (_QWEN2, _LLAMA, _DECI),
    "qwen3": (_QWEN3, _OPENELM),
    "gemma3_text": (_GEMMA3,),
    "gemma4_text": (_GEMMA4,),
}
"""The architectures that can hold a family, by the `model_type` of its dense models; the preferred one is first."""

ONE_WIDTH = "compress with layout='mlp' and allocation='uniform'"
"""How to make a model that every architecture of its family holds."""
_OTHER_VALUES: dict[str, tuple[str, ...]] = {
    "qwen3": ("attention_bias",),
    "gemma3_text": ("attention_bias", "attn_logit_softcapping", "use_bidirectional_attention"),
    "gemma4_text": (
        "attention_bias",
        "use_bidirectional_attention",
        "hidden_size_per_layer_input",
        "num_kv_shared_layers",
        "enable_moe_block",
    ),
}
"""Names of values in the configuration that the architectures of a family ignore."""

_ACTIVATIONS = {"gemma3_text": "gelu_pytorch_tanh", "gemma4_text": "gelu_pytorch_tanh"}
"""The activation of a family's architectures; "silu" if it is not listed."""


@dataclass(frozen=True)
class GGUFSupport:
    """The answer to the question whether a GGUF file can hold a model.

    Attributes:
        architecture: the architecture of llama.cpp that holds it; None if there is none.
        reason: why there is none, with an alternative; None if there is one.
        padded: whether narrow attention heads are filled with zeros up to the dense head dim, because the format has
            one head dim for all layers. This computes the same, but the attention is as large as that of the dense
            model.
    """

    architecture: str | None = None
    reason: str | None = None
    padded: bool = False


def check_gguf(model_config: Any) -> GGUFSupport:
    """Find the architecture of llama.cpp that holds a model with this configuration, dense or compressed.

    This reads the configuration only: it needs neither weights nor the `gguf` package.
    """
    container, reason = find_container(model_config)
    if container is None:
        return GGUFSupport(reason=reason)
    return GGUFSupport(container.name, padded=is_padded(model_config))


def find_container(config: Any) -> tuple[Container | None, str | None]:
    """Return the architecture that holds a model, or None and the reason."""
    family = dense_type(config)
    if family not in CONTAINERS:
        return None, (
            f"GGUF: model_type {config.model_type!r} is not supported; expected one of {', '.join(CONTAINERS)}, dense "
            "or compressed. Export to another format."
        )
    for reason in _obstacles(config, family):
        return None, f"GGUF: {reason}"
    reasons = []
    for container in CONTAINERS[family]:
        reason = _misfit(config, container)
        if reason is None:
            return container, None
        reasons.append(f"{container.name}: {reason}")
    return None, f"GGUF: no architecture of llama.cpp holds this model. {'; '.join(reasons)}."


def dense_type(config: Any) -> str:
    """Return the `model_type` of the dense models of the family."""
    return str(config.model_type).removeprefix(PREFIX)


def mlp_widths(config: Any) -> list[int]:
    """Return the MLP width of every layer."""
    if is_compressed(config.model_type):
        return [widths.mlp for widths in config.widths()]
    layers = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
    return [layers[index].intermediate_size for index in range(config.num_hidden_layers)]


def is_padded(config: Any) -> bool:
    """Return whether some heads of a model are narrower than the dense head dim."""
    if not is_compressed(config.model_type) or dense_type(config) == "gemma4_text":  # whose heads stay dense
        return False
    return any({widths.qk, widths.vo} != {head_dim(config)} for widths in config.widths())


def rope_of(config: Any, layer_type: str | None = None) -> dict[str, Any]:
    """Return the rotary parameters of a model, or of one type of its layers."""
    rope = config.rope_parameters or {}
    return rope.get(layer_type, rope) if layer_type else rope


def rope_tables(config: Any) -> dict[str | None, dict[str, Any]]:
    """Return the rotary parameters by the type of layers that use them; None if all layers use the same."""
    types = [name for name, rope in (config.rope_parameters or {}).items() if isinstance(rope, dict)]
    return {name: rope_of(config, name) for name in types or [None]}


def window_of(config: Any) -> int | None:
    """Return the length of the sliding window of a model, or None if no layer has one."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return config.sliding_window if "sliding_attention" in types else None
    return getattr(config, "sliding_window", None)


def _obstacles(config: Any, family: str) -> Iterator[str]:
    """Yield the reasons why no architecture of the family holds a model."""
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    expected = _ACTIVATIONS.get(family, "silu")
    if activation != expected:
        yield f"the activation is {activation!r}; llama.cpp computes {expected!r} in this family. Export to ONNX."
    for name in _OTHER_VALUES.get(family, ()):
        if getattr(config, name, None):
            yield f"{name} is {getattr(config, name)!r}, which llama.cpp ignores in this family. Export to ONNX."
    if family in ("qwen3", "gemma3_text") and is_compressed(config.model_type):
        yield from _narrow_norms(config, family)
    window = window_of(config)
    if window is not None and not family.startswith("gemma") and window < config.max_position_embeddings:
        yield (
            f"sliding_window is {window} and llama.cpp attends to all tokens in this family. For texts of up to "
            f"{window} tokens, set sliding_window=None and max_position_embeddings={window} in config.json; for longer "
            "ones, export to ONNX."
        )
    yield from _rotary_obstacles(config, family)


def _rotary_obstacles(config: Any, family: str) -> Iterator[str]:
    """Yield the reasons why no architecture of the family computes the rotary embedding of a model."""
    tables = rope_tables(config)
    for rope in tables.values():
        kind = rope.get("rope_type", "default")
        if kind == "dynamic" or not _one_set(rope):
            yield (
                f"the frequencies of rope_type {kind!r} depend on the length of the text; the format has one set of "
                "frequencies. Export to ONNX."
            )
        if kind != "proportional" and rope.get("partial_rotary_factor") not in (None, 1.0):
            yield f"partial_rotary_factor is {rope['partial_rotary_factor']}; expected 1. Export to ONNX."
    needed = {"gemma3_text": {"full_attention"}, "gemma4_text": {"full_attention", "sliding_attention"}}
    if missing := needed.get(family, set()) - {*(config.layer_types if family.startswith("gemma") else ())}:
        yield f"no layer has the type {sorted(missing)[0]}, and llama.cpp expects some in this family. Export to ONNX."
    if family == "gemma4_text" and tables["sliding_attention"].get("rope_type", "default") != "default":
        yield "layers with a sliding window have scaled frequencies, which llama.cpp ignores. Export to ONNX."


def _narrow_norms(config: Any, family: str) -> Iterator[str]:
    """Yield a reason if heads with norms are narrow: each has its own gains then."""
    dense, uniform = head_dim(config), "" if family == "qwen3" else " and allocation='uniform'"
    narrow = [index for index, widths in enumerate(config.widths()) if widths.qk != dense]
    if narrow:
        yield (
            f"queries and keys of layers {narrow[:5]} are narrower than the head dim {dense} and have a norm with "
            "other gains for every head; the format has one gain for all heads. Compress with "
            f"layout='mlp'{uniform}, or export to ONNX."
        )


def _one_set(rope: dict[str, Any]) -> bool:
    return rope.get("rope_type") != "longrope" or rope["short_factor"] == rope["long_factor"]


def _misfit(config: Any, container: Container) -> str | None:
    """Return the reason why an architecture does not hold a model of its family, or None."""
    if not container.per_layer_mlp and len(set(mlp_widths(config))) > 1:
        return f"it has one MLP width for all layers, and these have several; {ONE_WIDTH}"
    if container.tied_only and not config.tie_word_embeddings:
        return f"it has no head of its own, and this model does; {ONE_WIDTH}"
    if container.frequencies:
        return None
    for layer_type, rope in rope_tables(config).items():
        kind = rope.get("rope_type", "default")
        if kind != "default" and not (kind == "linear" and layer_type == "full_attention"):
            return f"it computes the rotary frequencies itself, and rope_type is {kind!r}; {ONE_WIDTH}"
    return None
