"""The contract with transformers: the methods whose arguments compressed classes rely on, and those that they handle.

An attention that replaces another one never sees an argument that was renamed, and the model then computes nonsense
without an error. So the dense class is compared with this list each time a compressed attention is built. A key-value
cache that arrives under another name can be seen only during a call, and is refused then.

This file is also remote code: it is copied next to the weights. It imports only torch and transformers.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import transformers
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.versions import require_version

from .modegpt_family import Family

KNOWN_VERSIONS = ("5.16.1", "5.19.0", "5.23.0", "5.24.0")
"""Releases of transformers that the whole test suite was run on."""

CACHE_NAMES = ("cache", "past_key_values", "layer_past")
"""Names of the argument that holds the key-value cache. transformers 5.24 renamed the second to the first."""

CROSS_ATTENTION = ("encoder_hidden_states", "encoder_attention_mask", "key_value_states")
"""Arguments of cross-attention, which a decoder passes as None."""

ATTENTION_PARAMETERS = frozenset(
    {
        "hidden_states",
        "position_embeddings",
        "attention_mask",
        "output_attentions",
        "use_cache",
        *CACHE_NAMES,
        *CROSS_ATTENTION,
    }
)
"""Parameters of a dense attention's `forward` that the compressed attention handles."""

ENGINES = ("vllm", "sglang")
"""The attention implementations of serving engines, which build and run models of transformers."""

LOADING_PARAMETERS = {
    "mark_tied_weights_as_initialized": {"loading_info"},
    "_adjust_missing_and_unexpected_keys": {"loading_info"},
}
"""Methods of `PreTrainedModel` that a strict load replaces or calls, with the parameters that it handles."""


def check_attention(dense_class: type, passed_on: Collection[str] = ()) -> str:
    """Return the name of the cache argument of a dense attention class, after checking that we handle its `forward`.

    `passed_on` are parameters that the class passes to the attention function, as every other keyword.

    Raises:
        ImportError: the class declares a parameter that the compressed attention does not handle, or no cache argument.
    """
    declared = _declared(dense_class.forward)  # pyright: ignore[reportAttributeAccessIssue]
    method = f"{dense_class.__name__}.forward"
    _refuse_unknown(method, declared, ATTENTION_PARAMETERS.union(passed_on))
    return _cache_name(f"{method} has the arguments", declared)


def check_release(model_type: str, since: str | None) -> None:
    """Check that the installed transformers has the classes that a family's compressed ones extend.

    `since` is the oldest release that has them, or None.

    Raises:
        ImportError: transformers is older.
    """
    if since is not None:
        hint = f"Older releases compute the attention of model_type {model_type!r} in another way. Run: pip install"
        require_version(f"transformers>={since}", f"{hint} 'transformers>={since}'")


def check_engine(config: Any, family: Family, adds_to_scores: bool) -> None:
    """Check that a serving engine can run a model of this family, if the configuration is for one.

    `adds_to_scores` says whether the attention adds a bias to the scores.

    Raises:
        ValueError: it cannot.
    """
    engine = getattr(config.get_text_config(), "_attn_implementation", None)
    if engine not in ENGINES:
        return
    reasons = {
        "only the text part is compressed": config is not config.get_text_config(),
        "the engine builds experts of the dense width": family.mlp.experts is not None,
        "not all layers have the attention": family.attention.layers is not None,
        "the engine does not add a bias to the attention scores": adds_to_scores,
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise ValueError(
            f"{engine} cannot serve model_type {config.model_type!r}: {reason}. Use transformers, or convert the model "
            "with: optimum-cli modegpt export MODEL --format dense"
        )


def check_parallelism(kwargs: Mapping[str, Any]) -> None:
    """Check that the arguments of `from_pretrained` do not ask for tensor parallelism.

    Raises:
        ValueError: they do.
    """
    distributed = kwargs.get("distributed_config")
    plans = kwargs.get("tp_plan"), getattr(distributed, "tp_plan", None)
    sizes = kwargs.get("tp_size"), getattr(distributed, "tp_size", None)
    if any(plans) or any(size is not None and size > 1 for size in sizes):
        raise ValueError(
            "Compressed models do not support tensor parallelism: leave out tp_plan and tp_size. To use several "
            "devices, give device_map='auto'."
        )


def check_loading() -> None:
    """Check that transformers still has the methods with which a load is made strict, with the same parameters.

    Raises:
        ImportError: a method is gone or declares other parameters.
    """
    for name, handled in LOADING_PARAMETERS.items():
        function = getattr(transformers.PreTrainedModel, name, None)
        if function is None:
            raise ImportError(f"PreTrainedModel.{name} does not exist; it is needed for strict loading. {_advice()}")
        _refuse_unknown(f"PreTrainedModel.{name}", _declared(function), handled)


def cache_field() -> str:
    """Return the name of the key-value cache in the outputs of the installed transformers.

    Raises:
        ImportError: no field has a known name.
    """
    fields = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
    return _cache_name("CausalLMOutputWithPast has the fields", fields)


def refuse_unread_arguments(attention: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an attention without those of cross-attention, which must be None.

    Raises:
        TypeError: there is a cross-attention, or a key-value cache under a name that the attention does not read.
    """
    read: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Cache):
            raise TypeError(
                f"{attention}.forward received a key-value cache as {name!r}, which it does not read. {_advice()}"
            )
        if name not in CROSS_ATTENTION:
            read[name] = value
        elif value is not None:
            raise TypeError(f"{attention}.forward received {name!r}; compressed models have no cross-attention.")
    return read


def _cache_name(found: str, names: Collection[str]) -> str:
    """Return the one name in `names` that the key-value cache is known by; `found` begins the error."""
    known = [name for name in CACHE_NAMES if name in names]
    if len(known) != 1:
        raise ImportError(
            f"{found} {', '.join(sorted(names))}; expected one of {', '.join(map(repr, CACHE_NAMES))} for the "
            f"key-value cache. {_advice()}"
        )
    return known[0]


def _declared(function: Callable[..., Any]) -> set[str]:
    """Return the names of a method's parameters, without `self`, `*args` and `**kwargs`."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters
    return {name for name, one in parameters.items() if name != "self" and one.kind not in variable}


def _refuse_unknown(method: str, declared: Collection[str], handled: Collection[str]) -> None:
    if unknown := sorted(set(declared) - set(handled)):
        raise ImportError(
            f"{method} declares {', '.join(map(repr, unknown))}, which optimum-modegpt does not handle, so a "
            f"compressed model would compute something else. {_advice()}"
        )


def _advice() -> str:
    return (
        f"Installed: transformers {transformers.__version__}; tested: {', '.join(KNOWN_VERSIONS)}. Update "
        f"optimum-modegpt, or install a tested version: pip install transformers=={KNOWN_VERSIONS[-1]}"
    )
