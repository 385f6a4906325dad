"""Positive semidefinite matrices: damping, solves, roots. The one owner of precision and of ill-conditioning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from optimum_modegpt.errors import IllConditionedWarning, NumericalError

ROOT_RIDGE = 1e-6
"""Damping of matrix roots and of pair selection, as a fraction of the mean diagonal."""

EIGENVALUE_FLOOR = 1e-12
"""Eigenvalues below this fraction of the largest count as noise of float64."""

PRODUCT_NOISE = 1e-6
"""Where a damped moment has eigenvalues below zero, those below this fraction of the largest are noise of the float32
products it was summed from."""

GRAM_WIDTH = 1024
"""Columns up to which both triangles are computed: in narrower ones symmetry saves less than small products cost."""


def exact(x: Tensor) -> Tensor:
    """`x` in float64, on its own device where that has float64, else on the CPU."""
    try:
        return x.to(torch.float64)
    except (TypeError, RuntimeError) as error:
        if "float64" not in str(error):
            raise
        return x.cpu().to(torch.float64)


def working(dtype: torch.dtype) -> torch.dtype:
    """The precision of products over tokens of this type: float32 (16-bit numbers are exact there), or float64."""
    return torch.promote_types(dtype, torch.float32)


def raised(x: Tensor) -> Tensor:
    """`x` in the precision of products over tokens."""
    return x.to(working(x.dtype))


@functools.cache
def row_type(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The type of the rows whose products make the moments of a model of `dtype`: its own where float32 can be their
    sum, else `working`.

    bfloat16 alone: weighted rows and what is missing to a target leave the range of float16.
    """
    if dtype != torch.bfloat16:
        return working(dtype)
    # There is no 257 in bfloat16. Laid out as by `_fill_gram`: transposed, and into a part of a matrix.
    rows = torch.ones(257, 4, dtype=dtype, device=device)
    part = _empty_product(rows, rows)[:2, 2:]
    try:
        _multiply(rows[:, :2].T, rows[:, 2:], part)
    except RuntimeError:  # not implemented, or not for these types: torch has no other way to ask
        return working(dtype)
    return dtype if part.eq(257).all() else working(dtype)


@contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """Inside, float32 products of what a 16-bit model of `dtype` computed may round their inputs, as matrix units do.

    What they lose is of the size of the activations' own rounding; sums stay in float32. Nothing changes for wider
    numbers.
    """
    units: Any = torch.backends
    tensor_cores, vectors = (units.cuda.matmul, "tf32"), (units.mkldnn.matmul, "bf16")
    # bfloat16 has fewer digits than float16, tf32 as many.
    backends = {torch.bfloat16: (tensor_cores, vectors), torch.float16: (tensor_cores,)}.get(dtype, ())
    before = [backend.fp32_precision for backend, _ in backends]
    try:
        for backend, precision in backends:
            backend.fp32_precision = precision
        yield
    finally:
        for (backend, _), precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def gram_matrix(rows: Tensor) -> Tensor:
    """rowsᵀ rows (d, d), of 16-bit rows in float32, for `rows` (n, d), no gradient.

    Of blocks that mirror each other one is computed.
    """
    result = _empty_product(rows, rows)
    _fill_gram(result, rows)
    return result


def cross_matrix(rows: Tensor, targets: Tensor) -> Tensor:
    """rowsᵀ targets (d, m), of 16-bit rows in float32, for `rows` (n, d) and `targets` (n, m), no gradient."""
    result = _empty_product(rows, targets)
    _multiply(rows.T, targets, result)
    return result


def _empty_product(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[1], right.shape[1], dtype=working(left.dtype))


def _multiply(left: Tensor, right: Tensor, result: Tensor) -> None:
    if left.dtype == result.dtype:
        torch.mm(left, right, out=result)
    else:
        torch.mm(left, right, out_dtype=result.dtype, out=result)


def _fill_gram(result: Tensor, rows: Tensor) -> None:
    if rows.shape[1] <= GRAM_WIDTH:
        _multiply(rows.T, rows, result)
        return
    half = _half(rows.shape[1])
    left, right = rows[:, :half], rows[:, half:]
    _fill_gram(result[:half, :half], left)
    _fill_gram(result[half:, half:], right)
    _multiply(left.T, right, result[:half, half:])
    result[half:, :half] = result[:half, half:].T


def gram_work(width: int) -> int:
    """Multiply-adds of `gram_matrix` for one row."""
    if width <= GRAM_WIDTH:
        return width**2
    half = _half(width)
    return gram_work(half) + gram_work(width - half) + half * (width - half)


def _half(width: int) -> int:
    """About half of it, on a border that matrix units like."""
    return -(-width // 128) * 64


def mean_diagonal(moment: Tensor) -> Tensor:
    """Mean of the diagonal of the last two axes, never zero: a damped zero moment has an inverse that is finite."""
    # The root of the smallest normal number: fractions of it, and their reciprocals, keep their full precision.
    return moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(moment.dtype).tiny ** 0.5)


def add_diagonal(moment: Tensor, value: Tensor | float) -> Tensor:
    """`moment` + `value`·I; one value for every matrix of a batch."""
    result = moment.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(torch.as_tensor(value, dtype=moment.dtype, device=moment.device)[..., None])
    return result


def damp(moment: Tensor, ridge: float) -> Tensor:
    """`moment` + ridge · mean diagonal · I."""
    return add_diagonal(moment, ridge * mean_diagonal(moment))


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """matrix⁻¹ right for a positive definite `matrix`, by Cholesky.

    Where the factorisation fails, by eigenvalues floored at `PRODUCT_NOISE` of the largest, with a warning.
    Shapes (…, n, n) and (…, n, m).
    """
    require_finite(matrix)
    require_finite(right)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not info.any():
        return torch.cholesky_solve(right, factor)
    values, vectors = _floored_eigenvalues(matrix, PRODUCT_NOISE)
    warnings.warn(
        f"Cholesky of a {matrix.shape[-1]}-wide moment failed; solved by floored eigenvalues. "
        "More calibration tokens or a larger ridge avoid this.",
        IllConditionedWarning,
        stacklevel=2,
    )
    return vectors @ ((vectors.mT @ right) / values[..., None])


def inverse(matrix: Tensor) -> Tensor:
    """matrix⁻¹, symmetric, for a positive definite `matrix`; as `solve` where the factorisation fails.

    Computed on the host for devices without float64, which lack factorisations too.
    """
    home = matrix.device
    matrix = matrix.to(exact(matrix.new_zeros(())).device)
    require_finite(matrix)
    result, info = torch.linalg.cholesky_ex(matrix)
    if info.any():
        result = solve(matrix, torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix))
    else:
        del matrix  # as large as the result, of which accelerators make one more
        result = torch.cholesky_inverse(result)
    return (result + result.mT).div_(2).to(home)


def roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """moment^½ and moment^−½, both symmetric, damped by `ROOT_RIDGE`."""
    values, vectors = _floored_eigenvalues(damp(moment, ROOT_RIDGE), EIGENVALUE_FLOOR)
    return (vectors * values.sqrt()[..., None, :]) @ vectors.mT, (vectors * values.rsqrt()[..., None, :]) @ vectors.mT


def require_finite(matrix: Tensor) -> None:
    """Raises NumericalError when the matrix has a NaN or an infinity."""
    if not matrix.isfinite().all():
        raise NumericalError(
            "a second moment is not finite: the model's activations overflow on the calibration text. "
            "Load the model in bfloat16 or float32, or check its weights."
        )


def _floored_eigenvalues(matrix: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    require_finite(matrix)
    values, vectors = torch.linalg.eigh(matrix)
    floor = (values[..., -1:] * fraction).clamp_min(torch.finfo(values.dtype).tiny)
    return torch.maximum(values, floor), vectors
