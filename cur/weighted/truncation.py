"""The nearest matrix of every rank under weights: what no choice of rows and columns can beat.

Its factors hold no rows or columns of the matrix. It serves where the size of the error is all that counts, and to
measure what it costs to keep to the matrix's own rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cur._lib import array as _array
from cur._lib.array import Array, adjoint, namespace, to_numpy
from cur._lib.host import through_numpy
from cur._lib.products import largest
from cur._lib.promotion import check_promoted
from cur._lib.scale import brought_near_one, times_power
from cur._lib.validate import check_finite_norm, check_rank
from cur.factors import Folded
from cur.weights import Weight, unit_matrix, unit_weight

__all__ = ["WeightedSVD", "square_errors", "weighted_svd"]


@dataclass(frozen=True, eq=False, repr=False)
class WeightedSVD:
    """The best approximations of a matrix under weights, all ranks at once.

    Attributes
    ----------
    left : array, shape (m, k)
        The left factor, ``k = min(m, n)``: its first r columns times the first r rows of `right` are the best
        approximation of rank r.
    right : array, shape (k, n)
        The right factor, whose rows are in the order of importance.
    singular_values : array, shape (k,)
        The singular values of the matrix in weighted coordinates, ``H^(1/2) A G^(1/2)``, non-increasing.
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
        """Squares of the weighted error at the ranks 0 to k, float64, non-increasing; the last is 0.

        Zero or infinite where squares leave the range of doubles.
        """
        with np.errstate(over="ignore"):
            return _tails(to_numpy(self.singular_values).astype(np.float64) ** 2)

    def truncate(self, rank: int) -> Folded:
        """Return the best approximation of a rank.

        Parameters
        ----------
        rank : int
            The rank, between 1 and ``min(m, n)``.

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


@through_numpy
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
    row_weights, column_weights : array or `weights.Weight`, optional
        `H` and `G` as for `cur.cur`: positive semidefinite matrices, or vectors for diagonal ones. Directions of weight
        zero cost nothing: there the approximation is zero.

    Returns
    -------
    WeightedSVD

    Raises
    ------
    TypeError, ValueError
        If the matrix is sparse or an operator, or the arguments are not as `cur.cur` takes them.

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
    A, exponent = prepared(A)
    if A.shape[0] < A.shape[1]:
        flipped = _svd(adjoint(A), column_weights, row_weights, axes=(1, 0), exponent=exponent)
        return WeightedSVD(adjoint(flipped.right), adjoint(flipped.left), flipped.singular_values)
    return _svd(A, row_weights, column_weights, axes=(0, 1), exponent=exponent)


@through_numpy
def square_errors(A: Array, /, *, row_weights: Any = None, column_weights: Any = None) -> np.ndarray[Any, Any]:
    """Compute :attr:`WeightedSVD.square_errors` alone, without singular vectors, which are most of the time.

    Parameters
    ----------
    A, row_weights, column_weights
        The matrix and its weights, as for :func:`weighted_svd`.

    Returns
    -------
    array, shape (min(m, n) + 1,)
        Squares of the weighted error of the best approximations of the ranks 0, 1, ..., float64.

    Raises
    ------
    TypeError, ValueError
        If the matrix or its weights are not as :func:`weighted_svd` takes them.

    Examples
    --------
    >>> import numpy as np
    >>> square_errors(np.diag([3.0, 2.0]), column_weights=np.array([1.0, 4.0])).round(12).tolist()
    [25.0, 9.0, 0.0]
    """
    A, exponent = prepared(A)
    xp, weights, axes = namespace(A), (row_weights, column_weights), (0, 1)
    if A.shape[0] < A.shape[1]:
        A, weights, axes = adjoint(A), (column_weights, row_weights), (1, 0)
    *_, gram, size = _gram(A, *weights, axes=axes)
    values = to_numpy(_nonnegative(xp.flip(xp.linalg.eigvalsh(gram)), A, axes)).astype(np.float64)
    squares: np.ndarray[Any, Any] = beyond(_tails(values), 2 * (exponent + size))
    return squares


def prepared(A: Any) -> tuple[Array, int]:
    """Check that a matrix is dense and finite; return ``2^-e A``, of which squares stay in the range, and `e`."""
    A = check_promoted(A)
    if not _array.is_dense(A):
        raise TypeError(f"`A` must be a dense array; got {type(A).__name__}; use `cur.cur`, which reads slices only")
    near, exponent, total = brought_near_one(A)
    check_finite_norm(math.nan if total is None else total, A)
    return near, exponent


def beyond(X: Array, exponent: int) -> Array:
    """Return ``2^exponent X``, infinite where that is beyond the range."""
    with np.errstate(over="ignore"):
        larger: Array = times_power(X, exponent)
    return larger


def within(X: Array, exponent: int, weights: Sequence[Any] = ()) -> Array:
    """Return ``2^exponent X``, refused where it leaves the range; the weights decide whose fault that is."""
    larger = beyond(X, exponent)
    info, peak = namespace(X).finfo(X.dtype), largest(larger)
    if exponent == 0 or largest(X) == 0.0 or float(info.smallest_normal) <= peak < math.inf:
        return larger
    name = next((name for name, given in zip(NAMES, weights, strict=False) if given is not None), "A")
    raise ValueError(
        f"`{name}` has entries beyond the range of {X.dtype}, in which what is returned is given; divide it by its "
        "largest entry first"
    )


NAMES = ("column_weights", "row_weights")


def _svd(A: Array, long: Any, short: Any, *, axes: tuple[int, int], exponent: int) -> WeightedSVD:
    """Decompose ``2^exponent A`` of no fewer rows than columns; `axes` are its own in what the user passed."""
    xp = namespace(A)
    B, weight, gram, size = _gram(A, long, short, axes=axes)
    values, Q = xp.linalg.eigh(gram)
    singular_values = xp.sqrt(_nonnegative(xp.flip(values), A, axes))
    Q = xp.flip(Q, axis=1)
    left, right = B @ Q, adjoint(Q if weight is None else _undone(weight, Q))
    half = exponent // 2  # the product stays in the range, and so do the factors
    weights = (short, long) if axes == (0, 1) else (long, short)
    return WeightedSVD(
        times_power(left, exponent - half),
        times_power(right, half),
        within(singular_values[:, None], exponent + size, weights)[:, 0],
    )


def _gram(A: Array, long: Any, short: Any, *, axes: tuple[int, int]) -> tuple[Array, Weight | None, Array, int]:
    """Return ``B = A F`` for the factor `F` of the weight of the shorter side, that weight, and ``B^H H B``.

    Both weights are brought near one, by the square of the power of two that comes last.
    """
    original = A if axes[0] == 0 else adjoint(A)
    weight, size = unit_weight(short, original, axes[1], A.dtype)
    B = A if weight is None else weight.apply(A, 1)
    product, more = weighed(B, long, original, axes[0])
    gram = adjoint(B) @ product
    return B, weight, (gram + adjoint(gram)) / 2, size + more


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


def weighed(B: Array, weights: Any, original: Array, axis: int) -> tuple[Array, int]:
    """Multiply `B` from the left by ``2^-2e`` times a weight, near one, which is not factored if it is a matrix.

    `axis` is the side of the matrix that the user passed, `original`, whose indices are the rows of `B`; `e` comes
    second.
    """
    if weights is None:
        return B, 0
    if isinstance(weights, Weight) or not _array.is_dense(weights) or weights.ndim != 2:
        weight, exponent = unit_weight(weights, original, axis, B.dtype)
        checked: Any = weight
        if checked.root is not None:
            return B * (checked.root**2)[:, None], exponent
        F = checked.vectors * checked.roots[None, :]
        return F @ (adjoint(F) @ B), exponent
    weights, exponent = unit_matrix(weights, original, axis, B.dtype)
    return weights @ B, exponent


def _undone(weight: Weight, Q: Array) -> Array:
    """Return ``F^-H Q`` for the factor `F` of a weight, zero where the weight is zero."""
    if weight.root is None:
        return weight.vectors @ (Q / weight.roots[:, None])
    xp = namespace(Q)
    live = weight.root > 0
    reciprocal = xp.where(live, 1 / xp.where(live, weight.root, xp.ones_like(weight.root)), xp.zeros_like(weight.root))
    return Q * reciprocal[:, None]
