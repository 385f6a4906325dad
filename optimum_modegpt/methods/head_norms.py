"""Narrow queries and keys that are normalised, for both methods (ours)."""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_modegpt import distributed
from optimum_modegpt.architectures import Block
from optimum_modegpt.decompositions.ballast import BALLAST, narrow_heads
from optimum_modegpt.decompositions.nystrom import remaining
from optimum_modegpt.decompositions.rotary import pair_indices
from optimum_modegpt.methods.factors import QueryKeyFactors


def kept_pairs(block: Block, rank: int) -> int:
    """Return how many pairs of coordinates a head of width `rank` keeps. The rest of a normalised head is ballast."""
    return (rank - BALLAST if block.normalised and rank < block.head_dim else rank) // 2


def narrow_query_key(block: Block, samples: dict[str, Tensor], pairs: Tensor, relative_error: float) -> QueryKeyFactors:
    """Keep the `pairs` (kv_heads, count) of normalised queries and keys, and the divisors of their norms.

    `samples` (heads, tokens, head_dim) are some of the vectors of "query" and "key" before their norms.
    """
    rows, gains, kept = {}, {}, pair_indices(pairs, block.head_dim)
    for role, sample in samples.items():
        own = kept.repeat_interleave(len(sample) // block.kv_heads, dim=0)
        narrow = narrow_heads(sample, own, block.head_gains(role), total=distributed.all_reduce)
        rows[role], gains[role] = narrow.maps @ block.head_rows(role), narrow.gains
    index = None
    if block.rotary:  # ballast has the place of a removed pair, whose rotation does not change its length
        index = torch.cat((pairs, remaining(pairs, block.head_dim // 2)[:, : BALLAST // 2]), dim=1)
    return QueryKeyFactors(rows["query"], rows["key"], index, relative_error, gains)
