"""Validate the input before compression, and the result of every block."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from optimum_modegpt import distributed
from optimum_modegpt.allocation.plan import Plan, Sizes
from optimum_modegpt.architectures import Architecture
from optimum_modegpt.architectures.norms import gain, has_gain, set_gain
from optimum_modegpt.budget.sizes import check_reachable
from optimum_modegpt.calibration.data import describe_degenerate
from optimum_modegpt.calibration.streams import (
    DENSE_ADVICE,
    BlockInputs,
    Stream,
    check_dense,
    not_finite,
    skipping_blocks,
)
from optimum_modegpt.errors import CalibrationDataError, InvalidConfig, NumericalError, UnsupportedModel, naming
from optimum_modegpt.modeling.adoption import built
from optimum_modegpt.walk.request import Request
from optimum_modegpt.walk.state import State

DISTINCT_SHARE = 0.9
"""A smaller share of distinct calibration windows is a warning."""
READING_TOLERANCE = 1e-3
"""Largest relative difference between the own forward pass of a block, or of the head, and our reading of it."""
HEAD_TOKENS = 16
"""Tokens whose logits are compared: the head acts on each alike, and those of a whole window can take gigabytes."""


def check_request(request: Request, state: State) -> None:
    """Raise or warn of everything that can be checked before anything is computed."""
    tokens, model = request.calibration.tokens, request.architecture.model
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and tokens.shape[1] > context:
        raise CalibrationDataError(
            f"calibration windows have {tokens.shape[1]} tokens, the model's context is {context}; "
            f"set sequence_length to {context} or less."
        )
    check_reachable(request.config, request.sizes)
    if len(tokens) < distributed.world_size():
        raise CalibrationDataError(
            f"{len(tokens)} calibration windows cannot be divided among {distributed.world_size()} processes; start at "
            f"most {len(tokens)}, or calibrate on more windows with num_samples."
        )
    if (distinct := len(tokens.unique(dim=0))) < DISTINCT_SHARE * len(tokens):
        state.warn(
            f"only {distinct} of the {len(tokens)} calibration windows differ: the text repeats itself, and the model "
            "will be good at nothing else. Calibrate on varied text like that which the model will see."
        )
    if degenerate := describe_degenerate(request.calibration):
        state.warn(degenerate)
    widest = max(block["mlp"].dense for block in request.sizes)
    if tokens.numel() < widest:
        state.warn(
            f"only {tokens.numel()} calibration tokens for an MLP width of {widest}: the moments are rank deficient. "
            f"Use at least {widest} tokens, better {4 * widest}."
        )


def check_plan(plan: Plan, sizes: Sizes) -> None:
    """Raise if a plan of the caller has another number of blocks than the model, or a width that is not allowed."""
    if len(plan.widths) != len(sizes):
        raise InvalidConfig(f"the plan has {len(plan.widths)} blocks, the model {len(sizes)}.")
    for index, (widths, block) in enumerate(zip(plan.widths, sizes, strict=True)):
        for part, width in vars(widths).items():
            if part not in block and width:
                raise InvalidConfig(f"plan, block {index}: {part} width {width}; the block has no {part}, expected 0.")
        for part, size in block.items():
            width = getattr(widths, part)
            if width not in size.widths():
                raise InvalidConfig(
                    f"plan, block {index}: {part} width {width}; allowed are {size.dense} and the multiples of "
                    f"{size.step} from {size.floor} up to it (round_to and max_sparsity of the configuration)."
                )


def check_equal_widths(plan: Plan, architecture: Architecture) -> None:
    """Raise if a plan of the caller has widths that no stock class can have together."""
    config, first = architecture.model.config, dict[str, int]()
    for block, widths in zip(architecture.blocks, plan.widths, strict=True):
        own = {"qk": ("head dim", widths.qk), "vo": ("head dim", widths.vo)}
        own["mlp"] = (architecture.family.width_name(config, block.index), widths.mlp)
        for part, (name, width) in own.items():
            if part not in block.parts:
                continue
            if first.setdefault(name, width) != width:
                raise InvalidConfig(
                    f"plan, block {block.index}: {part} width {width}; expected {first[name]}, because with "
                    f"layout='stock' all blocks have one {name}, and query, key and value the same head dim."
                )


def check_tensors(architecture: Architecture) -> None:
    """Refuse a model whose tensors have other names or shapes than those of its class in transformers."""
    model, classes = architecture.model, architecture.classes
    with torch.device("meta"):
        built = classes.stock_causal_lm(model.config)
    known, own = built.state_dict(), model.state_dict()
    if unknown := sorted(own.keys() - known.keys()):
        raise UnsupportedModel(
            f"{type(model).__name__} has tensors that its family does not: {', '.join(unknown[:5])}"
            f"{' …' if len(unknown) > 5 else ''}. Compress the plain model."
        )
    if wrong := sorted(name for name in own if own[name].shape != known[name].shape):
        found = [f"{name} is {tuple(own[name].shape)}, expected {tuple(known[name].shape)}" for name in wrong[:5]]
        raise UnsupportedModel(
            f"{type(model).__name__} has tensors of another shape than its configuration says: {'; '.join(found)}"
            f"{' …' if len(wrong) > 5 else ''}. Load the model without ignore_mismatched_sizes, or fix config.json."
        )


def check_reading(request: Request, inputs: BlockInputs) -> None:
    """Compare every block's own forward pass with that of its compressed class at full width, and then the logits.

    One window is enough. A model that computes anything else than its family's classes would be compressed to a wrong
    model without an error. The blocks are compared one by one; the logits with those of the family's class in
    transformers, which show a difference in embeddings, masks and positions too.
    """
    window = inputs.stream[0][:1].to(request.device)
    _check_norms(request.architecture, window)
    for block in request.architecture.blocks:
        arguments = inputs.on(block.index, request.device)
        own = block.on(request.device).forward(window, arguments)
        ours = block.compressible_copy(request.device).composed_forward(window, arguments)
        with naming(f"block {block.index}"):
            check_dense([own], inputs.windows)
        if (difference := _difference(own, ours)) is not None:
            raise UnsupportedModel(
                f"{type(request.architecture.model).__name__}, block {block.index} computes something else than its "
                f"family's norms, attention and MLP (relative difference {difference:.1e}); this model variant is not "
                "supported."
            )
        window = own
    tail = request.architecture.own_tail
    logits = tail(window[:, -1:].to(tail.output.weight.device))
    if (name := not_finite([logits], inputs.windows)) is not None:
        raise NumericalError(f"the dense model's logits are not finite on {name}. {DENSE_ADVICE}")
    tokens = request.calibration.tokens[:1, :HEAD_TOKENS]
    _check_head(request.architecture, tokens)
    _check_model(request.architecture, tokens)


def _check_norms(architecture: Architecture, stream: Tensor) -> None:
    """Check that gain and centring of the model's norms are as its family describes them.

    The compression changes gains, and an error shows only at a gain that is not that of the model.
    """
    kind, residual = architecture.family.norm, architecture.blocks[0].residual
    attending = next((block for block in architecture.blocks if block.attends and "qk" not in block.uncut), None)
    of_heads = [] if attending is None else attending.dense_head_norms
    of_outputs = residual.attention_output_norm, residual.mlp_output_norm
    for norm in (residual.attention_norm, residual.mlp_norm, *of_outputs, architecture.final_norm, *of_heads):
        if not has_gain(norm):
            continue
        copied: Any = copy.deepcopy(norm).to(stream.device)
        values = stream.to(copied.weight.dtype)
        if norm in of_heads:
            values = values.flatten()[: copied.weight.numel()].view_as(copied.weight)
        bias = 0.0 if getattr(copied, "bias", None) is None else copied.bias.detach()
        single, shifted = copied(values), copied(values + values.std())
        set_gain(copied, kind, 2 * gain(copied, kind))
        wrong = _difference(copied(values) - bias, 2 * (single - bias)) is not None
        if wrong or (_difference(single, shifted) is None) != kind.centred:
            raise UnsupportedModel(
                f"{type(architecture.model).__name__}: {type(norm).__name__} computes its gain or its mean in another "
                "way than the norms of its family; this model variant is not supported."
            )


def _check_head(architecture: Architecture, tokens: Tensor) -> None:
    """Compare the model's own logits with those of the modules after its last block, with all blocks left out."""
    stream, own = skipping_blocks(architecture, tokens)
    if (difference := _difference(own, architecture.own_tail(stream))) is not None:
        raise UnsupportedModel(
            f"{type(architecture.model).__name__} computes its logits in another way than its family, by the final "
            f"norm and the head (relative difference {difference:.1e}); this model variant is not supported."
        )


def _check_model(architecture: Architecture, tokens: Tensor) -> None:
    """Compare the model with the class of transformers that its compressed class derives from, on the same tensors."""
    model: Any = architecture.model
    stock_class: Any = architecture.classes.stock_causal_lm
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = architecture.head_is_tied
    stock: Any = built(model, stock_class, config, {})
    ids = tokens.to(model.get_input_embeddings().weight.device)
    own = model(input_ids=ids, use_cache=False).logits
    expected = stock(input_ids=ids, use_cache=False).logits
    if (difference := _difference(own, expected)) is not None:
        raise UnsupportedModel(
            f"{type(model).__name__} computes other logits than {stock_class.__name__} with the same weights (relative "
            f"difference {difference:.1e}): it changes embeddings, masks, positions or the order of its blocks, or has "
            "hooks. A compressed model would not; remove the change or the hooks, or compress the plain model."
        )
    _check_derived_buffers(model, stock_class, config)


def _check_derived_buffers(model: Any, stock_class: Any, config: Any) -> None:
    """Compare buffers that no file contains, such as rotary frequencies, with those that a reload would compute."""
    with torch.device("meta"):
        fresh = stock_class(config)
    models = {
        f"{path}." if path else "": each for path, each in fresh.named_modules() if hasattr(each, "_init_weights")
    }
    for path, module in fresh.named_modules():
        if not module._non_persistent_buffers_set:
            continue
        module.to_empty(device="cpu", recurse=False)
        # A tower inside the model initialises its own modules.
        models[max((start for start in models if f"{path}.".startswith(start)), key=len)]._init_weights(module)
        for name in sorted(module._non_persistent_buffers_set):
            own, expected = getattr(model.get_submodule(path), name).cpu(), getattr(module, name)
            rounding = torch.finfo(own.dtype).eps if own.is_floating_point() else 0.0
            if own.shape != expected.shape or not torch.allclose(own.to(expected), expected, rtol=rounding, atol=0.0):
                raise UnsupportedModel(
                    f"{path}.{name} was changed in memory and is not saved with the weights, so a reloaded model would "
                    "compute something else. Change the configuration instead, for example its rope_parameters."
                )


def _difference(own: Tensor, ours: Tensor) -> float | None:
    """Return the relative difference of two outputs that should be equal, or None if it is within rounding."""
    difference = float((own.float() - ours.float()).norm() / own.float().norm().clamp_min(1e-30))
    tolerance = max(READING_TOLERANCE, 10 * torch.finfo(own.dtype).eps)
    if difference <= tolerance:
        return None
    return difference  # not a number is a difference


def check_result(error: dict[str, float], compressed: Stream, windows: Tensor) -> None:
    """Raise if a block's fit or output is not finite. `windows` are the numbers of the stream's windows."""
    for part, value in error.items():
        if not math.isfinite(value):
            raise NumericalError(f"{part}: its fit is not finite; calibrate on more, and more varied, text.")
    if (window := not_finite(compressed, windows)) is not None:
        raise NumericalError(
            f"the compressed block's output is not finite on {window}, although the dense model's is; calibrate on "
            "more, and more varied, text."
        )
