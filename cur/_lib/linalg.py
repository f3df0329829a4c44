"""Decompositions that the array API standard lacks or leaves open: a library's own routine, else our own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import array_api_compat as compat
import numpy as np

from cur._lib.array import Array, convert, namespace, to_numpy
from cur._lib.elimination import eliminate

__all__ = ["lu_pivots", "qr", "solve_triangular", "svd", "svdvals"]


def qr(X: Array) -> tuple[Array, Array]:
    """Return the thin QR factorization of a tall matrix.

    NumPy and torch: by Cholesky factorization of the Gram matrix, which is all matrix products, and once more where the
    first time is not orthogonal to rounding; by Householder reflections, which take several times as long on any
    device, where the matrix is far from that. SciPy's LAPACK would be as fast alone, but its threads and NumPy's wait
    for each other: calls that alternate between the two took up to six times as long.

    Parameters
    ----------
    X : array, shape (m, k)
        The matrix, in a dtype that its library decomposes.

    Returns
    -------
    Q, R : array, shape (m, k) and (k, k)
        Orthonormal columns and an upper triangle, with ``X = Q R``; of a wide matrix m columns and m rows.

    Examples
    --------
    >>> import numpy as np
    >>> Q, R = qr(np.array([[3.0], [4.0]]))
    >>> (np.abs(Q).round(3).tolist(), np.abs(R).round(3).tolist())
    ([[0.6], [0.8]], [[5.0]])
    """
    if (compat.is_numpy_array(X) or compat.is_torch_array(X)) and X.shape[0] >= X.shape[1]:
        Q, R, condition = _cholesky_qr(X)
        if condition < CHOLESKY_ONCE:
            return Q, R
        if condition < CHOLESKY_TWICE:
            Q, R_again, _ = _cholesky_qr(Q)
            return Q, R_again @ R
    Q, R = _finite(lambda xp, Y: xp.linalg.qr(Y), X)
    return Q, R


def svd(X: Array, *, full_matrices: bool = False) -> tuple[Array, Array, Array]:
    """Return ``V, s, W^H`` of the singular value decomposition.

    Parameters
    ----------
    X : array, shape (m, n)
        The matrix, in a dtype that its library decomposes.
    full_matrices : bool, default False
        Whether V and W are square, completed to orthonormal bases of the whole spaces.

    Returns
    -------
    V, s, Wh : array
        The left vectors, the singular values, non-increasing, and the right vectors as rows.
    """
    V, s, Wh = _finite(lambda xp, Y: xp.linalg.svd(Y, full_matrices=full_matrices), X)
    return V, s, Wh


def svdvals(X: Array) -> Array:
    """Return the singular values, non-increasing.

    Parameters
    ----------
    X : array, shape (m, n)
        The matrix, in a dtype that its library decomposes.
    """
    return _finite(lambda xp, Y: (xp.linalg.svdvals(Y),), X)[0]


def _finite(decompose: Callable[[Any, Any], tuple[Any, ...]], X: Any) -> tuple[Any, ...]:
    """Return factors, NumPy's where those of torch hold NaN.

    MKL's QR of single-precision complex matrices, which its SVD begins with, divides by zero where columns repeat.
    """
    if not compat.is_torch_array(X):
        return tuple(decompose(namespace(X), X))
    import torch

    try:
        factors = tuple(decompose(torch, X))
        if all(bool(torch.isfinite(F).all()) for F in factors):
            return factors
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        pass
    return tuple(convert(F, X) for F in decompose(np, to_numpy(X)))


CHOLESKY_ONCE = 1.1
"""Condition number, in the Frobenius norm over its least value, up to which Cholesky is orthogonal to rounding.

Such a `c` for `k` columns leaves the square of the condition number in the 2-norm below about ``k c^2``, by which the
roundoff is multiplied. Measured on processors of two makers: ``||Q^H Q - I||_F`` stays below ``k u``, where Householder
leaves half of that; up to 1.5 it does on one of them alone.
"""
CHOLESKY_TWICE = 100.0
"""Condition number, in the same measure, up to which Cholesky loses at most two digits in ``Q R``."""


def _cholesky_qr(X: Any) -> tuple[Any, Any, float]:
    """Return Q, R and the condition number; infinity, or NaN, where columns are numerically dependent."""
    if compat.is_torch_array(X):
        import torch

        # cholesky would raise where a failure shows in the condition number as well
        L = torch.linalg.cholesky_ex(X.mH @ X)[0]
        eye = torch.eye(L.shape[0], dtype=L.dtype, device=L.device)
        inverse = torch.linalg.solve_triangular(L, eye, upper=False).mH
        condition = float(torch.linalg.norm(L) * torch.linalg.norm(inverse)) / L.shape[0]
        return X @ inverse, L.mH, condition
    # a nearly singular X may overflow, which shows in the condition number
    with np.errstate(over="ignore", invalid="ignore"):
        try:
            L = np.linalg.cholesky(X.conj().T @ X)
            inverse = np.linalg.inv(L).conj().T
        except np.linalg.LinAlgError:
            return X, X, math.inf
        condition = float(np.linalg.norm(L)) * float(np.linalg.norm(inverse)) / L.shape[0]
        return X @ inverse, L.conj().T, condition


def solve_triangular(T: Array, B: Array) -> Array:
    """Solve `T X = B` for an upper triangular `T`.

    Parameters
    ----------
    T : array, shape (k, k)
        The triangle, with no zero on its diagonal.
    B : array, shape (k, p)
        The right-hand sides, as columns.

    Returns
    -------
    array, shape (k, p)
        The solutions, as columns.

    Examples
    --------
    >>> import numpy as np
    >>> solve_triangular(np.array([[1.0, 1.0], [0.0, 2.0]]), np.array([[3.0], [4.0]])).tolist()
    [[1.0], [2.0]]
    """
    if compat.is_torch_array(T):
        import torch

        return torch.linalg.solve_triangular(T, B, upper=True)
    if compat.is_jax_array(T):
        import jax.scipy.linalg

        return jax.scipy.linalg.solve_triangular(T, B)
    if compat.is_cupy_array(T):
        import cupyx.scipy.linalg

        return cupyx.scipy.linalg.solve_triangular(T, B)
    return namespace(T).linalg.solve(T, B)


def lu_pivots(X: Array) -> Array:
    """Return the original positions of the first `k` row pivots of LU on an `m x k` matrix.

    The pivot is the entry of largest modulus, and ties go to the lowest row. LAPACK compares ``|Re| + |Im|`` for
    complex numbers, so those take our own elimination; so does NumPy, which has no LU, since SciPy's threads would
    get in the way of NumPy's (see `qr`).

    Parameters
    ----------
    X : array, shape (m, k)
        The matrix, with no more columns than rows.

    Examples
    --------
    >>> import numpy as np
    >>> lu_pivots(np.array([[1.0, 0.0], [2.0, 2.0], [0.0, 3.0]])).tolist()
    [1, 2]
    """
    m, k = X.shape
    if not namespace(X).isdtype(X.dtype, "complex floating"):
        if compat.is_torch_array(X) and X.device.type in ("cpu", "cuda"):
            import torch

            # lu_factor refuses singular matrices
            exchanges = torch.linalg.lu_factor_ex(X)[1].to(torch.int64) - 1
            return convert(_exchange(to_numpy(exchanges), m, k), X)
        if compat.is_jax_array(X):
            import jax.lax.linalg

            return jax.lax.linalg.lu(X)[2][:k]
        if compat.is_cupy_array(X):
            import cupyx.scipy.linalg

            return convert(_exchange(to_numpy(cupyx.scipy.linalg.lu_factor(X)[1]), m, k), X)
    # elimination walks along columns: half the time where they are contiguous
    return eliminate(np.asfortranarray(X) if compat.is_numpy_array(X) else X)


def _exchange(exchanges: np.ndarray[Any, Any], m: int, k: int) -> np.ndarray[Any, Any]:
    """Turn LAPACK's successive row exchanges into the positions of the first `k` rows."""
    order = np.arange(m)
    for i, j in enumerate(exchanges[:k]):
        order[i], order[j] = order[j], order[i]
    return order[:k]
