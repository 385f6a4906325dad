"""Type III, the value/output pair, and query/key without rotation: compute free bases by SVDs in head space."""

from __future__ import annotations

import torch
from torch import Tensor

from optimum_modegpt.decompositions.psd import require_finite, roots, to_float64

SINGULAR_FLOOR = 1e-7
"""Singular values below this fraction of the largest belong to directions without tokens. As roots of eigenvalues, they
are accurate only to the root of the rounding error."""


def two_sided_basis(query: Tensor, key: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Compute maps (groups, rank, d) of query and key heads that preserve qᵀk best without rotary pairs (ours).

    From C_Q^½ C_K^½ = USVᵀ, A = S^½ Uᵀ C_Q^−½ and B = S^½ Vᵀ C_K^−½, top `rank`. The expected Σ (qᵀk − (Aq)ᵀ(Bk))² over
    independent q and k is then the tail Σ_{i>rank} S_i². `query` and `key` are second moments (groups, d, d).
    """
    (query_root, query_inverse), (key_root, key_inverse) = roots(query), roots(key)
    left, singular, right = torch.linalg.svd(query_root @ key_root)
    scale = singular[:, :rank].sqrt()[..., None]
    return scale * (left[..., :rank].mT @ query_inverse), scale * (right[:, :rank] @ key_inverse)


def two_sided_energies(query: Tensor, key: Tensor) -> Tensor:
    """Compute the energies S² (groups, d) of the directions of `two_sided_basis`, decreasing."""
    return torch.linalg.svdvals(roots(query)[0] @ roots(key)[0]).square()


def tail_error(query: Tensor, key: Tensor, rank: int) -> Tensor:
    """Compute the relative error (groups,) of the logits after `two_sided_basis`: (Σ_{i>rank} S_i² / Σ S_i²)^½.

    The error is zero for a silent head, whose logits are all zero.
    """
    energies = two_sided_energies(query, key)
    silent = (query * key).sum((-2, -1)) <= 0  # tr(C_Q C_K); the damping of the roots would hide a zero
    return (energies[:, rank:].sum(-1) / energies.sum(-1)).sqrt().masked_fill(silent, 0.0)


def joint_value_output(values: Tensor, output: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Compute the joint SVD of a key-value group (Algorithm 3): basis B (d, rank) and new outputs S'_k V'_kᵀ (rank, m).

    C^½ W_V = USVᵀ gives `values` = W_Vᵀ C W_V = V S² Vᵀ (d, d), the second moment of the value vectors, so the (d_model
    × d_model) moment C is not needed. Then S Vᵀ W_O = U'S'V'ᵀ and B = V S⁻¹ U'_k, W_V ← W_V B. With GQA, `output`
    (d, m) concatenates the group's heads, which is optimal for their sum (ours; the paper treats one head).
    """
    require_finite(values)
    squares, right = torch.linalg.eigh(values)
    singular = squares.clamp_min(0).sqrt()
    visited = singular > singular[-1] * SINGULAR_FLOOR
    reciprocal = torch.where(visited, singular.reciprocal(), 0.0)
    left, joint, rotation = torch.linalg.svd((right * singular).T @ output, full_matrices=False)
    basis = (right * reciprocal) @ left[:, :rank]
    return basis, joint[:rank, None] * rotation[:rank]


def value_basis(inputs: Tensor, output: Tensor, rank: int) -> Tensor:
    """Compute an orthonormal B (d, rank) that spans G^−½ U_r, with U_r the top left singular vectors of G^½ W* (ours).

    `inputs` G (d, d) is the second moment of a key-value group's head outputs, summed over its query heads. `output`
    W* (d, m) concatenates the refitted output rows of these heads. With one query head per group, B is optimal for each
    head alone. With several, the subsequent joint refit compensates for the rest. B is orthonormal, so that directions
    without tokens do not grow.
    """
    root, inverse_root = roots(inputs)
    left = torch.linalg.svd(root @ output, full_matrices=False).U
    return torch.linalg.qr(inverse_root @ left[:, :rank]).Q


def value_energies(inputs: Tensor, output: Tensor) -> Tensor:
    """Compute the energies (d,) of the directions of `value_basis`, decreasing: the squared singular values."""
    return torch.linalg.svdvals(roots(inputs)[0] @ output).square()


def block_diagonal(bases: Tensor, repeats: int, *, ones: bool) -> Tensor:
    """Build a block-diagonal matrix of every group's basis (groups, d, r), once per query head.

    With `ones`, the last block is 1 for the constant input.
    """
    blocks = list(bases.repeat_interleave(repeats, dim=0))
    if ones:
        blocks.append(to_float64(torch.ones(1, 1, device=bases.device)))
    return torch.block_diag(*blocks)
