"""What the algorithms ask of a matrix, dense, sparse, lazy or known by its action only.

Products with thin factors, slices, and norms. A Dask array is computed here and nowhere else, and only its products
with thin factors, its slices and scalars ever are.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from cur._lib.array import Array, adjoint, is_dask, is_operator, is_sparse, namespace, take, to_numpy, working_dtype
from cur._lib.validate import check_finite_product

__all__ = [
    "adjoint_product",
    "columns_of",
    "frobenius",
    "largest",
    "product",
    "pythagorean_rounding",
    "residual_norm",
    "rows_of",
    "thin",
]

BLOCK_ENTRIES = 1 << 23
"""Entries of the residual held at once; larger blocks were not faster and cost memory."""


def thin(X: Array) -> Array:
    """Return a dense array in memory from a slice that may be sparse or lazy.

    Parameters
    ----------
    X : array or sparse matrix
        The slice or product, small enough to be dense.
    """
    if is_sparse(X):
        return np.asarray(X.toarray())
    if is_dask(X):
        lazy: Any = X
        return np.asarray(lazy.compute())
    return X


def product(A: Array, X: Array) -> Array:
    """Return ``A @ X`` for a thin dense `X`.

    Parameters
    ----------
    A : matrix, shape (m, n)
        The matrix, dense, sparse, lazy or an operator.
    X : array, shape (n, k)
        The vectors, as columns.

    Raises
    ------
    ValueError
        If the product of an operator is not finite.
    """
    return _finite_product(A, X)


def adjoint_product(A: Array, X: Array) -> Array:
    """Return ``A^H @ X`` for a thin dense `X`.

    Parameters
    ----------
    A : matrix, shape (m, n)
        The matrix, dense, sparse, lazy or an operator.
    X : array, shape (m, k)
        The vectors, as columns.

    Raises
    ------
    ValueError
        If the product of an operator is not finite.
    """
    return _finite_product(adjoint(A), X)


def _finite_product(A: Array, X: Array) -> Array:
    """Return ``A @ X``, required to be finite for an operator, whose entries nobody has seen."""
    if not is_operator(A):
        return thin(A @ X)
    with np.errstate(over="ignore", invalid="ignore"):
        Y = A @ X
    check_finite_product(Y)
    return Y


def rows_of(A: Array, indices: Array) -> Array:
    """Return the chosen rows of `A`, in the form of `A`.

    Parameters
    ----------
    A : matrix, shape (m, n)
        The matrix; of an operator the rows are products with unit vectors, and dense.
    indices : array of int, shape (r,)
        The positions of the rows.

    Examples
    --------
    >>> import numpy as np
    >>> rows_of(np.array([[1, 2], [3, 4], [5, 6]]), np.array([2, 0])).tolist()
    [[5, 6], [1, 2]]
    """
    if is_operator(A):
        return adjoint(adjoint_product(A, _unit_columns(A.shape[0], indices, A.dtype)))
    return take(A, indices, axis=0)


def columns_of(A: Array, indices: Array) -> Array:
    """Return the chosen columns of `A`, in the form of `A`.

    Parameters
    ----------
    A : matrix, shape (m, n)
        The matrix; of an operator the columns are products with unit vectors, and dense.
    indices : array of int, shape (c,)
        The positions of the columns.

    Examples
    --------
    >>> import numpy as np
    >>> columns_of(np.array([[1, 2], [3, 4], [5, 6]]), np.array([1])).tolist()
    [[2], [4], [6]]
    """
    if is_operator(A):
        return product(A, _unit_columns(A.shape[1], indices, A.dtype))
    return take(A, indices, axis=1)


def _unit_columns(n: int, indices: Array, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    X = np.zeros((n, len(indices)), dtype=dtype)
    X[indices, np.arange(len(indices))] = 1
    return X


RUN = 512
"""Entries whose squares are added up in the precision of the matrix; sums of these sums are taken in double.

Roundings of equal terms agree, so that a long sum in single precision is wrong by its length. A run of this length is
off by at most ``RUN u``, and was not slower than the whole row. In double precision it is eight times as long.
"""


def frobenius(A: Array) -> float:
    """Return the Frobenius norm, with a relative error below ``8 RUN u`` however many entries there are.

    Parameters
    ----------
    A : matrix, shape (m, n)
        The matrix, dense, sparse or lazy.

    Examples
    --------
    >>> import numpy as np
    >>> frobenius(np.array([[3.0, 0.0], [0.0, 4.0]]))
    5.0
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if is_sparse(A):
            return _norm_of_runs(_entries(A)[None, :])
        if is_dask(A):
            lazy: Any = A
            return math.hypot(*lazy.map_blocks(_block_norm, chunks=(1, 1), dtype=np.float64).compute().ravel())
        return _norm_of_runs(A)


def _norm_of_runs(A: Array) -> float:
    m, n = A.shape
    run = RUN if namespace(A).finfo(A.dtype).eps > 1e-12 else 8 * RUN
    whole = n // run * run if n > run else 0
    parts = [A[:, whole:]] if whole < n else []
    if whole:
        parts.append(namespace(A).reshape(A[:, :whole], (m, whole // run, run)))
    return math.sqrt(sum(_sum_of_squares(part) for part in parts))


def _sum_of_squares(X: Array) -> float:
    """Return the sum of squares: of the last axis in the working precision, of the others in double."""
    if not isinstance(X, np.ndarray):
        X = namespace(X).astype(X, working_dtype(X), copy=False)
    if isinstance(X, np.ndarray):
        return float(np.sum(np.vecdot(X, X).real, dtype=np.float64))
    norms = to_numpy(namespace(X).linalg.vector_norm(X, axis=-1)).astype(np.float64)
    return float(np.sum(norms**2))


def _entries(A: Any) -> np.ndarray[Any, Any]:
    """Return the stored entries of a sparse matrix, each position once."""
    A = A.tocsr()
    if not A.has_canonical_format:
        A = A.copy()
        A.sum_duplicates()
    return np.asarray(A.data)


def largest(A: Array) -> float:
    """Return the largest modulus of real and imaginary parts, which unlike that of the entries does not overflow.

    Parameters
    ----------
    A : matrix
        The matrix, dense, sparse or lazy; 0 comes back for a sparse one without entries.

    Examples
    --------
    >>> import numpy as np
    >>> largest(np.array([[3.0 - 4.0j, 1.0]]))
    4.0
    """
    if is_sparse(A):
        A = _entries(A)
        if A.size == 0:
            return 0.0
    xp = namespace(A)
    parts = (xp.real(A), xp.imag(A)) if xp.isdtype(A.dtype, "complex floating") else (A,)
    peaks = [xp.max(xp.abs(part)) for part in parts]
    return max(float(thin(peak)) for peak in peaks)


def _block_norm(block: Array) -> np.ndarray[Any, Any]:
    return np.full((1, 1), frobenius(block))


def pythagorean_rounding(shape: tuple[int, int], unit: float) -> float:
    """Return a bound on the rounding of ``||B||^2 - ||Q^H B P||^2``, relative to ``||B||^2``.

    Products with an orthonormal Q are off by ``(m + k^1/2) u ||B||`` in any order of summation, since every partial sum
    is a projection of a part of B; twice that for the square, for either side, and as much as half of it for what Q
    misses in norm and orthogonality. The constant is for very small matrices, where that of the QR outweighs the
    dimensions.

    Parameters
    ----------
    shape : tuple of int
        The shape (m, n) of B.
    unit : float
        The unit roundoff u of the precision that B is computed with in.
    """
    return 4 * (sum(shape) + 20) * unit


def residual_norm(A: Array, L: Array, R: Array) -> float:
    """Return ``||A - L R||_F`` for thin dense `L` and `R`, block by block.

    Parameters
    ----------
    A : matrix, shape (m, n)
        The matrix, dense, sparse or lazy.
    L : array, shape (m, k)
        The left factor, dense and in memory.
    R : array, shape (k, n)
        The right factor, dense and in memory.

    Examples
    --------
    >>> import numpy as np
    >>> residual_norm(np.diag([3.0, 4.0]), np.array([[1.0], [0.0]]), np.array([[3.0, 0.0]]))
    4.0
    """
    if is_dask(A):
        return frobenius(A - namespace(A).asarray(L, chunks=(A.chunks[0], -1)) @ thin(R))
    m, n = A.shape
    step = max(1, BLOCK_ENTRIES // n)
    if is_sparse(A):
        A = A.tocsr()
        blocks = (float(np.linalg.norm(A[i : i + step].toarray() - L[i : i + step] @ R)) for i in range(0, m, step))
    else:
        # the standard leaves slices that end beyond the array undefined
        ends = ((i, min(i + step, m)) for i in range(0, m, step))
        blocks = (frobenius(A[i:j, :] - L[i:j, :] @ R) for i, j in ends)
    return math.hypot(*blocks)


def scale(A: Array, weights: Array, axis: int) -> Array:
    """Multiply the rows (axis 0) or columns (axis 1) of `A` by `weights`, keeping the form of `A`."""
    if is_operator(A) or is_sparse(A):
        D: Any = scipy.sparse.diags_array(to_numpy(weights))
        if is_operator(A):
            D = scipy.sparse.linalg.aslinearoperator(D)
        return D @ A if axis == 0 else A @ D
    if is_dask(A):
        weights = to_numpy(weights)
    return weights[:, None] * A if axis == 0 else A * weights[None, :]


def transform(A: Array, F: Array, axis: int) -> Array:
    """Return ``F^H A`` (axis 0) or ``A F`` (axis 1) for a square `F`, lazily where `A` is lazy."""
    if is_operator(A) or is_sparse(A):
        A, F = scipy.sparse.linalg.aslinearoperator(A), scipy.sparse.linalg.aslinearoperator(to_numpy(F))
        return F.H @ A if axis == 0 else A @ F
    if is_dask(A):
        xp = namespace(A)
        F = xp.asarray(to_numpy(F), chunks=(A.chunks[axis], A.chunks[axis]))
    return adjoint(F) @ A if axis == 0 else A @ F
