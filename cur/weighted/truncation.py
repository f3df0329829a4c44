"""The nearest matrix of every rank under weights: what no choice of rows and columns can beat.

Its factors hold no rows or columns of the matrix. It serves where the size of the error is all that counts, and to
measure what it costs to keep to the matrix's own rows and columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cur._lib import array as _array
from cur._lib.array import Array, adjoint, namespace, to_numpy
from cur._lib.products import frobenius
from cur._lib.promotion import check_promoted
from cur._lib.validate import check_companion, check_finite_norm, check_rank
from cur.factors import Folded
from cur.importance import Weight, as_weight, floating, in_dtype

__all__ = ["WeightedSVD", "square_errors", "weighted_svd"]


@dataclass(frozen=True, eq=False, repr=False)
class WeightedSVD:
    """The best approximations of a matrix under weights, all ranks at once.

    Attributes
    ----------
    left : array, shape (m, k)
    right : array, shape (k, n)
        The first r columns of `left` times the first r rows of `right` are the best approximation of rank r.
    singular_values : array, shape (k,)
        Of the matrix in weighted coordinates, ``H^(1/2) A G^(1/2)``, non-increasing.
    """

    left: Array
    right: Array
    singular_values: Array

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (m, n) of the matrix."""
        return int(self.left.shape[0]), int(self.right.shape[1])

    @property
    def square_errors(self) -> np.ndarray[Any, Any]:
        """Squares of the weighted error at the ranks 0 to k, float64, non-increasing; the last is 0."""
        return _tails(to_numpy(self.singular_values).astype(np.float64) ** 2)

    def truncate(self, rank: int) -> Folded:
        """Return the best approximation of a rank.

        Raises
        ------
        TypeError, ValueError
            If the rank is not an integer between 1 and ``min(m, n)``.
        """
        rank, _ = check_rank(rank, self.shape)
        return Folded(self.left[:, :rank], self.right[:rank, :])

    def __repr__(self) -> str:
        m, n = self.shape
        return f"Weighted SVD of a {m} x {n} matrix, {self.left.dtype}"


def weighted_svd(A: Array, /, *, row_weights: Any = None, column_weights: Any = None) -> WeightedSVD:
    r"""Compute the minimisers of ``||H^(1/2) (A - B) G^(1/2)||_F`` over matrices `B` of rank r, for every r.

    By the eigenvalues of a matrix of the shorter side, which needs a factor of that side's weight only; the weight of
    the longer side is multiplied with, whatever its condition. Squares of singular values come out with an error of
    the unit roundoff times the largest, and so does the squared error of the truncations: differences below the root
    of the unit roundoff are not resolved.

    Parameters
    ----------
    A : array, shape (m, n)
        Dense; half precisions are computed in single, integers in double precision.
    row_weights, column_weights : array or `importance.Weight`, optional
        `H` and `G` as for `cur.cur`: positive semidefinite matrices, or vectors for diagonal ones. Directions of weight
        zero cost nothing: there the approximation is zero.

    Returns
    -------
    WeightedSVD

    Raises
    ------
    TypeError, ValueError
        As for `cur.cur`; sparse matrices and operators are not taken.

    References
    ----------
    Eckart and Young, Psychometrika 1 (1936), in weighted coordinates. With `G` the second moments of a linear layer's
    inputs this is the truncation of SVD-LLM (arXiv 2403.07378).

    Examples
    --------
    >>> import numpy as np
    >>> A = np.array([[3.0, 0.0], [0.0, 2.0]])
    >>> weighted_svd(A, column_weights=np.array([1.0, 4.0])).truncate(1).toarray().round(12).tolist()
    [[0.0, 0.0], [0.0, 2.0]]
    """
    A = prepared(A)
    if A.shape[0] < A.shape[1]:
        flipped = _svd(adjoint(A), column_weights, row_weights, axes=(1, 0))
        return WeightedSVD(adjoint(flipped.right), adjoint(flipped.left), flipped.singular_values)
    return _svd(A, row_weights, column_weights, axes=(0, 1))


def square_errors(A: Array, /, *, row_weights: Any = None, column_weights: Any = None) -> np.ndarray[Any, Any]:
    """Compute :attr:`WeightedSVD.square_errors` alone, without singular vectors, which are most of the time.

    Parameters
    ----------
    A, row_weights, column_weights
        As for :func:`weighted_svd`.

    Returns
    -------
    array, shape (min(m, n) + 1,)
        Squares of the weighted error of the best approximations of the ranks 0, 1, ..., float64.

    Raises
    ------
    TypeError, ValueError
        As for :func:`weighted_svd`.

    Examples
    --------
    >>> import numpy as np
    >>> square_errors(np.diag([3.0, 2.0]), column_weights=np.array([1.0, 4.0])).round(12).tolist()
    [25.0, 9.0, 0.0]
    """
    A = prepared(A)
    xp, weights, axes = namespace(A), (row_weights, column_weights), (0, 1)
    if A.shape[0] < A.shape[1]:
        A, weights, axes = adjoint(A), (column_weights, row_weights), (1, 0)
    *_, gram = _gram(A, *weights, axes=axes)
    return _tails(to_numpy(_nonnegative(xp.flip(xp.linalg.eigvalsh(gram)), A, axes)).astype(np.float64))


def prepared(A: Any) -> Array:
    """Check that a matrix is dense and finite, and bring it to the dtype to compute in."""
    A = check_promoted(A)
    if not _array.is_dense(A):
        raise TypeError(f"`A` must be a dense array; got {type(A).__name__}; use `cur.cur`, which reads slices only")
    check_finite_norm(frobenius(A), A)
    return A


def _svd(A: Array, long: Any, short: Any, *, axes: tuple[int, int]) -> WeightedSVD:
    """Decompose a matrix with no fewer rows than columns; `axes` are its own in the matrix that the user passed."""
    xp = namespace(A)
    B, weight, gram = _gram(A, long, short, axes=axes)
    values, Q = xp.linalg.eigh(gram)
    singular_values = xp.sqrt(_nonnegative(xp.flip(values), A, axes))
    Q = xp.flip(Q, axis=1)
    return WeightedSVD(B @ Q, adjoint(Q if weight is None else _undone(weight, Q)), singular_values)


def _gram(A: Array, long: Any, short: Any, *, axes: tuple[int, int]) -> tuple[Array, Weight | None, Array]:
    """Return ``B = A F`` for the factor `F` of the weight of the shorter side, that weight, and ``B^H H B``."""
    original = A if axes[0] == 0 else adjoint(A)
    weight = as_weight(short, original, axes[1], A.dtype)
    B = A if weight is None else weight.apply(A, 1)
    gram = adjoint(B) @ weighed(B, long, original, axes[0])
    return B, weight, (gram + adjoint(gram)) / 2


def _nonnegative(values: Array, A: Array, axes: tuple[int, int]) -> Array:
    """Return eigenvalues, non-increasing, without those that rounding made negative."""
    xp = namespace(A)
    rounding = 100 * max(A.shape) * _array.unit_roundoff(A.dtype, A) * float(values[0])
    if float(values[-1]) < -rounding:
        name = ("row_weights", "column_weights")[axes[0]]
        raise ValueError(
            f"`{name}` must have no negative eigenvalue; a direction of `A` has the weight {float(values[-1]):.3g}; "
            "pass a matrix of second moments or another positive semidefinite one"
        )
    return xp.where(values > 0, values, xp.zeros_like(values))


def _tails(squares: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the sums of squares from each of them on, and 0; from the small end, which keeps them accurate."""
    return np.append(np.cumsum(squares[::-1])[::-1], 0.0)


def weighed(B: Array, weights: Any, original: Array, axis: int) -> Array:
    """Multiply `B` from the left by a weight, which is not factored if it is a matrix.

    `axis` is the side of the matrix that the user passed, `original`, whose indices are the rows of `B`.
    """
    if weights is None:
        return B
    if isinstance(weights, Weight) or not _array.is_dense(weights) or weights.ndim != 2:
        checked: Any = as_weight(weights, original, axis, B.dtype)
        if checked.root is not None:
            return B * (checked.root**2)[:, None]
        F = checked.vectors * checked.roots[None, :]
        return F @ (adjoint(F) @ B)
    name = ("row_weights", "column_weights")[axis]
    weights, _ = floating(weights, name)
    check_companion(weights, original, name)
    m = B.shape[0]
    if tuple(weights.shape) != (m, m):
        raise ValueError(
            f"`{name}` must have one weight per {'row' if axis == 0 else 'column'} of `A`, shape ({m}, {m}); "
            f"got shape {tuple(weights.shape)}"
        )
    weights = in_dtype(weights, B.dtype, name)
    size, asymmetry = frobenius(weights), frobenius(weights - adjoint(weights))
    if not math.isfinite(size):
        raise ValueError(f"`{name}` must be finite; it holds NaN or inf; replace or drop these entries first")
    if asymmetry > 100 * m * _array.unit_roundoff(B.dtype, B) * size:
        raise ValueError(
            f"`{name}` must be symmetric (Hermitian); it differs from its transpose by {asymmetry:.3g}; "
            "symmetrise it first"
        )
    return weights @ B


def _undone(weight: Weight, Q: Array) -> Array:
    """Return ``F^-H Q`` for the factor `F` of a weight, zero where the weight is zero."""
    if weight.root is None:
        return weight.vectors @ (Q / weight.roots[:, None])
    xp = namespace(Q)
    live = weight.root > 0
    reciprocal = xp.where(live, 1 / xp.where(live, weight.root, xp.ones_like(weight.root)), xp.zeros_like(weight.root))
    return Q * reciprocal[:, None]
