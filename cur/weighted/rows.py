"""A matrix by its own rows under weights, all ranks at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cur._lib.array import Array, adjoint, convert, namespace, real_dtype, take, to_numpy, unit_roundoff
from cur._lib.host import through_numpy
from cur._lib.linalg import lu_pivots, qr
from cur._lib.promotion import promote
from cur._lib.scale import times_power
from cur._lib.validate import check_rank
from cur.factors import Interpolative
from cur.linking import Orthogonal
from cur.weighted.truncation import beyond, prepared, weighed, weighted_svd
from cur.weights import Weight, size_of, unit_weight

__all__ = ["OwnRows", "own_rows"]


@dataclass(frozen=True, eq=False, repr=False)
class OwnRows:
    """A matrix by r of its rows, for every r.

    Attributes
    ----------
    matrix : array, shape (m, n)
        The matrix, in the precision that was computed in.
    order : array of int, shape (k,)
        Its rows in the order of choice: the first r are those kept at rank r. ``k = min(m, n)``.
    coordinates : array, shape (m, k)
        All rows in an orthonormal basis, of the weighted space, that the chosen ones span one after the other; where
        squares would leave the range, divided by a power of two.
    triangle : array, shape (k, k)
        Lower triangular: the coordinates of the chosen rows, divided by the same.
    square_errors : array, shape (k + 1,)
        Squares of the weighted error at the ranks 0 to k, float64, non-increasing. Zero or infinite where squares leave
        the range of doubles.
    """

    matrix: Array
    order: Array
    coordinates: Array
    triangle: Array
    square_errors: np.ndarray[Any, Any]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (m, n) of the matrix."""
        m, n = self.matrix.shape
        return int(m), int(n)

    def truncate(self, rank: int) -> Interpolative:
        """Return the matrix by `rank` of its rows, and the coefficients of the others that lose least.

        Parameters
        ----------
        rank : int
            The number of rows to keep, between 1 and ``min(m, n)``.

        Raises
        ------
        TypeError, ValueError
            If the rank is not an integer between 1 and ``min(m, n)``.
        """
        m, n = self.matrix.shape
        rank, _ = check_rank(rank, (m, n))
        kept = self.order[:rank]
        others = convert(np.setdiff1d(np.arange(m), to_numpy(kept)), kept)
        upper = adjoint(self.triangle[:rank, :rank])
        solver = Orthogonal(upper, cutoff=rank * unit_roundoff(upper.dtype, upper))
        wanted = adjoint(take(self.coordinates, others, axis=0)[:, :rank])
        coefficients = adjoint(solver.left_divide(adjoint(solver.Q) @ wanted))
        return Interpolative(take(self.matrix, kept, axis=0), coefficients, kept, others)

    def __repr__(self) -> str:
        m, n = self.matrix.shape
        return f"A {m} x {n} matrix by its own rows, {self.matrix.dtype}"


@through_numpy
def own_rows(A: Array, /, *, row_weights: Any = None, column_weights: Any = None) -> OwnRows:
    r"""Order the rows of a matrix so that the first r give the others well, for every r.

    The rows are chosen by DEIM on the range of the best approximation under the weights, each row multiplied by the
    root of its own weight in `H`. The error is ``||H^(1/2) (A - X A[rows]) G^(1/2)||_F`` with the best coefficients
    `X`, which do not depend on `H`: it only decides which rows to choose. Compared with `cur.interpolative`, the choice
    for all ranks costs one factorization, and `H` is never factored if it belongs to the longer side.

    Parameters
    ----------
    A : array, shape (m, n)
        Dense; half precisions are computed in single, integers in double precision.
    row_weights, column_weights : array or `weights.Weight`, optional
        `H` and `G`, as for `cur.weighted.truncation.weighted_svd`.

    Returns
    -------
    OwnRows

    Raises
    ------
    TypeError, ValueError
        If the matrix or its weights are not as `cur.weighted.truncation.weighted_svd` takes them.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> result = own_rows(A)
    >>> result.order.tolist(), result.square_errors.round(6).tolist()
    ([1, 0], [7.0, 2.0, 0.0])
    """
    best = weighted_svd(A, row_weights=row_weights, column_weights=column_weights)
    near, exponent = prepared(A)
    A, xp = promote(A), namespace(near)
    basis = qr(best.left)[0]
    if row_weights is not None:
        basis = basis * xp.sqrt(_diagonal(row_weights, A))[:, None]
    order = lu_pivots(basis)
    weight, size = unit_weight(column_weights, A, 1, A.dtype)
    B = near if weight is None else weight.apply(near, 1)
    Q, T = qr(adjoint(take(B, order, axis=0)))
    Z = B @ Q
    # squares of norms: real and not negative, but for rounding
    ZH, more = weighed(Z, row_weights, A, 0)
    shells = to_numpy(xp.abs(xp.sum(adjoint(Z) * ZH.T, axis=1)))
    squares = np.append(np.cumsum(shells.astype(np.float64)[::-1])[::-1], 0.0)
    return OwnRows(A, order, Z, adjoint(T), beyond(squares, 2 * (exponent + size + more)))


def _diagonal(weights: Any, A: Array) -> Array:
    """Return the diagonal of a row weight of size one, in the dtype of the singular values of `A`."""
    xp = namespace(A)
    real = real_dtype(A.dtype, A)
    if isinstance(weights, Weight) or weights.ndim == 1:
        weight: Any = unit_weight(weights, A, 0, A.dtype)[0]
        if weight.root is not None:
            return xp.astype(weight.root, real) ** 2
        return xp.astype(xp.sum(xp.abs(weight.vectors * weight.roots[None, :]) ** 2, axis=1), real)
    diagonal = xp.abs(xp.linalg.diagonal(promote(weights)))
    return xp.astype(times_power(diagonal, -size_of(diagonal[:, None])), real)
