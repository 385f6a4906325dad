"""The scores of dense attention classes that compute them without the attention interface of transformers.

This file is also remote code: it is copied next to the weights. It imports only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .modegpt_attention import ModeGPTAttentionMixin


class ModeGPTScoresMixin(ModeGPTAttentionMixin):
    """Extends a dense attention class that has no function of the attention interface.

    A family adds `scaling`, and a bias of the scores if it has one.
    """

    float32_scores: ClassVar[bool] = False
    """Whether the dense class computes the products of queries and keys in float32."""

    @classmethod
    def eager_function(cls) -> Callable[..., Any]:
        """Return the attention function below."""
        return attention_forward

    @classmethod
    def adds_to_scores(cls, config: Any) -> bool:
        """Return whether `score_bias` returns a bias in a model with this configuration."""
        del config
        return cls.score_bias is not ModeGPTScoresMixin.score_bias

    def score_bias(self, query: Tensor, key: Tensor, **kwargs: Any) -> Tensor | None:
        """Return a tensor that is added to the scores, or None.

        It broadcasts to (batch, heads, queries, keys). `kwargs` are the other arguments of the attention.
        """
        del query, key, kwargs


def attention_forward(
    module: ModeGPTScoresMixin,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Compute softmax(scaling · q kᵀ + bias + mask) v, with the softmax in float32.

    Query, key and value are (batch, heads, length, width) each; key and value may have fewer heads. The output is
    (batch, length, heads, width of the values). Also return the weights, (batch, heads, queries, keys).
    """
    per_group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(per_group, dim=1), value.repeat_interleave(per_group, dim=1)
    dtype = torch.float32 if module.float32_scores else query.dtype
    scores = query.to(dtype) @ key.to(dtype).mT * scaling
    for added in (module.score_bias(query, key, **kwargs), attention_mask):
        if added is not None:
            scores = scores + added
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights
