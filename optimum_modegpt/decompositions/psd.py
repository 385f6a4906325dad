"""Positive semidefinite matrices: damping, solves and roots. Only this module decides precision and conditioning."""

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
"""If a damped moment has negative eigenvalues, those below this fraction of the largest are noise of the float32
products that it was summed from."""

GRAM_WIDTH = 1024
"""Largest number of columns for which both triangles are computed. For fewer columns, symmetry saves less than the
additional small products cost."""


def to_float64(x: Tensor) -> Tensor:
    """Return `x` in float64, on its own device if that supports float64, else on the CPU."""
    try:
        return x.to(torch.float64)
    except (TypeError, RuntimeError) as error:
        if "float64" not in str(error):
            raise
        return x.cpu().to(torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of products over tokens of this dtype: float32 (exact for 16-bit numbers) or float64."""
    return torch.promote_types(dtype, torch.float32)


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in the dtype of products over tokens."""
    return x.to(accumulation_dtype(x.dtype))


@functools.cache
def row_type(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the rows whose products make the moments of a model of `dtype`.

    This is `dtype` if the device can sum its products in float32, else `working(dtype)`. Of the 16-bit dtypes, only
    bfloat16 qualifies, because weighted rows and residuals exceed the range of float16.
    """
    if dtype != torch.bfloat16:
        return accumulation_dtype(dtype)
    # bfloat16 cannot represent 257. The layout is that of `_fill_gram`: transposed, into a part of a matrix.
    rows = torch.ones(257, 4, dtype=dtype, device=device)
    part = _empty_product(rows, rows)[:2, 2:]
    try:
        _multiply(rows[:, :2].T, rows[:, 2:], part)
    except RuntimeError:  # not implemented, or not for these dtypes: torch has no query for this
        return accumulation_dtype(dtype)
    return dtype if part.eq(257).all() else accumulation_dtype(dtype)


@contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """Allow float32 products of a 16-bit model's activations to round their inputs, as matrix units do, in the context.

    The loss is of the size of the rounding of activations in `dtype`. Sums stay in float32. For wider dtypes, this
    changes nothing.
    """
    units: Any = torch.backends
    tensor_cores, vectors = (units.cuda.matmul, "tf32"), (units.mkldnn.matmul, "bf16")
    # bfloat16 has fewer significant digits than float16; tf32 has as many.
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
    """Compute rowsᵀ rows (d, d) for `rows` (n, d), in float32 for 16-bit rows, without gradient.

    Only one of two mirrored blocks is computed.
    """
    result = _empty_product(rows, rows)
    _fill_gram(result, rows)
    return result


def cross_matrix(rows: Tensor, targets: Tensor) -> Tensor:
    """Compute rowsᵀ targets (d, m) for `rows` (n, d) and `targets` (n, m), as in `gram_matrix`, without gradient."""
    result = _empty_product(rows, targets)
    _multiply(rows.T, targets, result)
    return result


def _empty_product(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[1], right.shape[1], dtype=accumulation_dtype(left.dtype))


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
    """Return the multiply-adds of `gram_matrix` per row."""
    if width <= GRAM_WIDTH:
        return width**2
    half = _half(width)
    return gram_work(half) + gram_work(width - half) + half * (width - half)


def _half(width: int) -> int:
    """Return about half of `width`, as a multiple of 64, which suits matrix units."""
    return -(-width // 128) * 64


def mean_diagonal(moment: Tensor) -> Tensor:
    """Compute the mean diagonal of the last two axes, never zero, so that a damped zero moment has a finite inverse."""
    # The floor is the root of the smallest normal number: its fractions and their reciprocals keep full precision.
    return moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(moment.dtype).tiny ** 0.5)


def add_diagonal(moment: Tensor, value: Tensor | float) -> Tensor:
    """Compute `moment` + `value`·I, with one value for each matrix of a batch."""
    result = moment.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(torch.as_tensor(value, dtype=moment.dtype, device=moment.device)[..., None])
    return result


def damp(moment: Tensor, ridge: float) -> Tensor:
    """Compute `moment` + ridge · mean diagonal · I."""
    return add_diagonal(moment, ridge * mean_diagonal(moment))


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Compute matrix⁻¹ right for a positive definite `matrix` by Cholesky. Shapes (…, n, n) and (…, n, m).

    If the factorisation fails, use eigenvalues floored at `PRODUCT_NOISE` of the largest, with a warning.
    """
    require_finite(matrix)
    require_finite(right)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not info.any():
        return torch.cholesky_solve(right, factor)
    values, vectors = _floored_eigenvalues(matrix, PRODUCT_NOISE)
    warnings.warn(
        f"the Cholesky factorisation of a {matrix.shape[-1]}-wide moment failed; used floored eigenvalues instead. "
        "More calibration tokens or a larger ridge avoid this.",
        IllConditionedWarning,
        stacklevel=2,
    )
    return vectors @ ((vectors.mT @ right) / values[..., None])


def inverse(matrix: Tensor) -> Tensor:
    """Compute the symmetric matrix⁻¹ of a positive definite `matrix`. If the factorisation fails, proceed as `solve`.

    Devices without float64 also lack factorisations, so the host computes for them.
    """
    home = matrix.device
    matrix = matrix.to(to_float64(matrix.new_zeros(())).device)
    require_finite(matrix)
    result, info = torch.linalg.cholesky_ex(matrix)
    if info.any():
        result = solve(matrix, torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix))
    else:
        del matrix  # as large as the result, of which accelerators allocate another copy
        result = torch.cholesky_inverse(result)
    return (result + result.mT).div_(2).to(home)


def roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Compute moment^½ and moment^−½, both symmetric and damped by `ROOT_RIDGE`."""
    values, vectors = _floored_eigenvalues(damp(moment, ROOT_RIDGE), EIGENVALUE_FLOOR)
    return (vectors * values.sqrt()[..., None, :]) @ vectors.mT, (vectors * values.rsqrt()[..., None, :]) @ vectors.mT


def require_finite(matrix: Tensor) -> None:
    """Raise NumericalError if the matrix contains a NaN or an infinity."""
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
