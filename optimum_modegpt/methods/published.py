"""`method="paper"`: the published algorithm. One shot, with uncentred statistics of the dense model."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optimum_modegpt.architectures import Block
from optimum_modegpt.architectures.block import Channels
from optimum_modegpt.calibration.moments import HeadMomentSum, HeadSamples, QueryKeyMoments
from optimum_modegpt.calibration.streams import Stream, inputs_of, map_stream, token_count
from optimum_modegpt.config import ModeGPTConfig
from optimum_modegpt.decompositions.least_squares import LinearMoments, relative
from optimum_modegpt.decompositions.nystrom import nystrom_refit, ridge_leverage, select_by_leverage
from optimum_modegpt.decompositions.rotary import pair_indices, select_coordinates, select_pairs
from optimum_modegpt.decompositions.whitened_svd import joint_value_output
from optimum_modegpt.errors import naming
from optimum_modegpt.methods.experts import mlp_moments, select_experts, shared_moments
from optimum_modegpt.methods.factors import MLPFactors, QueryKeyFactors, ValueOutputFactors
from optimum_modegpt.methods.head_norms import narrow_query_key
from optimum_modegpt.modeling.modegpt_family import Widths


@dataclass(frozen=True)
class PublishedMoments:
    """Moments of one dense block.

    Attributes:
        mlp: of the input of the down projection; with experts, of each expert.
        attention: of the attention; None if it stays dense.
        shared: of the input of the shared expert's down projection; None if there is none.
    """

    mlp: LinearMoments | list[LinearMoments]
    attention: AttentionMoments | None
    shared: LinearMoments | None


@dataclass(frozen=True)
class AttentionMoments:
    """Moments of query and key, and of values (kv_heads, d, d).

    If single coordinates of the values are kept, `values` are the moments of the heads' outputs instead, (heads, d, d).
    """

    query_key: QueryKeyMoments
    values: Tensor


class AttentionMomentSum:
    """Accumulates the moments of the heads of a dense block from the inputs of its attention."""

    def __init__(self, block: Block, tokens: int) -> None:
        separate = block.is_separate and not block.normalised
        self.block = block if separate else block.compressible_copy(block.device)
        self.query, self.key = HeadMomentSum(block.kv_heads), HeadMomentSum(block.kv_heads)
        self.values = HeadMomentSum(block.heads if block.keeps_coordinates else block.kv_heads)
        self.samples = HeadSamples(self.block, tokens) if block.normalised else None

    def add(self, inputs: Tensor, outputs: Tensor, arguments: dict[str, Any]) -> None:
        """Add tokens, with the other arguments of the block.

        `inputs` are (batch, length, d_model), and the `outputs` of the heads (batch, length, heads · head_dim).
        """
        if self.samples is None:
            query, key = (_in_heads(self.block, linear(inputs)) for linear in (self.block.query, self.block.key))
        else:
            query, key = self.samples.vectors(inputs, arguments)
        self.query.add(query)
        self.key.add(key)
        if self.block.keeps_coordinates:
            self.values.add(_in_heads(self.block, outputs))
        else:
            self.values.add(_value_vectors(self.block, inputs))

    def value(self) -> AttentionMoments:
        """Return the moments so far, over the tokens of all ranks."""
        samples = None if self.samples is None else self.samples.value()
        return AttentionMoments(QueryKeyMoments(self.query.value(), self.key.value(), samples), self.values.value())


def observe(block: Block, stream: Stream, arguments: dict[str, Any]) -> tuple[PublishedMoments, Stream]:
    """Run the dense block over `stream`. Return its moments and the stream after it."""
    attention = AttentionMomentSum(block, token_count(stream)) if block.attends else None
    with mlp_moments(block, bias=False) as mlp, shared_moments(block, bias=False) as shared, ExitStack() as stack:
        modules = [] if attention is None else [block.stored_value, block.output]
        reads = [stack.enter_context(inputs_of(module)) for module in modules]

        def observed(entering: Tensor) -> Tensor:
            output = block.forward(entering, arguments)
            if attention is not None:
                inputs, outputs = (seen.pop() for seen in reads)
                attention.add(inputs, outputs, arguments)
            return output

        after = list(map_stream(observed, block.device, stream))
    moments = PublishedMoments(
        mlp.value(),
        None if attention is None else attention.value(),
        None if shared is None else shared.value(),
    )
    return moments, after


def compress_block(
    student: Block, moments: PublishedMoments, widths: Widths, config: ModeGPTConfig, pairs: Tensor | None = None
) -> dict[str, float]:
    """Cut the parts of `student`, a copy of the dense block. Return the relative error by part.

    `pairs` are those of `CalibrationInputs`.
    """
    errors = {}
    if moments.attention is not None:
        errors = _compress_attention(student, moments.attention, widths, config, pairs)
    with naming("mlp"):
        if isinstance(moments.mlp, LinearMoments):
            mlp = cut_channels(student.mlp_channels(), moments.mlp, widths.mlp, config)
        else:
            mlp = select_experts(student, moments.mlp, widths.mlp, config)
    mlp.install(student)
    errors["mlp"] = mlp.relative_error
    if moments.shared is not None:
        with naming("shared"):
            shared = cut_channels(student.shared_channels(), moments.shared, widths.shared, config)
        student.install_shared(shared.channels)
        errors["shared"] = shared.relative_error
    return errors


def _compress_attention(
    student: Block, moments: AttentionMoments, widths: Widths, config: ModeGPTConfig, pairs: Tensor | None
) -> dict[str, float]:
    """Cut the attention of `student`. Return the relative errors."""
    with naming("qk"):
        query_key = cut_query_key(student, moments.query_key, widths.qk, pairs, shared_gains=config.layout == "stock")
    student.install_query_key(query_key.query, query_key.key, query_key.pairs, query_key.gains)
    with naming("vo"):
        if student.keeps_coordinates:
            value_output = cut_value_coordinates(student, moments.values, widths.vo, config)
        else:
            value_output = cut_value_output(student, moments.values, widths.vo)
    if "vo" not in student.uncut:  # the cut moves the value bias behind a clamp of the values
        student.install_value_output(value_output.value, value_output.output, value_output.gate)
    return {"qk": query_key.relative_error, "vo": value_output.relative_error}


def cut_query_key(
    block: Block,
    moments: QueryKeyMoments,
    rank: int,
    pairs: Tensor | None = None,
    *,
    shared_gains: bool = False,
) -> QueryKeyFactors:
    """Select the same coordinates of query and key in each group (CR, Algorithm 2). Rotary pairs stay together.

    If `pairs` (rank / 2,) are given, all heads keep them. `shared_gains` is that of `narrow_query_key`.
    """
    query, key = block.head_rows("query"), block.head_rows("key")
    if block.paired:
        if pairs is None:
            pairs = select_pairs(moments.query, moments.metric, rank // 2)
        else:
            pairs = pairs.to(moments.query.device).expand(block.kv_heads, -1)
        kept = pair_indices(pairs, block.head_dim)
    else:
        pairs, kept = None, select_coordinates(moments.query, moments.metric, rank)
    products = moments.query.diagonal(dim1=-2, dim2=-1) * moments.metric.diagonal(dim1=-2, dim2=-1)
    lost = products.sum() - products.gather(1, kept).sum()
    error = relative(lost, products.sum())
    if moments.samples is not None and pairs is not None and rank < block.head_dim:
        return narrow_query_key(block, moments.samples, pairs, error, shared_gains=shared_gains)
    kept_queries = kept.repeat_interleave(block.heads // block.kv_heads, dim=0)
    return QueryKeyFactors(_take(query, kept_queries), _take(key, kept), pairs if block.rotary else None, error)


def cut_value_output(block: Block, values: Tensor, rank: int) -> ValueOutputFactors:
    """Compute the joint SVD (Algorithm 3) per key-value group.

    A value bias is exact. It is added to the output's bias if there is one, because softmax rows sum to one. Otherwise,
    it is part of the value vectors, and projected with them.
    """
    value, output = block.head_rows("value"), block.input_outputs(block.output)
    heads, bias = output.tensor_split((block.heads * block.head_dim,))
    heads = heads.unflatten(0, (block.kv_heads, -1, block.head_dim))
    bases, outputs, lost, total = [], [], values.new_zeros(()), values.new_zeros(())
    for moment, group in zip(values, heads, strict=True):
        side_by_side = group.transpose(0, 1).flatten(1)  # (head_dim, heads of the group · d_model)
        basis, joint = joint_value_output(moment, side_by_side, rank)
        bases.append(basis)
        outputs.append(joint.unflatten(1, (len(group), -1)).transpose(0, 1).flatten(0, 1))
        difference = side_by_side - basis @ joint
        lost += (difference * (moment @ difference)).sum()
        total += (side_by_side * (moment @ side_by_side)).sum()
    cut = torch.stack(bases).mT @ value  # (kv_heads, rank, in [+ 1])
    if len(bias) and block.value.bias is not None:
        value_bias = value[..., -1].repeat_interleave(block.heads // block.kv_heads, dim=0)
        bias = bias + value_bias.flatten() @ output[:-1]
        cut = torch.cat((cut[..., :-1], torch.zeros_like(cut[..., -1:])), dim=-1)
    return ValueOutputFactors(cut, torch.cat((*outputs, bias)), relative(lost, total))


def cut_value_coordinates(block: Block, moments: Tensor, rank: int, config: ModeGPTConfig) -> ValueOutputFactors:
    """Select value coordinates of each group, and refit the output of each head (ours; as Algorithm 1 does for MLPs).

    The coordinates have the largest ridge leverages in `moments` (heads, d, d), summed over the group's heads.
    """
    per_group = block.heads // block.kv_heads
    leverage = torch.stack([ridge_leverage(moment, config.leverage_ridge) for moment in moments])
    kept = leverage.unflatten(0, (-1, per_group)).sum(1).topk(rank).indices.sort().values
    kept_by_head = kept.repeat_interleave(per_group, dim=0)
    output = block.input_outputs(block.output)
    heads, bias = output.tensor_split((block.heads * block.head_dim,))
    outputs, lost, total = [], moments.new_zeros(()), moments.new_zeros(())
    for moment, index, own in zip(moments, kept_by_head, heads.unflatten(0, (block.heads, -1)), strict=True):
        refitted = nystrom_refit(moment, index, own)
        difference = own.index_add(0, index, refitted, alpha=-1)
        lost += (difference * (moment @ difference)).sum()
        total += (own * (moment @ own)).sum()
        outputs.append(refitted)
    gate = None if block.family.attention.gate is None else _take(block.head_rows("gate"), kept_by_head)
    cut = _take(block.head_rows("value"), kept)
    return ValueOutputFactors(cut, torch.cat((*outputs, bias)), relative(lost, total), gate=gate)


def cut_channels(channels: Channels, moments: LinearMoments, rank: int, config: ModeGPTConfig) -> MLPFactors:
    """Select the channels of largest ridge leverage, and refit down without its bias (Nyström, Algorithm 1)."""
    weight, bias = channels.down[: moments.width], channels.down[moments.width :]
    kept = select_by_leverage(moments.gram, rank, ridge=config.leverage_ridge)
    refitted = nystrom_refit(moments.gram, kept, weight)
    kept_channels = Channels(tuple(row[kept] for row in channels.rows), torch.cat((refitted, bias)))
    return MLPFactors(kept_channels, moments.kept(kept).relative_error(refitted))


def _value_vectors(block: Block, inputs: Tensor) -> Tensor:
    """Return value vectors (…, kv_heads, d), without the bias if it is added to the output's."""
    vectors = block.value(inputs)
    if block.value.bias is not None and block.output.bias is not None:
        vectors = vectors - block.value.bias
    return _in_heads(block, vectors)


def _in_heads(block: Block, vectors: Tensor) -> Tensor:
    """Return vectors (…, heads · head_dim) as (…, heads, head_dim)."""
    return vectors.unflatten(-1, (-1, block.head_dim))


def _take(rows: Tensor, kept: Tensor) -> Tensor:
    """Return the rows `kept` (heads, rank) of every head of (heads, head_dim, columns)."""
    return rows.gather(1, kept[..., None].expand(-1, -1, rows.shape[2]))
