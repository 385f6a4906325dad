"""Narrow queries and keys that are normalised, for both methods (ours)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from optimum_modegpt import distributed
from optimum_modegpt.architectures import Block
from optimum_modegpt.decompositions.head_norm import row_factors
from optimum_modegpt.decompositions.rotary import pair_indices
from optimum_modegpt.methods.factors import QueryKeyFactors


def narrow_query_key(
    block: Block,
    samples: Mapping[str, Tensor],
    pairs: Tensor,
    error: float,
    query_map: Tensor | None = None,
    *,
    shared_gains: bool = False,
) -> QueryKeyFactors:
    """Keep the `pairs` (kv_heads, count) of normalised queries and keys, with the divisors of the dense norms.

    Args:
        block: the dense block.
        samples: some of the vectors of "query" and "key" before their norms, (heads, tokens, head_dim).
        pairs: the pairs to keep.
        error: the relative error.
        query_map: the refit (kv_heads, width, head_dim) of the queries after their norm, if any.
        shared_gains: whether the heads of a norm over single heads have the same gains, as in a stock class. All must
            keep the same pairs.
    """
    kept = pair_indices(pairs, block.head_dim)
    selected = torch.eye(block.head_dim, dtype=samples["key"].dtype, device=kept.device)[kept]
    rows, gains = {}, {}
    for role, sample in samples.items():
        dense, per_group = block.head_gains(role), len(sample) // block.kv_heads
        if role == "query" and query_map is not None:  # a refit of normalised vectors includes their gain
            maps, own = query_map.repeat_interleave(per_group, dim=0) * dense[:, None, :], torch.ones_like(dense[:, :1])
        else:
            maps = selected.repeat_interleave(per_group, dim=0)
            own = dense.gather(1, kept.repeat_interleave(per_group, dim=0))
        factors = row_factors(
            sample,
            maps,
            distributed.all_reduce,
            rotated=block.norms_rotated,
            joint=block.norms_joint,
            shared=shared_gains and not block.norms_joint,
        )
        rows[role] = factors[..., None] * (maps @ block.head_rows(role))
        gains[role] = own / factors
    return QueryKeyFactors(rows["query"], rows["key"], pairs if block.rotary else None, error, gains)
